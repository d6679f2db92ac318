// The segmented image. props.value is what Segmentation.view returns, props.heat what heat_view returns, props.file a
// file to save. Opacity, hover and legend work here, without the server. Every text is set as text, never as HTML.
const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const percent = (share) => (share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.995 ? 1 : 0)} %`);
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const unpack = async (text) => {
  const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
};
// Dark to bright, so that it reads without colours too
const RAMP = [[16, 12, 52], [92, 28, 130], [204, 58, 106], [250, 150, 66], [255, 242, 186]];
const ramp = (value) => {
  const place = value * (RAMP.length - 1), low = Math.min(Math.floor(place), RAMP.length - 2), share = place - low;
  return RAMP[low].map((start, channel) => Math.round(start + share * (RAMP[low + 1][channel] - start)));
};

const empty = make("div", "san-empty");
empty.append(make("strong", "", "Any words, every pixel"), make("span", "", "An image and words, then Segment."));
const stage = make("div", "san-stage");
const image = make("img");
image.alt = "The image, segmented";
image.draggable = false;
const paint = make("canvas", "san-paint"), lines = make("canvas", "san-lines"), warmth = make("canvas", "san-heat");
const tip = make("div", "san-tip");
tip.setAttribute("role", "status");
stage.append(image, paint, lines, warmth, tip);

const bar = make("div", "san-bar");
const opacityLabel = make("label", "san-opacity");
const opacity = make("input");
Object.assign(opacity, { type: "range", min: "0", max: "100", value: "55", id: "san-opacity" });
const opacityValue = make("output", "", "55 %");
opacityLabel.append(make("span", "", "Opacity"), opacity, opacityValue);
const scale = make("div", "san-scale");
const scaleName = make("span", "san-scale-name"), scaleTop = make("span", "", ""), back = make("button", "san-back", "All labels");
back.type = "button";
const gradient = make("i");
gradient.style.background = `linear-gradient(to right, ${RAMP.map((color) => `rgb(${color})`).join(",")})`;
scale.append(scaleName, make("span", "", "0"), gradient, scaleTop, back);
bar.append(opacityLabel, scale);
const notice = make("p", "san-notice");
const legend = make("div", "san-legend");
const absent = make("div", "san-absent");
const hint = make("p", "san-hint", "Point at the image, or touch it, to read its labels. Click a word to see where the model finds it.");
const files = make("div", "san-files");
files.append(make("span", "", "Download"));
for (const [kind, name] of [["overlay", "Overlay"], ["labels", "Label map"], ["json", "JSON"]]) {
  const button = make("button", "", name);
  button.type = "button";
  button.dataset.kind = kind;
  button.addEventListener("click", () => {
    button.setAttribute("aria-busy", "true");
    trigger("download", { kind, opacity: shares.labels / 100 });
  });
  files.append(button);
}
const result = make("div", "san-result");
result.append(stage, bar, notice, legend, absent, hint, files);
element.append(empty, result);

let view = null, indices = null, heat = null, lit = -1;
// Of the labels' colours, and of the heat map, which hides little of the image where it is dark
const shares = { labels: 55, heat: 85 };

function redraw() {
  if (!indices) return;
  const { width, height, colors } = view;
  for (const canvas of [paint, lines]) Object.assign(canvas, { width, height });
  const table = colors.map((code) => [1, 3, 5].map((start) => parseInt(code.slice(start, start + 2), 16)));
  const colored = new ImageData(width, height), borders = new ImageData(width, height);
  const thick = Math.max(1, Math.round(Math.max(width, height) / 700));
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      const index = indices[at], color = table[index];
      colored.data.set(color, 4 * at);
      colored.data[4 * at + 3] = lit < 0 || lit === index ? 255 : 60;
      const ahead = x + thick < width ? indices[at + thick] : index;
      const below = y + thick < height ? indices[at + thick * width] : index;
      if (ahead !== index || below !== index) borders.data.set([255, 255, 255, 220], 4 * at);
    }
  }
  paint.getContext("2d").putImageData(colored, 0, 0);
  lines.getContext("2d").putImageData(borders, 0, 0);
}

function mix() {
  const share = shares[heat ? "heat" : "labels"] / 100;
  opacity.value = String(100 * share);
  opacity.style.setProperty("--fill", `${100 * share}%`);
  opacityValue.textContent = `${Math.round(100 * share)} %`;
  paint.style.opacity = warmth.style.opacity = String(share);
  lines.style.opacity = share > 0 ? "1" : "0";
  image.style.filter = `saturate(${heat ? 1 - share : 1 - 0.8 * share})`;
}

function light(index) {
  if (index === lit) return;
  lit = index;
  for (const row of element.querySelectorAll("[data-index]")) {
    row.classList.toggle("san-lit", Number(row.dataset.index) === index);
  }
  if (!heat) redraw();
}

function mode() {
  stage.classList.toggle("san-warm", Boolean(heat));
  scale.classList.toggle("san-shown", Boolean(heat));
  if (heat) {
    scaleName.textContent = view.labels[heat.index];
    scaleTop.textContent = heat.highest.toFixed(2);
  }
  for (const row of element.querySelectorAll("[data-index]")) {
    row.setAttribute("aria-pressed", String(Boolean(heat) && heat.index === Number(row.dataset.index)));
    row.removeAttribute("aria-busy");
  }
  mix();
}

function askHeat(row, index) {
  if (heat && heat.index === index) { heat = null; mode(); redraw(); return; }
  row.setAttribute("aria-busy", "true");
  trigger("select", { index });
}

function row(index, area) {
  const button = make("button", "san-row");
  button.type = "button";
  button.dataset.index = String(index);
  button.title = "Show where the model finds it";
  const swatch = make("i");
  swatch.style.background = view.colors[index];
  button.append(swatch, make("span", "san-name", view.labels[index]));
  if (area !== undefined) button.append(make("span", "san-area", percent(area)));
  button.addEventListener("click", () => askHeat(button, index));
  button.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse" && area !== undefined) light(index); });
  button.addEventListener("pointerleave", () => light(-1));
  return button;
}

async function show() {
  const next = props.value;
  if (!next || !next.run) { view = null; result.classList.remove("san-shown"); empty.hidden = false; return; }
  const map = new Uint16Array(await unpack(next.map));
  if (props.value?.run !== next.run) return;
  view = JSON.parse(JSON.stringify(next));
  indices = map;
  heat = null;
  lit = -1;
  image.src = view.image;
  stage.style.aspectRatio = `${view.width} / ${view.height}`;
  stage.style.maxWidth = `min(100%, calc(68vh * ${view.width / view.height}))`;
  notice.textContent = view.notice;
  notice.hidden = !view.notice;
  const found = new Set(view.segments.map((segment) => segment.index));
  legend.replaceChildren(...view.segments.map((segment) => row(segment.index, segment.area)));
  const missing = view.labels.map((_, index) => index).filter((index) => !found.has(index));
  absent.replaceChildren(make("span", "", "Not found"), ...missing.map((index) => row(index)));
  absent.hidden = !missing.length;
  empty.hidden = true;
  result.classList.add("san-shown");
  element.dataset.run = view.run;
  redraw();
  mode();
  if (window.matchMedia("(max-width: 768px)").matches) stage.scrollIntoView({ behavior: "smooth", block: "center" });
}

async function showHeat() {
  const next = props.heat;
  if (!view || !next || !next.values) { mode(); return; }
  const values = new Uint8Array(await unpack(next.values));
  if (values.length !== view.width * view.height) return;
  heat = { index: next.index, highest: next.highest, values };
  const table = Array.from({ length: 256 }, (_, value) => ramp(value / 255));
  const { width, height } = view, warm = new ImageData(width, height);
  values.forEach((value, at) => { warm.data.set(table[value], 4 * at); warm.data[4 * at + 3] = 255; });
  Object.assign(warmth, { width, height });
  warmth.getContext("2d").putImageData(warm, 0, 0);
  mode();
}

function save() {
  for (const button of files.querySelectorAll("button")) button.removeAttribute("aria-busy");
  const file = props.file;
  if (!file || !file.content) return;
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([bytes(file.content)], { type: file.mime }));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function point(event) {
  if (!view || !indices) return;
  const frame = stage.getBoundingClientRect();
  const left = (event.clientX - frame.left) / frame.width, top = (event.clientY - frame.top) / frame.height;
  if (left < 0 || left >= 1 || top < 0 || top >= 1) { leave(); return; }
  const at = Math.floor(top * view.height) * view.width + Math.floor(left * view.width);
  const index = indices[at];
  const score = heat ? ` ${((heat.values[at] / 255) * heat.highest).toFixed(2)}` : "";
  tip.textContent = heat ? view.labels[heat.index] + score : view.labels[index];
  tip.style.setProperty("--swatch", view.colors[heat ? heat.index : index]);
  tip.classList.add("san-shown");
  const width = tip.offsetWidth, x = left * frame.width;
  tip.style.left = `${Math.max(4, Math.min(frame.width - width - 4, x + 14 + width > frame.width ? x - width - 10 : x + 14))}px`;
  tip.style.top = `${Math.max(4, top * frame.height - 38)}px`;
  if (!heat) light(index);
}
function leave() { tip.classList.remove("san-shown"); light(-1); }

stage.addEventListener("pointermove", point);
stage.addEventListener("pointerdown", point);
stage.addEventListener("pointerleave", leave);
opacity.addEventListener("input", () => { shares[heat ? "heat" : "labels"] = Number(opacity.value); mix(); });
back.addEventListener("click", () => { heat = null; mode(); redraw(); });
watch("value", show);
watch("heat", showHeat);
watch("file", save);
show();
