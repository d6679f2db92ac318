// The field of words: chips that are typed, pasted or clicked. props.value is the list of labels,
// props.suggestions words to click on. Every text is set as text, never as HTML.
const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const box = make("div", "san-words");
const input = make("input");
input.type = "text";
input.id = "san-words-input";
input.autocomplete = "off";
input.autocapitalize = "off";
input.spellcheck = false;
input.enterKeyHint = "done";
input.setAttribute("aria-label", "Words to look for, separated by commas");
box.append(input);
const pool = make("div", "san-pool");
element.append(box, pool);

const key = (word) => word.normalize("NFC").toLowerCase().split(/\s+/).filter(Boolean).join(" ");
// What is drawn as chips. The value holds the text still being typed as well, so that a click elsewhere finds it there:
// were it made a chip just then, the page would move away under the pointer.
let words = Array.from(props.value ?? []);

// Commas and line breaks part labels, but for those between double quotes
const split = (text) => {
  const parts = [];
  let part = "", quoted = false;
  for (const letter of text) {
    if (letter === '"') quoted = !quoted;
    else if (!quoted && (letter === "," || letter === "\n" || letter === "\r")) { parts.push(part); part = ""; continue; }
    part += letter;
  }
  return { done: parts, rest: part, quoted };
};
const joined = (list, parts) => {
  const all = [...list], seen = new Set(list.map(key));
  for (const part of parts) {
    const word = part.trim().replace(/^"(.*)"$/s, (_, inside) => inside.replaceAll('""', '"').trim());
    if (word && !seen.has(key(word))) { all.push(word); seen.add(key(word)); }
  }
  return all;
};
const tell = () => {
  const { done, rest } = split(input.value);
  props.value = joined(words, [...done, rest]);
};
const set = (list) => { words = list; draw(); tell(); };
const add = (parts) => set(joined(words, parts));
const remove = (word) => set(words.filter((other) => key(other) !== key(word)));
const commit = () => {
  const { done, rest } = split(input.value);
  input.value = "";
  add([...done, rest]);
};

function draw() {
  box.querySelectorAll(".san-chip").forEach((chip) => chip.remove());
  const present = new Set(words.map(key));
  for (const word of words) {
    const chip = make("span", "san-chip", word);
    const cross = make("button", "", "×");
    cross.type = "button";
    cross.setAttribute("aria-label", `Remove ${word}`);
    cross.addEventListener("click", () => { remove(word); input.focus(); });
    chip.append(cross);
    box.insertBefore(chip, input);
  }
  input.placeholder = words.length ? "add a word" : "sky, road, car | automobile";
  for (const button of pool.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(present.has(key(button.textContent))));
  }
}

for (const word of Array.from(props.suggestions ?? [])) {
  const button = make("button", "", word);
  button.type = "button";
  button.addEventListener("click", () => {
    if (words.some((other) => key(other) === key(word))) remove(word);
    else add([word]);
  });
  pool.append(button);
}
pool.hidden = !pool.childElementCount;

box.addEventListener("click", (event) => { if (event.target === box) input.focus(); });
input.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter") {
    event.preventDefault();
    if (input.value.trim()) commit();
    else trigger("submit");
  } else if (event.key === "Backspace" && !input.value && words.length) {
    set(words.slice(0, -1));
  }
});
// Keyboards of phones do not say which key was pressed: what arrived in the field counts
input.addEventListener("input", () => {
  const { done, rest, quoted } = split(input.value);
  if (!done.length || quoted) { tell(); return; }
  input.value = rest.trimStart();
  add(done);
});
input.addEventListener("paste", (event) => {
  const text = event.clipboardData?.getData("text") ?? "";
  if (!/[,\n\r]/.test(text)) return;
  event.preventDefault();
  input.value += text.replace(/[\r\n]+/g, ",");
  commit();
});
input.addEventListener("blur", () => setTimeout(() => {
  if (input.value.trim() && document.activeElement !== input) commit();
}, 400));
watch("value", () => {
  const given = Array.from(props.value ?? []);
  const { done, rest } = split(input.value);
  // Not what was told from here
  if (JSON.stringify(given) === JSON.stringify(joined(words, [...done, rest]))) return;
  input.value = "";
  words = given;
  draw();
});
draw();
