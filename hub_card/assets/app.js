// Gradio's annotated image names its labels in a legend below it: this names the one under the pointer, too.
const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const tip = Object.assign(document.createElement("div"), { id: "san-tip", hidden: true });

function labelAt(image, x, y) {
  const masks = [...image.querySelectorAll("img.mask")].filter((mask) => mask.complete && mask.naturalWidth);
  const found = masks.findIndex((mask) => {
    // The image lies in the middle of its box
    const box = mask.getBoundingClientRect();
    const scale = Math.min(box.width / mask.naturalWidth, box.height / mask.naturalHeight);
    const column = (x - box.left - box.width / 2) / scale + mask.naturalWidth / 2;
    const row = (y - box.top - box.height / 2) / scale + mask.naturalHeight / 2;
    pixel.clearRect(0, 0, 1, 1);
    pixel.drawImage(mask, -Math.floor(column), -Math.floor(row));
    return pixel.getImageData(0, 0, 1, 1).data[3] > 0;
  });
  return image.parentElement.querySelectorAll(".legend-item")[found];
}

for (const kind of ["pointermove", "pointerdown"]) {
  document.addEventListener(kind, (event) => {
    const image = event.target.closest?.("#san-painted .image-container");
    const label = image && labelAt(image, event.clientX, event.clientY);
    tip.hidden = !label;
    if (label) {
      document.body.append(tip);
      tip.textContent = label.textContent;
      tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${Math.max(event.clientY - 38, 8)}px`;
    }
  });
}
