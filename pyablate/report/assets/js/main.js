// The page from top to bottom: overview first, then zoom, then details on demand.

function summarySection() {
  const { summary, provenance } = data;
  const worst = d3.greatest(d3.range(unitCount()), (unit) => data.units.max_class_drop[unit]);
  const largest = d3.greatest(d3.range(unitCount()), (unit) => data.units.accuracy_drop[unit]);
  const pairs = unitCount() * summary.images;
  const audit = summary.audit;
  return [
    make("p", { class: "lead" },
      `${count(unitCount())} units of ${count(data.layers.length)} ${data.layers.length === 1 ? "layer" : "layers"}, ` +
        `each replaced by ${summary.intervention} alone, on ${count(summary.images)} images of ${classesSaid()}: ` +
        `${count(pairs)} predictions.`),
    summary.known ? make("p", { class: "note guarantee" }, `${titled(summary.guarantee)}: ${summary.known}.`) : null,
    make(
      "div",
      { class: "tiles" },
      tile(percent(summary.accuracy), `${score()} of the intact network`,
        score() === "agreement" ? "no labels: its predictions stand in" : null),
      tile(points(data.units.max_class_drop[worst]), "largest drop of a class (points)",
        [unitLink(worst), " hurts ", classLink(data.units.max_class[worst])]),
      tile(points(data.units.accuracy_drop[largest]), `largest drop of the ${score()} (points)`, unitLink(largest)),
      tile(count(data.units.q.filter((q) => q <= data.fdr).length), "units hurt a class more than chance",
        `${count(summary.hurt_pairs)} (unit, class) pairs stand out one by one`),
      tile(`${(100 * summary.flips / pairs).toPrecision(2)} %`, "of the predictions change", `${count(summary.flips)} flips`),
      tile(audit.pairs ? `${count(audit.mismatches)} of ${count(audit.pairs)}` : "none", "audited predictions differ",
        audit.pairs
          ? `at most ${(100 * audit.upper_bound).toPrecision(2)} % of all, at 95 %` + (audit.mended ? `; ${count(audit.mended)} differed at first and were mended` : "")
          : "the run was not audited"),
    ),
    make("details", { class: "provenance" },
      make("summary", {}, "Where this comes from"),
      make("dl", {}, provenance.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]))),
  ];
}

function classesSaid() {
  const present = presentClasses().length;
  const all = `${count(classCount())} classes`;
  return present < classCount() ? `${count(present)} of ${all}` : all;
}

function classesSection() {
  const all = d3.range(unitCount());
  const rows = presentClasses().map((k) => {
    const worst = d3.greatest(all, (unit) => classDrop(unit, k));
    const hurt = all.filter((unit) => isSignificant(unit, k) && classDrop(unit, k) > 0).length;
    return { k, worst, hurt, drop: classDrop(worst, k) };
  });
  const sets = data.sets.some((set) => set !== null);
  const extreme = d3.max(rows, (row) => row.drop) || 1;
  const columns = [
    { title: "Class", cell: (row) => classLink(row.k) },
    { title: "Images", numeric: true, cell: (row) => count(data.classes.size[row.k]) },
    { title: titled(score()), numeric: true, cell: (row) => percent(data.classes.accuracy[row.k]) },
    { title: "Largest drop", numeric: true, cell: (row) => points(row.drop) },
    { title: "", cell: (row) => bar(row.drop / extreme) },
    { title: "by unit", cell: (row) => unitLink(row.worst) },
    { title: "Units that hurt it", numeric: true, hint: `q <= ${data.fdr}`, cell: (row) => count(row.hurt) },
    ...(sets ? [{ title: "Minimal set", numeric: true, cell: (row) => setSize(data.sets[row.k]) }] : []),
  ];
  const shown = d3.sort(rows, (row) => -row.drop || 0);
  return [table(columns, shown, { id: "class-table" }, true), ...withoutImages()];
}

// A search that reached no set has tried some, which are none.
function setSize(set) {
  if (!set) return "\u2013";
  return set.reached === false ? "none found" : count(set.units.length);
}

function withoutImages() {
  const names = d3.range(classCount()).filter((k) => !data.classes.size[k]).map(className);
  if (!names.length) return [];
  const head = `${count(names.length)} ${names.length === 1 ? "class has" : "classes have"} no images in the data`;
  return [make("details", { id: "absent" }, make("summary", {}, head), make("p", { class: "note" }, names.join(", ")))];
}

function patternsSection() {
  const { layer, left, rows } = data.patterns;
  const spaced = (parts) => parts.flatMap((each, i) => (i ? [", ", each].flat() : [each].flat()));
  const unitOf = (label) => {
    const unit = data.units.label.indexOf(label);
    return unit < 0 ? label : unitLink(unit);
  };
  const columns = [
    { title: "Pattern", numeric: true, cell: (row) => count(rows.indexOf(row)) },
    { title: "Images", numeric: true, cell: (row) => count(row.size) },
    { title: "Prototype", numeric: true, hint: "image nearest to the mean", cell: (row) => `#${row.prototype}` },
    { title: "Classes", cell: (row) => spaced(row.classes.map(([k, share]) => [classLink(k), ` ${percent(share)}`])) },
    {
      title: "Units", hint: "mean of the pattern minus that of all images, in standard deviations",
      cell: (row) => spaced(row.units.map(([label, contrast]) => [unitOf(label), ` ${plain(contrast)}`])),
    },
  ];
  const note = `Groups of images that ${layer} responds to alike; ${count(left)} images are in none.`;
  return [make("p", { class: "note" }, note), table(columns, rows, { id: "pattern-table" }, true)];
}

function section(id, title, content) {
  return make("section", { id, "aria-labelledby": `${id}-title` }, make("h2", { id: `${id}-title` }, title), content);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `Switch to ${theme === "dark" ? "light" : "dark"} colours`);
  redraw();
}

function setUpTheme() {
  const prefers = window.matchMedia("(prefers-color-scheme: dark)");
  const preferred = () => (prefers.matches ? "dark" : "light");
  const now = () => document.documentElement.dataset.theme;
  setTheme(preferred());
  prefers.addEventListener("change", () => setTheme(preferred()));
  byId("theme").addEventListener("click", () => setTheme(now() === "dark" ? "light" : "dark"));
  let before = null;
  window.addEventListener("beforeprint", () => {
    before = now();
    setTheme("light");
  });
  window.addEventListener("afterprint", () => setTheme(before));
}

async function start() {
  setUpTheme();
  data = await unpack(JSON.parse(byId("data").textContent));
  const parts = [
    ["summary", "Summary", summarySection],
    ["layers", "Layers", layersSection],
    ["heatmap", "Units and classes", heatmapSection],
    ["units", "Units", unitsSection],
    ["classes", "Classes", classesSection],
  ];
  if (data.attributes) parts.push(["attributes", "Attributes", attributesSection]);
  if (data.patterns) parts.push(["patterns", "Activation patterns", patternsSection]);
  if (data.curves.length) parts.push(["curves", "Removing many units", curvesSection]);
  byId("sections").append(...parts.map(([id, title]) => make("a", { href: `#${id}` }, title)));
  byId("main").append(...parts.map(([id, title, content]) => section(id, title, content())));
  redraw();
  setUpCards();
  let waiting = 0;
  let width = document.documentElement.clientWidth;
  window.addEventListener("resize", () => {
    if (width === document.documentElement.clientWidth) return;
    width = document.documentElement.clientWidth;
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 120);
  });
  byId("main").setAttribute("aria-busy", "false");
  followHash();
}

start().catch((error) => {
  byId("main").append(make("p", { class: "note" }, `This report could not be drawn: ${error.message}`));
  throw error;
});
