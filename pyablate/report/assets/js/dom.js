// Elements. Names from the data become text nodes and attribute values, never markup.

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined));
  return element;
}

const byId = (id) => document.getElementById(id);

function announce(text) {
  byId("live").textContent = text;
}

// A labelled drop-down list. Choices are [value, text], or [group, [[value, text], ...]].
function select(label, choices, chosen, change) {
  const option = ([value, text]) =>
    make("option", { value, selected: String(value) === String(chosen) }, text);
  const entries = choices.map(([value, text]) =>
    Array.isArray(text) ? make("optgroup", { label: value }, text.map(option)) : option([value, text]),
  );
  const list = make("select", { onchange: (event) => change(event.target.value) }, entries);
  return make("label", { class: "field" }, make("span", {}, label), list);
}

function checkbox(label, checked, change) {
  const box = make("input", {
    type: "checkbox",
    checked,
    onchange: (event) => change(event.target.checked),
  });
  return make("label", { class: "field check" }, box, make("span", {}, label));
}

function button(text, press, properties = {}) {
  return make("button", { type: "button", onclick: press, ...properties }, text);
}

function tile(value, label, note = "") {
  return make(
    "div",
    { class: "tile" },
    make("div", { class: "value" }, value),
    make("div", { class: "label" }, label),
    note ? make("div", { class: "hint" }, note) : null,
  );
}

// A box that scrolls, with a line under it that says so where something of it is out of view.
function scrolling(content, tall = false) {
  const note = make("p", { class: "note more", hidden: true });
  const box = make("div", { class: tall ? "scroll tall" : "scroll" }, content);
  watched.observe(box);
  return make("div", { class: "scrolls" }, box, note);
}

const watched = new ResizeObserver((entries) => {
  for (const { target: box } of entries) {
    const down = box.scrollHeight > box.clientHeight + 1;
    const sideways = box.scrollWidth > box.clientWidth + 1;
    const rows = box.querySelectorAll("tbody tr").length;
    const note = box.nextElementSibling;
    note.hidden = !down && !sideways;
    const ways = [down ? `down for all ${count(rows)} rows` : "", sideways ? "sideways for further columns" : ""];
    note.textContent = `Scroll ${ways.filter(Boolean).join(", ")}.`;
  }
});

// A table from columns {title, cell(row), numeric, hint} and rows; cells are text or elements.
function table(columns, rows, properties = {}, tall = false) {
  const heads = columns.map((column) =>
    make("th", { scope: "col", class: column.numeric ? "number" : null, title: column.hint }, column.title),
  );
  const body = rows.map((row) =>
    make(
      "tr",
      {},
      columns.map((column) => make("td", { class: column.numeric ? "number" : null }, column.cell(row))),
    ),
  );
  const made = make(
    "table",
    properties,
    make("thead", {}, make("tr", {}, heads)),
    make("tbody", {}, body),
  );
  return scrolling(made, tall);
}

// A bar left or right of a zero line; share from -1 to 1, harm to the right.
function bar(share) {
  const width = `${Math.min(1, Math.abs(share)) * 50}%`;
  const inside = make("i", {
    class: share < 0 ? "help" : "harm",
    style: { width, left: share < 0 ? `calc(50% - ${width})` : "50%" },
  });
  return make("span", { class: "diverging", "aria-hidden": "true" }, inside);
}

// Drawings that have to be made again when the width or the theme changes.
const drawings = new Map();

function drawn(holder, draw) {
  drawings.set(holder, draw);
  if (holder.isConnected) draw();
  return holder;
}

function redraw() {
  for (const [holder, draw] of drawings) {
    if (holder.isConnected) draw();
    else drawings.delete(holder);
  }
}

// A colour of the style sheet, for what draws on a canvas.
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function showTip(lines, x, y) {
  const tip = byId("tip");
  tip.replaceChildren(...lines.map((line) => make("div", {}, line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(x + 14, document.documentElement.clientWidth - box.width - 8);
  const above = y - box.height - 12;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 0 ? above : y + 18}px`;
  // Inside an open dialog nothing outside of it is seen.
  const holder = byId("card").open ? byId("card") : document.body;
  if (tip.parentNode !== holder) holder.append(tip);
}

function hideTip() {
  byId("tip").hidden = true;
}
