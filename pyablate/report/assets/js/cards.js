// Cards of a unit and of a class, in a dialog whose address is in the URL: #unit/..., #class/...

const unitHash = (unit) => `#unit/${encodeURIComponent(data.units.label[unit])}`;
const classHash = (k) => `#class/${k}`;
const MOST_ROWS = 40;

function openUnit(unit) {
  location.hash = unitHash(unit);
}

function openClass(k) {
  location.hash = classHash(k);
}

// Kind and name of the card that the URL names; a URL typed by hand may be no valid text.
function named() {
  const [kind, name = ""] = location.hash.slice(1).split("/");
  try {
    return [kind, decodeURIComponent(name)];
  } catch {
    return [];
  }
}

// Shows the card that the URL names, or none.
function followHash() {
  const [kind, name] = named();
  const dialog = byId("card");
  hideTip();
  if (kind === "unit") {
    const unit = data.units.label.indexOf(name);
    if (unit >= 0) return show(dialog, unitCard(unit));
  }
  if (kind === "class" && name in data.classes.name) return show(dialog, classCard(Number(name)));
  if (dialog.open) dialog.close();
}

function show(dialog, parts) {
  dialog.replaceChildren(...parts);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  dialog.querySelector("h2").focus();
  redraw();
}

function setUpCards() {
  const dialog = byId("card");
  dialog.addEventListener("close", () => {
    document.body.append(byId("tip"));
    hideTip();
    if (/^#(unit|class)\//.test(location.hash)) history.replaceState(null, "", "#");
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // a click beside the card
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, [role=application]")) return;
    const wayOf = { ArrowLeft: ".previous", ArrowRight: ".next" }[event.key];
    const link = wayOf && dialog.querySelector(`.cardbar ${wayOf}`);
    if (link) link.click();
  });
  window.addEventListener("hashchange", followHash);
}

function cardBar(kind, previous, next) {
  const link = (to, name, text, arrow) =>
    to === null ? null : make("a", { href: to, class: name, "aria-label": text, title: text }, arrow);
  return make(
    "div",
    { class: "cardbar" },
    make("span", { class: "kind" }, kind),
    link(previous, "previous", "Previous", "\u2190"),
    link(next, "next", "Next", "\u2192"),
    button("Close", () => byId("card").close(), { class: "quiet" }),
  );
}

function cardTitle(text) {
  return make("h2", { id: "card-title", tabindex: "-1" }, text);
}

function part(title, ...content) {
  return make("section", { class: "part" }, make("h3", {}, title), content);
}

function unitCard(unit) {
  const units = data.units;
  const order = tableOrder.includes(unit) ? tableOrder : d3.range(unitCount());
  const at = order.indexOf(unit);
  const layer = d3.range(unitCount()).filter((other) => units.layer[other] === units.layer[unit]);
  const rank = 1 + layer.filter((other) => units.max_class_drop[other] > units.max_class_drop[unit]).length;
  const worst = units.max_class[unit];
  return [
    cardBar(
      "Unit",
      at > 0 ? unitHash(order[at - 1]) : null,
      at < order.length - 1 ? unitHash(order[at + 1]) : null,
    ),
    cardTitle(units.label[unit]),
    make("p", { class: "note" }, `${layerName(unit)}: number ${count(rank)} of ${count(layer.length)} by largest class drop`),
    make(
      "div",
      { class: "tiles" },
      tile(points(units.max_class_drop[unit]), "largest class drop", [classLink(worst), `, q ${chance(units.q[unit])}`]),
      ...(estimated() ? [] : [
        tile(points(units.noise_floor[unit]), "noise floor", "the same for a harmless unit"),
        tile(points(units.split_half_drop[unit]), "split-half class drop"),
      ]),
      tile(signedPoints(units.accuracy_drop[unit]), `${score()} drop`,
        estimated() ? `\u00b1 ${points(units.half_width[unit])}, 95 %` : null),
      tile(count(units.flips[unit]), "changed predictions", `of ${count(data.summary.images)}`),
    ),
    part("Classes hurt and helped", ...classesOf(unit)),
    ...(estimated() ? [] : [part("Change of the confusion matrix", ...confusionOf(unit))]),
    ...pictureParts(unit),
    ...(data.attributes ? [part("Attributes", attributesOf(unit, layer))] : []),
    ...(data.attributes && data.attributes.cells && data.attributes.cells.name.length
      ? [part("Classes predicted and measured", ...predictedOf(unit))] : []),
  ];
}

function classesOf(unit) {
  const changed = d3.range(classCount()).filter((k) => data.cells.lost[cell(unit, k)] + data.cells.gained[cell(unit, k)]);
  if (!changed.length) return [make("p", { class: "note" }, "No class changes.")];
  const sorted = d3.sort(changed, (k) => -classDrop(unit, k));
  const half = MOST_ROWS / 2;
  const rows = sorted.length > MOST_ROWS ? [...sorted.slice(0, half), ...sorted.slice(-half)] : sorted;
  const parts = [testTable("Class", classLink, rows.map((k) => [unit, k]))];
  const left = sorted.length - rows.length;
  if (left) parts.push(make("p", { class: "note" }, `${count(left)} classes between these are left out.`));
  return parts;
}

// Drop and tests of (unit, class) pairs; the first column names one of the two.
function testTable(title, link, pairs) {
  const extreme = d3.max(pairs, ([unit, k]) => Math.abs(classDrop(unit, k))) || 1;
  const columns = [
    { title, cell: ([unit, k]) => link(title === "Class" ? k : unit) },
    { title: "Drop", numeric: true, cell: ([unit, k]) => signedPoints(classDrop(unit, k)) },
    ...(estimated()
      ? [{ title: "\u00b1", numeric: true, hint: "half of the 95 % interval", cell: ([unit, k]) => points(data.cells.half_width[cell(unit, k)]) }]
      : []),
    { title: "", cell: ([unit, k]) => bar(classDrop(unit, k) / extreme) },
    { title: "Lost", numeric: true, hint: "right to wrong", cell: ([unit, k]) => count(data.cells.lost[cell(unit, k)]) },
    { title: "Gained", numeric: true, hint: "wrong to right", cell: ([unit, k]) => count(data.cells.gained[cell(unit, k)]) },
    { title: "p", numeric: true, hint: "exact McNemar test", cell: ([unit, k]) => chance(data.cells.p[cell(unit, k)]) },
    { title: "q", numeric: true, hint: "Benjamini-Hochberg over the layer", cell: ([unit, k]) => chance(data.cells.q[cell(unit, k)]) },
    {
      title: "", cell: ([unit, k]) =>
        isSignificant(unit, k) ? make("span", { class: classDrop(unit, k) < 0 ? "mark help" : "mark",
          title: `q \u2264 ${data.fdr}` }, "more than chance") : "",
    },
  ];
  return table(columns, pairs);
}

function movesOf(unit) {
  const { start, label, before, after, count: number } = data.moves;
  return d3.range(start[unit], start[unit + 1]).map((i) => ({
    label: label[i], before: before[i], after: after[i], number: number[i],
  }));
}

function confusionOf(unit) {
  const moves = movesOf(unit);
  if (!moves.length) return [make("p", { class: "note" }, "No prediction changes.")];
  const missing = data.moves.total[unit] - moves.length;
  const involved = d3.sort(new Set(moves.flatMap((move) => [move.label, move.before, move.after])));
  const parts = [];
  if (involved.length <= 14 && !missing) parts.push(changeMatrix(moves, involved));
  const listed = moves.slice(0, 12);
  parts.push(
    table(
      [
        { title: "True class", cell: (move) => classLink(move.label) },
        { title: "Before", cell: (move) => predicted(move.before, move.label) },
        { title: "After", cell: (move) => predicted(move.after, move.label) },
        { title: "Images", numeric: true, cell: (move) => count(move.number) },
      ],
      listed,
    ),
  );
  const left = data.moves.total[unit] - listed.length;
  if (left > 0) parts.push(make("p", { class: "note" }, `The ${listed.length} most frequent of ${count(data.moves.total[unit])} kinds of change.`));
  return parts;
}

function predicted(k, label) {
  return k === label ? make("span", { class: "right" }, `${className(k)} \u2713`) : className(k);
}

function changeMatrix(moves, involved) {
  const place = new Map(involved.map((k, i) => [k, i]));
  const change = involved.map(() => involved.map(() => 0));
  for (const move of moves) {
    change[place.get(move.label)][place.get(move.before)] -= move.number;
    change[place.get(move.label)][place.get(move.after)] += move.number;
  }
  const extreme = d3.max(change.flat(), Math.abs) || 1;
  const cellOf = (value, i, j) => {
    const harm = i === j ? value < 0 : value > 0;
    const strength = Math.round(12 + 58 * Math.sqrt(Math.abs(value) / extreme));
    const background = value ? `color-mix(in srgb, var(--${harm ? "harm" : "help"}) ${strength}%, transparent)` : "";
    const text = value ? minus(d3.format("+,d")(value).replace("\u2212", "-")) : "\u00b7";
    return make("td", { class: i === j ? "cell diagonal" : "cell", style: { background } }, text);
  };
  const head = involved.map((k) => make("th", { scope: "col" }, make("span", {}, className(k))));
  const body = involved.map((k, i) =>
    make("tr", {}, make("th", { scope: "row" }, className(k)), change[i].map((value, j) => cellOf(value, i, j))),
  );
  const corner = make("td", { class: "corner" }, "true \\ predicted");
  return scrolling(
    make("table", { class: "matrix" }, make("thead", {}, make("tr", {}, corner, head)), make("tbody", {}, body)),
  );
}

function attributesOf(unit, layer) {
  const { name, formula, values } = data.attributes;
  const rows = name.map((text, i) => {
    const value = values[i][unit];
    const known = layer.filter((other) => Number.isFinite(values[i][other]));
    const below = known.filter((other) => values[i][other] < value).length;
    const equal = known.filter((other) => values[i][other] === value).length;
    const share = Number.isFinite(value) && known.length > 1 ? (below + (equal - 1) / 2) / (known.length - 1) : NaN;
    return { text, formula: formula[i], value, share };
  });
  const columns = [
    { title: "Attribute", cell: (row) => make("span", { title: row.formula || null }, row.text) },
    { title: "Value", numeric: true, cell: (row) => plain(row.value) },
    {
      title: "Among the layer", hint: "share of the layer's units with a smaller value",
      cell: (row) => Number.isFinite(row.share)
        ? make("span", { class: "meter" },
            make("span", { class: "track", "aria-hidden": "true" }, make("i", { style: { left: `${100 * row.share}%` } })),
            `${Math.round(100 * row.share)} %`)
        : "\u2013",
    },
  ];
  return table(columns, rows);
}

// What attributes say of each class beside what it loses; the three largest of each are bold.
function predictedOf(unit) {
  const { name, formula, values, within } = data.attributes.cells;
  const present = presentClasses();
  const drops = (k) => classDrop(unit, k);
  const valueOf = (i, k) => values[i][cell(unit, k)];
  const leading = (score, most) =>
    d3.sort(present.filter((k) => Number.isFinite(score(k))), (k) => -score(k)).slice(0, most);
  const top = name.map((_, i) => new Set(leading((k) => valueOf(i, k), 3)));
  const few = present.length <= MOST_ROWS;
  const shown = few ? present : [...new Set([...leading(drops, MOST_ROWS / 2), ...top.flatMap((some) => [...some])])];
  const columns = [
    { title: "Class", cell: (k) => classLink(k) },
    { title: "Drop", numeric: true, hint: "measured", cell: (k) => signedPoints(drops(k)) },
    ...name.map((text, i) => ({
      title: text, numeric: true, hint: formula[i] || null,
      cell: (k) => (top[i].has(k) ? make("b", {}, plain(valueOf(i, k))) : plain(valueOf(i, k))),
    })),
  ];
  const agreeing = name.map((text, i) => `${text} ${Number.isFinite(within[i][unit]) ? correlation(within[i][unit]) : "\u2013"}`);
  return [
    table(columns, d3.sort(shown, (k) => -drops(k))),
    make("p", { class: "note" }, `Rank correlation with the drops over the classes: ${agreeing.join(", ")}.`),
    few ? null : make("p", { class: "note" }, `${count(present.length - shown.length)} classes with smaller drops are left out.`),
  ].filter(Boolean);
}

function pictureParts(unit) {
  const { start, image, after, activating, relevant, heat, shown, pictures } = data.examples;
  const place = (number) => d3.bisectLeft(shown, number);
  const facts = (number) => ({
    label: data.examples.label[place(number)],
    before: data.examples.before[place(number)],
  });
  const figure = (number, lines) => {
    const picture = pictures[number]
      ? make("img", { src: pictures[number], alt: `image ${number}` })
      : make("span", { class: "nopicture" }, `#${number}`);
    return make("figure", { title: `image ${number}` }, picture, make("figcaption", {}, lines));
  };
  const parts = [];
  const flips = d3.range(start[unit], start[unit + 1]);
  if (flips.length) {
    const cards = flips.map((i) => {
      const { label, before } = facts(image[i]);
      return figure(image[i], [
        make("b", {}, className(label)), make("br"), predicted(before, label), " \u2192 ", predicted(after[i], label),
      ]);
    });
    const all = flipsNote(unit, flips.length);
    parts.push(part("Images that flip", make("div", { class: "figures" }, cards), all));
  }
  const rows = [["Images that activate it most", activating], ["Images for which it is most relevant", relevant]];
  for (const [title, images] of rows) {
    if (!images) continue;
    const wide = images.length / unitCount();
    const numbers = Array.from(images.slice(unit * wide, (unit + 1) * wide)).filter((number) => number >= 0);
    if (numbers.length) {
      const cards = numbers.map((number, rank) => {
        const where = images === relevant && heat[`${data.units.label[unit]}/${rank}`];
        const map = where ? make("img", { src: where, alt: "where it is relevant: red for the class, blue against it" }) : null;
        return figure(number, [make("b", {}, className(facts(number).label)), map]);
      });
      parts.push(part(title, make("div", { class: "figures" }, cards)));
    }
  }
  return parts;
}

function flipsNote(unit, shown) {
  const all = data.units.flips[unit];
  const text = all > shown ? `${shown} of ${count(all)}, images lost from the most hurt class first.` : "";
  return text ? make("p", { class: "note" }, text) : null;
}

function classCard(k) {
  const images = data.classes.size[k];
  const present = presentClasses();
  const before = present.filter((other) => other < k).at(-1);
  const after = present.find((other) => other > k);
  const top = cardBar("Class", ...[before, after].map((other) => (other === undefined ? null : classHash(other))));
  if (!images)
    return [top, cardTitle(className(k)), make("p", { class: "note" }, "The data have no image of this class.")];
  const all = d3.range(unitCount());
  const drops = Float64Array.from(all, (unit) => classDrop(unit, k));
  const found = all.filter((unit) => isSignificant(unit, k));
  const hurt = found.filter((unit) => drops[unit] > 0).length;
  const ranked = fallingOrder(all, drops).filter((unit) => drops[unit] > 0).slice(0, 20);
  const holder = pointsHolder("Drop of the class for every unit, one row for each layer");
  const draw = () =>
    drawRows(holder, drops, null, (unit) => isSignificant(unit, k),
      (mark) => {
        const at = cell(mark.unit, k);
        return [
          data.units.label[mark.unit],
          `drop ${signedPoints(drops[mark.unit])} points`,
          `lost ${count(data.cells.lost[at])}, gained ${count(data.cells.gained[at])}, q ${chance(data.cells.q[at])}`,
        ];
      },
      `Drop of the class ${score()} (percentage points)`);
  return [
    top,
    cardTitle(className(k)),
    make(
      "div",
      { class: "tiles" },
      tile(percent(data.classes.accuracy[k]), `${score()} of the intact network`, `${count(images)} images`),
      tile(points(d3.max(drops)), "largest drop by one unit"),
      tile(count(hurt), "units hurt it", `more than chance, q \u2264 ${data.fdr}`),
      tile(count(found.length - hurt), "units help when ablated"),
    ),
    ...(data.sets[k] ? [part(data.sets[k].reached === false ? "No minimal set found" : "Minimal set", ...minimalSet(data.sets[k]))] : []),
    part("Most important units", ranked.length
      ? testTable("Unit", unitLink, ranked.map((unit) => [unit, k]))
      : make("p", { class: "note" }, "No unit hurts this class.")),
    part("All units", drawn(holder, draw)),
  ];
}

function minimalSet(set) {
  if (!set.units.length) return [make("p", {}, "The class is at chance before any unit is removed.")];
  const place = new Map(data.units.label.map((label, unit) => [label, unit]));
  const links = set.units.map((label) => (place.has(label) ? unitLink(place.get(label)) : label));
  const said = set.reached === false ? "Chance was not reached. The units that harmed the class most of those tried: " : "Without these units the class is lost: ";
  const figures = [];
  if (set.baseline_accuracy !== null && set.accuracy !== null)
    figures.push(`accuracy of the class ${percent(set.baseline_accuracy)} \u2192 ${percent(set.accuracy)}`);
  if (set.others_drop !== null) figures.push(`drop of all other images ${signedPoints(set.others_drop)} points`);
  return [
    make("p", {}, said, links.flatMap((link, i) => (i ? [", ", link] : [link])), "."),
    figures.length ? make("p", { class: "note" }, `${figures.join("; ")} (measured on images that did not choose the set).`) : null,
  ].filter(Boolean);
}
