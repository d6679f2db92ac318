// Pictures to start with: props.pictures is a list of {address, name}.
const row = document.createElement("div");
row.className = "san-examples";
for (const [index, picture] of Array.from(props.pictures ?? []).entries()) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = picture.name;
  button.setAttribute("aria-label", `Example: ${picture.name}`);
  const image = document.createElement("img");
  image.src = picture.address;
  image.alt = "";
  button.append(image);
  button.addEventListener("click", () => trigger("select", { index }));
  row.append(button);
}
element.append(row);
