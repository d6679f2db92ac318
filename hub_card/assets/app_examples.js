// Images to start with: props.images is a list of {address, name}.
const row = document.createElement("div");
row.className = "san-examples";
for (const [index, image] of Array.from(props.images ?? []).entries()) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = image.name;
  button.setAttribute("aria-label", `Example: ${image.name}`);
  const image = document.createElement("img");
  image.src = image.address;
  image.alt = "";
  button.append(image);
  button.addEventListener("click", () => trigger("select", { index }));
  row.append(button);
}
element.append(row);
