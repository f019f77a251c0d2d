// Per layer the distribution of drops, with what chance would make of a harmless unit.

const LEFT = 116;

// Spreads the points of a row so that they do not cover one another: columns of dots, closer
// together where a column would leave its room.
function spread(values, scale, room) {
  const columns = d3.group(d3.range(values.length), (i) => Math.round(scale(values[i]) / 4.5));
  const offsets = new Float64Array(values.length);
  for (const column of columns.values()) {
    const step = Math.min(0.13, (2 * room) / column.length);
    column.forEach((i, place) => {
      offsets[i] = Math.ceil(place / 2) * (place % 2 ? step : -step);
    });
  }
  return offsets;
}

// Draws units as dots in one row per layer; drops in shares, floor [unit] or null.
function drawRows(holder, values, floor, marked, describe, label) {
  const width = Math.max(300, holder.clientWidth);
  const narrow = width < 560;
  const shown = d3.range(unitCount()).filter((unit) => Number.isFinite(values[unit]));
  const x = dropScale(
    shown.map((unit) => 100 * values[unit]),
    label,
  );
  const left = narrow ? 12 : LEFT;
  const half = narrow ? 0.28 : 0.42; // height of a row's band; narrow pages have the name above it
  const pixels = d3.scaleSymlog(x.domain, [left, width - 12]).constant(1);
  const rows = d3.group(shown, (unit) => data.units.layer[unit]);
  const marks = [];
  for (const [layer, units] of rows) {
    const drops = units.map((unit) => 100 * values[unit]);
    const offsets = spread(drops, pixels, half - 0.06);
    units.forEach((unit, i) => marks.push({ unit, x: drops[i], y: layer + offsets[i] }));
  }
  const used = Array.from(rows.keys());
  const bands = floor ? used.map((layer) => floorBand(layer, rows.get(layer), floor)) : [];
  const name = (layer) => data.layers[layer].name;
  const heads = narrow
    ? Plot.text(used, { x: x.domain[0], y: (l) => l - 0.39, text: name, textAnchor: "start", className: "rowname" })
    : Plot.axisY(used, { label: null, tickSize: 0, tickFormat: (l) => clipped(name(l), 17) });
  const figure = Plot.plot({
    width,
    height: 64 + used.length * (narrow ? 62 : 44),
    marginBottom: 44,
    marginLeft: left,
    marginRight: 12,
    marginTop: 8,
    x,
    y: { domain: [d3.max(used) + 0.5, d3.min(used) - 0.5], axis: null },
    marks: [
      Plot.gridX(x.ticks, { stroke: "var(--line)", strokeOpacity: 1 }),
      Plot.rect(bands, { x1: 0, x2: "high", y1: (b) => b.layer - half, y2: (b) => b.layer + half, fill: "var(--floor)" }),
      Plot.ruleX([0], { stroke: "var(--muted)" }),
      Plot.ruleX(bands, { x: "middle", y1: (b) => b.layer - half, y2: (b) => b.layer + half, stroke: "var(--floor-line)", strokeWidth: 1.5, strokeDasharray: "3 2" }),
      Plot.dot(marks, {
        x: "x",
        y: "y",
        r: 2.4,
        fill: (mark) => (marked(mark.unit) ? "var(--harm)" : "var(--dot)"),
        fillOpacity: (mark) => (marked(mark.unit) ? 0.9 : 0.55),
      }),
      Plot.axisX(x.ticks, { label, tickFormat: x.tickFormat, labelAnchor: "center", labelArrow: "none" }),
      heads,
    ],
  });
  pickable(holder, figure, marks, describe);
}

function floorBand(layer, units, floor) {
  const floors = units.map((unit) => 100 * floor[unit]);
  return { layer, middle: d3.median(floors), high: d3.quantile(floors, 0.95) };
}

const clipped = (text, length) => (text.length > length ? `\u2026${text.slice(1 - length)}` : text);

function layersSection() {
  const holder = pointsHolder("Distribution of the drops of all units, one row for each layer");
  const note = make("p", { class: "note" });
  const legend = make("p", { class: "legend" });
  let shown = "max_class_drop";

  function draw() {
    const floor = shown === "max_class_drop" && !estimated() ? data.units.noise_floor : null;
    const text = unitFigures().figures.find((figure) => figure[0] === shown)[1];
    drawRows(
      holder,
      unitFigure(shown),
      floor,
      (unit) => data.units.q[unit] <= data.fdr,
      (mark) => [
        data.units.label[mark.unit],
        `${text}: ${signedPoints(mark.x / 100)} points`,
        `hurts ${className(data.units.max_class[mark.unit])} most`,
        `${estimated() ? "" : `noise floor ${points(data.units.noise_floor[mark.unit])}, `}q ${chance(data.units.q[mark.unit])}`,
      ],
      `${text} (percentage points)`,
    );
    legend.replaceChildren(
      swatch("harm", `hurts some class more than chance (q \u2264 ${data.fdr})`),
      swatch("dot", "within chance"),
      ...(floor ? [swatch("floor", "noise floor: median (dashed) and 95 % of the units")] : []),
    );
    note.textContent = floor
      ? "The largest of many class drops is positive even for a harmless unit. The noise floor is what " +
        "such a unit would show if it changed the same images by chance."
      : estimated()
        ? "Positive means harm. Drops are estimates; the largest of many is too large on average."
        : "Positive means harm. The split-half drop chooses the class on one half of the images and " +
          "measures on the other, so a harmless unit has 0 on average.";
  }

  const choices = unitFigures().figures.filter(([name]) => name.endsWith("_drop")).map(([name, text]) => [name, text]);
  const choose = (value) => {
    shown = value;
    draw();
  };
  const controls = make("div", { class: "controls" }, select("Measure", choices, shown, choose));
  return [controls, drawn(holder, draw), legend, note, layersTable()];
}

function swatch(name, text) {
  return make("span", { class: "swatch" }, make("i", { style: { background: `var(--${name})` } }), text);
}

function layersTable() {
  const rows = data.layers.map((layer, i) => {
    const units = d3.range(unitCount()).filter((unit) => data.units.layer[unit] === i);
    const worst = d3.greatest(units, (unit) => data.units.max_class_drop[unit]);
    const largest = d3.greatest(units, (unit) => data.units.accuracy_drop[unit]);
    const found = units.filter((unit) => data.units.q[unit] <= data.fdr).length;
    return { layer, worst, largest, found, units: units.length };
  });
  const columns = [
    { title: "Layer", cell: (row) => row.layer.name },
    { title: "Units", numeric: true, cell: (row) => count(row.units) },
    { title: "More than chance", numeric: true, cell: (row) => count(row.found) },
    { title: `Largest ${score()} drop`, numeric: true, cell: (row) => points(data.units.accuracy_drop[row.largest]) },
    { title: "by unit", cell: (row) => unitLink(row.largest) },
    { title: "Largest class drop", numeric: true, cell: (row) => points(data.units.max_class_drop[row.worst]) },
    { title: "by unit", cell: (row) => unitLink(row.worst) },
    { title: "of class", cell: (row) => classLink(data.units.max_class[row.worst]) },
    { title: "Computed by", cell: (row) => row.layer.strategy },
  ];
  return make("details", { open: data.layers.length <= 12 }, make("summary", {}, "Layers in figures"), table(columns, rows));
}
