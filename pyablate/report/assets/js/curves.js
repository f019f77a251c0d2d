// Accuracy against what has been removed, one chart for each table given.

// Okabe and Ito's colours, told apart by most colour-blind readers; names of the style sheet.
const SERIES = ["--s1", "--s2", "--s3", "--s4", "--s5", "--s6"].map((name) => `var(${name})`);
const DASHES = ["", "6 3", "2 3"]; // told apart in print as well

function curvesSection() {
  return data.curves.map(curveChart);
}

function curveChart(curves) {
  let measure = curves.measures[0].name;
  const holder = make("div", { class: "chart" });
  const figures = make("div");
  const names = Array.from(new Set(curves.series.filter((s) => !s.random).map((s) => s.name)));
  const dash = (name) => DASHES[Math.floor(names.indexOf(name) / SERIES.length) % DASHES.length];
  const colourOf = (name) => SERIES[names.indexOf(name) % SERIES.length];
  const chosen = () => curves.measures.find((each) => each.name === measure);
  const scaled = (value) => (value === null ? NaN : chosen().scale * value);

  function rows() {
    return curves.series.flatMap((series, i) =>
      series.x.map((x, j) => ({ name: series.name, random: series.random, z: i, x, y: scaled(series.values[measure][j]) })),
    );
  }

  function draw() {
    const { label, scale, chance: level } = chosen();
    const shown = rows().filter((row) => Number.isFinite(row.y));
    const [random, ranked] = [shown.filter((row) => row.random), shown.filter((row) => !row.random)];
    const width = Math.max(280, holder.clientWidth);
    const last = d3.groups(ranked, (row) => row.z).map(([, line]) => line.at(-1));
    const figure = Plot.plot({
      width,
      height: Math.min(420, Math.max(260, 0.6 * width)),
      marginLeft: 52,
      marginRight: 16,
      marginBottom: 40,
      grid: true,
      x: { label: curves.x, labelArrow: "none", labelAnchor: "center" },
      y: { label, labelArrow: "none", tickFormat: scale === 1 ? "~s" : undefined },
      marks: [
        Plot.ruleY(level === null ? [] : [scaled(level)], { stroke: "var(--muted)", strokeDasharray: "2 3" }),
        Plot.line(random, { x: "x", y: "y", z: "z", stroke: "var(--dot)", strokeOpacity: 0.7, strokeWidth: 1.2 }),
        ...names.map((name) =>
          Plot.line(ranked.filter((row) => row.name === name), {
            x: "x", y: "y", z: "z", stroke: colourOf(name), strokeWidth: 2.2, strokeDasharray: dash(name),
          }),
        ),
        Plot.dot(last, { x: "x", y: "y", r: 3, fill: (row) => colourOf(row.name) }),
        Plot.tip(shown, Plot.pointer({
          x: "x", y: "y", fill: "var(--surface)", stroke: "var(--line)",
          title: (row) => `${row.name}\n${curves.x}: ${plain(row.x)}\n${label}: ${plain(row.y)}`,
        })),
      ],
    });
    const keys = names.map((name) => line(colourOf(name), dash(name), name));
    if (random.length) keys.push(line("var(--dot)", "", "random orders"));
    if (level !== null) keys.push(line("var(--muted)", "2 3", "chance"));
    holder.replaceChildren(figure, make("p", { class: "legend" }, keys));
    figures.replaceChildren(figuresTable(curves, measure, scaled));
  }

  const controls = make(
    "div",
    { class: "controls" },
    select("Measure", curves.measures.map(({ name, label }) => [name, label]), measure, (value) => {
      measure = value;
      draw();
    }),
  );
  return make("div", { class: "part" }, make("h3", {}, curves.title), controls, drawn(holder, draw),
    make("details", {}, make("summary", {}, "In figures"), figures));
}

function line(stroke, dash, text) {
  const sample = d3.create("svg").attr("width", 26).attr("height", 8).attr("aria-hidden", "true");
  sample.append("line").attr("x2", 26).attr("y1", 4).attr("y2", 4).attr("stroke-width", 2.2)
    .attr("stroke-dasharray", dash).style("stroke", stroke);
  return make("span", { class: "swatch" }, sample.node(), text);
}

function figuresTable(curves, measure, scaled) {
  const xs = d3.sort(new Set(curves.series.flatMap((series) => series.x)));
  const shown = xs.length > 24 ? xs.filter((_, i) => i % Math.ceil(xs.length / 24) === 0) : xs;
  const value = (series, x) => {
    const i = series.x.indexOf(x);
    return i < 0 ? "" : plain(scaled(series.values[measure][i]));
  };
  const columns = [
    { title: curves.x, numeric: true, cell: (x) => plain(x) },
    ...curves.series.map((series) => ({ title: series.name, numeric: true, cell: (x) => value(series, x) })),
  ];
  return table(columns, shown);
}
