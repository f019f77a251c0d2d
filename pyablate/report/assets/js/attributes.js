// Attributes against drops: correlations of all at a glance, one of them as a scatter plot.

// Drops are shares, shown in points; other measures are shown as they are.
const targetName = (name) => unitFigures().figures.find((figure) => figure[0] === name)[1];
const targetScale = (name) => (name.endsWith("_drop") ? 100 : 1);

function attributesSection() {
  const { name, targets } = data.attributes;
  const state = { target: 1, attribute: 0, layer: 0 };
  const matrix = make("div");
  const caption = make("p", { class: "note", "aria-live": "polite" });
  const holder = pointsHolder("Scatter plot of an attribute against a drop");
  const found = new Map();
  const all = data.attributes.correlations;
  for (let i = 0; i < all.correlation.length; i++) found.set(key(all.layer[i], all.target[i], all.attribute[i]), i);
  const at = (layer, attribute) => found.get(key(layer, state.target, attribute));

  function key(layer, target, attribute) {
    return (layer * targets.length + target) * name.length + attribute;
  }

  function choose(layer, attribute) {
    state.layer = layer;
    state.attribute = attribute;
    drawMatrix();
    drawScatter();
  }

  // Starts with the strongest relation that there is.
  function strongest() {
    const of = d3.range(all.correlation.length).filter((i) => all.target[i] === state.target);
    const best = d3.greatest(of, (i) => Math.abs(all.correlation[i]) - (all.q[i] <= data.fdr ? 0 : 1));
    if (best === undefined) return;
    state.layer = all.layer[best];
    state.attribute = all.attribute[best];
  }

  function cellOf(layer, attribute) {
    const i = at(layer, attribute);
    if (i === undefined) return make("td", { class: "cell" }, "\u2013");
    const r = all.correlation[i];
    const strength = Math.round(72 * Math.abs(r));
    const chosen = layer === state.layer && attribute === state.attribute;
    const label = `${name[attribute]} in ${data.layers[layer].name}: ${correlation(r)}`;
    return make(
      "td",
      {
        class: "cell",
        style: { background: `color-mix(in srgb, var(--${r < 0 ? "help" : "harm"}) ${strength}%, transparent)` },
      },
      button([correlation(r), all.q[i] <= data.fdr ? make("sup", { title: `q \u2264 ${data.fdr}` }, "\u2022") : ""],
        () => choose(layer, attribute),
        { class: "pick", "aria-pressed": String(chosen), "aria-label": label }),
    );
  }

  function drawMatrix() {
    const rows = d3.sort(d3.range(name.length), (attribute) =>
      -(d3.mean(data.layers, (_, layer) => Math.abs(all.correlation[at(layer, attribute)])) || 0),
    );
    const focused = matrix.contains(document.activeElement);
    const head = data.layers.map((layer) => make("th", { scope: "col" }, layer.name));
    const body = rows.map((attribute) =>
      make(
        "tr",
        {},
        make("th", { scope: "row", title: data.attributes.formula[attribute] || null }, name[attribute]),
        data.layers.map((_, layer) => cellOf(layer, attribute)),
      ),
    );
    const heading = make("thead", {}, make("tr", {}, make("td", {}, "Spearman"), head));
    matrix.replaceChildren(scrolling(make("table", { class: "correlations" }, heading, make("tbody", {}, body)), true));
    if (focused) matrix.querySelector("[aria-pressed=true]")?.focus();
  }

  function drawScatter() {
    const { layer, attribute } = state;
    const values = data.attributes.values[attribute];
    const drops = unitFigure(targets[state.target]);
    const scale = targetScale(targets[state.target]);
    const marks = d3
      .range(unitCount())
      .filter((unit) => data.units.layer[unit] === layer)
      .filter((unit) => Number.isFinite(values[unit]) && Number.isFinite(drops[unit]))
      .map((unit) => ({ unit, x: values[unit], y: scale * drops[unit] }));
    const target = targetName(targets[state.target]);
    const i = at(layer, attribute);
    caption.textContent =
      i === undefined
        ? `${name[attribute]} in ${data.layers[layer].name}: no correlation can be computed.`
        : `${name[attribute]} against ${target.toLowerCase()} in ${data.layers[layer].name}: Spearman ` +
          `${correlation(all.correlation[i])}, 95 % interval ${correlation(all.low[i])} to ` +
          `${correlation(all.high[i])}, q ${chance(all.q[i])}, ${count(all.units[i])} units.`;
    if (!marks.length) return holder.replaceChildren();
    const width = Math.max(280, holder.clientWidth);
    const figure = Plot.plot({
      width,
      height: Math.min(420, Math.max(260, 0.7 * width)),
      marginLeft: 48,
      marginBottom: 40,
      grid: true,
      x: anyScale(marks.map((mark) => mark.x), name[attribute], width < 420 ? 4 : 7),
      y: anyScale(marks.map((mark) => mark.y), scale === 1 ? target : `${target} (points)`),
      marks: [
        Plot.ruleY([0], { stroke: "var(--muted)" }),
        Plot.dot(marks, {
          x: "x",
          y: "y",
          r: 3,
          fill: (mark) => (data.units.q[mark.unit] <= data.fdr ? "var(--harm)" : "var(--dot)"),
          fillOpacity: 0.75,
        }),
      ],
    });
    pickable(holder, figure, marks, (mark) => [
      data.units.label[mark.unit],
      `${name[attribute]} ${plain(mark.x)}`,
      scale === 1 ? `${target} ${plain(mark.y)}` : `${target} ${signedPoints(mark.y / 100)} points`,
    ]);
  }

  const controls = make(
    "div",
    { class: "controls" },
    select("Drop", targets.map((target, i) => [i, targetName(target)]), state.target, (value) => {
      state.target = Number(value);
      drawMatrix();
      drawScatter();
    }),
  );
  strongest();
  drawMatrix();
  const note = make(
    "p",
    { class: "note" },
    "Rank correlation within each layer; layers are never pooled. A dot marks q \u2264 " +
      `${data.fdr}, adjusted over the attributes of a layer. Choose a figure to see its units; ` +
      "orange are those that hurt some class more than chance.",
  );
  return [
    controls,
    note,
    make("div", { class: "beside" }, matrix, make("div", {}, caption, drawn(holder, drawScatter))),
  ];
}
