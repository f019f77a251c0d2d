// The table of all units: search, filter, sort, page by page.

const PAGE = 25;

function unitLink(unit) {
  return make("a", { href: unitHash(unit), class: "unit" }, data.units.label[unit]);
}

function classLink(k) {
  return make("a", { href: classHash(k) }, className(k));
}

function hurtClasses(unit) {
  let found = 0;
  for (let k = 0; k < classCount(); k++) if (isSignificant(unit, k) && classDrop(unit, k) > 0) found++;
  return found;
}

// Columns: key, title, numbers or texts to sort by, cell.
function unitColumns() {
  const units = data.units;
  const all = d3.range(unitCount());
  const hurt = Float64Array.from(all, hurtClasses);
  const figure = (key, title, numbers, show, hint) => ({
    key, title, hint, numeric: true, by: (unit) => numbers[unit], cell: (unit) => show(numbers[unit]),
  });
  return [
    { key: "label", title: "Unit", by: (unit) => unit, cell: unitLink },
    figure("accuracy_drop", titled(`${score()} drop`), units.accuracy_drop, points, "percentage points, all images"),
    ...(estimated() ? [figure("half_width", "\u00b1", units.half_width, points, "half of the 95 % interval of the drop")] : []),
    figure("max_class_drop", "Largest class drop", units.max_class_drop, points, "percentage points of that class"),
    {
      key: "max_class", title: "of class", by: (unit) => className(units.max_class[unit]),
      cell: (unit) => classLink(units.max_class[unit]),
    },
    ...(estimated() ? [] : [
      figure("noise_floor", "Noise floor", units.noise_floor, points, "largest class drop to expect of a harmless unit that changes the same images"),
      figure("split_half_drop", "Split-half", units.split_half_drop, points, "class chosen on one half of the images, drop measured on the other"),
    ]),
    figure("q", "q", units.q, chance, "chance of a harmless unit to show as much, adjusted over the layer (Benjamini-Hochberg)"),
    figure("hurt", "Classes hurt", hurt, count, `classes hurt by more than chance, each tested by itself, q <= ${data.fdr}`),
    figure("flips", "Changed", units.flips, count, "images whose prediction changes"),
    ...(d3.max(units.undefined)
      ? [figure("undefined", "None", units.undefined, count, "images without a prediction: logits NaN or infinite")]
      : []),
  ];
}

// The order of the table is also the order of "next" and "previous" on the cards.
let tableOrder = [];

function unitsSection() {
  const state = { text: "", layer: -1, sort: "max_class_drop", falling: true, page: 0, extra: "" };
  const fixed = unitColumns();
  const status = make("p", { class: "note", role: "status" });
  const holder = make("div");
  const pager = make("div", { class: "pager" });
  const haystack = d3.range(unitCount()).map((unit) =>
    `${data.units.label[unit]} ${className(data.units.max_class[unit])}`.toLowerCase(),
  );

  function columns() {
    if (!state.extra) return fixed;
    const numbers = unitFigure(state.extra);
    const title = state.extra.replace("attribute:", "");
    return [
      ...fixed,
      { key: "extra", title, numeric: true, by: (unit) => numbers[unit], cell: (unit) => plain(numbers[unit]) },
    ];
  }

  function arranged() {
    const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
    const found = d3
      .range(unitCount())
      .filter((unit) => state.layer < 0 || data.units.layer[unit] === state.layer)
      .filter((unit) => words.every((word) => haystack[unit].includes(word)));
    const by = (columns().find((column) => column.key === state.sort) || fixed[2]).by;
    const missing = (value) => value === null || Number.isNaN(value);
    const way = state.falling ? -1 : 1;
    return found.sort((a, b) => {
      const [first, second] = [by(a), by(b)];
      if (missing(first) || missing(second)) return missing(first) - missing(second) || a - b;
      const less = typeof first === "string" ? first.localeCompare(second) : first - second;
      return way * less || a - b;
    });
  }

  function head(column) {
    const sorted = state.sort === column.key;
    const press = () => {
      state.falling = sorted ? !state.falling : Boolean(column.numeric) && column.key !== "q";
      state.sort = column.key;
      state.page = 0;
      draw();
      holder.querySelector(`[data-key="${column.key}"]`).focus();
    };
    const arrow = sorted ? (state.falling ? " \u25be" : " \u25b4") : "";
    const way = sorted ? (state.falling ? "descending" : "ascending") : "none";
    return make(
      "th",
      { scope: "col", "aria-sort": way, class: column.numeric ? "number" : null },
      button([column.title, make("span", { "aria-hidden": "true" }, arrow)], press, {
        class: "sort", title: column.hint, "data-key": column.key,
      }),
    );
  }

  function draw() {
    tableOrder = arranged();
    const pages = Math.max(1, Math.ceil(tableOrder.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    const shown = tableOrder.slice(state.page * PAGE, (state.page + 1) * PAGE);
    const body = shown.map((unit) =>
      make(
        "tr",
        { onclick: (event) => event.target.closest("a") || openUnit(unit) },
        columns().map((column) => make("td", { class: column.numeric ? "number" : null }, column.cell(unit))),
      ),
    );
    const made = make(
      "table",
      { id: "unit-table", class: "units" },
      make("thead", {}, make("tr", {}, columns().map(head))),
      make("tbody", {}, body),
    );
    holder.replaceChildren(scrolling(made));
    status.textContent = tableOrder.length
      ? `${count(tableOrder.length)} of ${count(unitCount())} units. Drops in percentage points, positive means harm.`
      : "No unit matches.";
    const turn = (by) => () => {
      state.page += by;
      draw();
    };
    pager.replaceChildren(
      button("Previous", turn(-1), { disabled: state.page === 0 }),
      make("span", {}, `Page ${state.page + 1} of ${pages}`),
      button("Next", turn(1), { disabled: state.page === pages - 1 }),
    );
  }

  const set = (name, convert = (value) => value) => (value) => {
    state[name] = convert(value);
    state.page = 0;
    if (name === "extra") state.sort = value ? "extra" : "max_class_drop";
    if (name === "extra") state.falling = true;
    draw();
  };
  const search = make("input", {
    type: "search", id: "unit-search", placeholder: "features.2:18, Shirt \u2026", autocomplete: "off",
    oninput: (event) => set("text")(event.target.value),
  });
  const attributes = unitFigures().attributes.map(([name, text]) => [name, text]);
  const controls = make(
    "div",
    { class: "controls" },
    make("label", { class: "field" }, make("span", {}, "Search"), search),
    select("Layer", [[-1, "All"], ...data.layers.map((layer, i) => [i, layer.name])], -1, set("layer", Number)),
    attributes.length ? select("Attribute", [["", "None"], ...attributes], "", set("extra")) : null,
  );
  draw();
  return [controls, status, holder, pager];
}
