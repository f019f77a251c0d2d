// Units x classes on a canvas: sorted, zoomed, and read cell by cell with pointer or keys.

const HEAT = { top: 22, bottom: 8, right: 2 };
const WIDEST_UNIT = 22; // pixels, at the closest zoom
const TALLEST_CLASS = 24;
const HEIGHT = 600; // pixels of the map, where there are many classes
const FEW_CLASSES = 30; // up to these all classes stay in view while units are zoomed

function heatmapSection() {
  const first = unitCount() > 6000 ? 0 : -1;
  const state = { layer: first, units: "network", byLayer: true, classes: "given", only: false, cursor: null };
  const canvas = make("canvas", { "aria-hidden": "true" });
  const legend = make("div", { class: "legend" });
  const holder = make(
    "div",
    {
      class: "chart heat",
      tabindex: "0",
      role: "application",
      "aria-label":
        "Heat map of units and classes. Arrow keys move from cell to cell, with Shift by ten. Enter " +
        "opens the unit, c opens the class, plus and minus zoom, 0 shows everything.",
    },
    canvas,
  );
  const map = heatmap(holder, canvas, legend, state);
  const set = (name) => (value) => {
    state[name] = name === "layer" ? Number(value) : value;
    map.arrange();
  };
  const layers = [[-1, "All"], ...data.layers.map((layer, i) => [i, layer.name])];
  const unitOrders = [["network", "Network order"], ["cluster", "Cluster (units that harm alike)"], ...figureChoices()];
  const classOrders = [
    ["given", "Given order"],
    ["harm", "Mean drop"],
    ["accuracy", titled(score())],
    ["cluster", "Cluster (hurt by the same units)"],
    ["name", "Name"],
  ];
  const controls = make(
    "div",
    { class: "controls" },
    select("Layer", layers, state.layer, set("layer")),
    select("Sort units by", unitOrders, state.units, set("units")),
    select("Sort classes by", classOrders, state.classes, set("classes")),
    checkbox("Within layers", true, set("byLayer")),
    checkbox("Only more than chance", false, set("only")),
    make(
      "span",
      { class: "group", role: "group", "aria-label": "Zoom" },
      button("\u2212", () => map.zoom(1 / 2), { "aria-label": "Zoom out" }),
      button("+", () => map.zoom(2), { "aria-label": "Zoom in" }),
      button("All", () => map.reset(), { "aria-label": "Show everything" }),
    ),
  );
  const note = make(
    "p",
    { class: "note" },
    "Columns are units, rows are classes. Zoom with the buttons, by pinching, or with Ctrl and the wheel; " +
      "drag to move; click a cell for its unit, a name for its class. Where several units or classes share a " +
      "pixel the largest change is drawn.",
  );
  return [controls, drawn(holder, map.draw), legend, note];
}

// Order of the columns and where their layers begin: [[column, layer], ...].
function arrangedUnits(state) {
  let units = d3.range(unitCount());
  if (state.layer >= 0) units = units.filter((unit) => data.units.layer[unit] === state.layer);
  if (state.units === "cluster") units.sort((a, b) => data.units.position[a] - data.units.position[b] || a - b);
  else if (state.units !== "network") units = fallingOrder(units, unitFigure(state.units));
  const apart = state.byLayer || state.units === "network" || state.units === "cluster";
  if (!apart) return { units, starts: [] };
  units = d3.sort(units, (unit) => data.units.layer[unit]);
  const starts = [];
  units.forEach((unit, column) => {
    const layer = data.units.layer[unit];
    if (!starts.length || starts.at(-1)[1] !== layer) starts.push([column, layer]);
  });
  return { units, starts };
}

function arrangedClasses(state, units) {
  const classes = presentClasses();
  const { accuracy, position, name } = data.classes;
  const harm = (k) => d3.mean(units, (unit) => classDrop(unit, k));
  if (state.classes === "harm") return d3.sort(classes, (k) => -harm(k));
  if (state.classes === "accuracy") return d3.sort(classes, (k) => accuracy[k]);
  if (state.classes === "cluster") return d3.sort(classes, (k) => position[k]);
  if (state.classes === "name") return classes.sort((a, b) => name[a].localeCompare(name[b]));
  return classes;
}

function heatmap(holder, canvas, legend, state) {
  const context = canvas.getContext("2d");
  const extreme = largestDrop();
  const behaviour = d3.zoom().filter(wanted).on("zoom", moved);
  const buffer = document.createElement("canvas");
  let columns = [];
  let starts = [];
  let rows = [];
  let size = { width: 0, height: 0, left: 0 };
  let transform = d3.zoomIdentity;
  let palette = null;

  // The wheel scrolls the page unless the map has been entered.
  function wanted(event) {
    if (event.type === "wheel") return event.ctrlKey || event.metaKey || holder === document.activeElement;
    return !event.button;
  }

  function arrange() {
    ({ units: columns, starts } = arrangedUnits(state));
    rows = arrangedClasses(state, columns);
    transform = d3.zoomIdentity;
    state.cursor = null;
    if (holder.isConnected) draw();
  }

  function measure() {
    const width = holder.clientWidth;
    context.font = "12px system-ui, sans-serif";
    const longest = d3.max(rows, (k) => context.measureText(className(k)).width) || 0;
    const left = Math.round(Math.min(longest + 14, width < 560 ? 96 : 170));
    const each = Math.max(3, Math.min(TALLEST_CLASS, Math.round(420 / rows.length)));
    size = { width: width - left - HEAT.right, height: Math.min(each * rows.length, HEIGHT), left };
    const ratio = window.devicePixelRatio || 1;
    const height = size.height + HEAT.top + HEAT.bottom;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const tallest = rows.length > FEW_CLASSES ? (TALLEST_CLASS * rows.length) / size.height : 1;
    const closest = Math.max(1, tallest, (WIDEST_UNIT * columns.length) / size.width);
    behaviour
      .scaleExtent([1, closest])
      .extent([[0, 0], [size.width, size.height]])
      .translateExtent([[0, 0], [size.width, size.height]]);
  }

  const x = () => along(columns.length, size.width, WIDEST_UNIT, transform.x);
  const y = () => along(rows.length, size.height, rows.length > FEW_CLASSES ? TALLEST_CLASS : 0, transform.y);

  // Where cells lie in one direction. Past the largest cells only the other direction grows, and
  // the part in view keeps its place.
  function along(number, length, largest, moved) {
    const k = Math.min(transform.k, Math.max(1, (largest * number) / length));
    const shift = k > 1 ? (moved * (1 - k)) / (1 - transform.k) : 0;
    return d3.zoomIdentity.translate(shift, 0).scale(k).rescaleX(d3.scaleLinear([0, number], [0, length]));
  }

  function draw() {
    measure();
    palette = heatPalette();
    canvas.__zoom = transform;
    drawLegend(legend, palette, extreme);
    paint();
  }

  function paint() {
    const { width, height, left } = size;
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!columns.length) return;
    context.save();
    context.translate(left, HEAT.top);
    context.beginPath();
    context.rect(0, 0, width, height);
    context.clip();
    context.fillStyle = colour("surface");
    context.fillRect(0, 0, width, height);
    paintCells();
    context.restore();
    paintNames();
    paintCursor();
    context.strokeStyle = colour("line");
    context.strokeRect(left + 0.5, HEAT.top + 0.5, width - 1, height - 1);
  }

  // Cells in view, several to a pixel joined to the one that changes most.
  function paintCells() {
    const [sx, sy] = [x(), y()];
    const perColumn = Math.max(1, Math.ceil(1 / (sx(1) - sx(0))));
    const perRow = Math.max(1, Math.ceil(1 / (sy(1) - sy(0))));
    const from = Math.floor(Math.max(0, sx.invert(0)) / perColumn) * perColumn;
    const to = Math.min(columns.length, Math.ceil(sx.invert(size.width)));
    const top = Math.floor(Math.max(0, sy.invert(0)) / perRow) * perRow;
    const end = Math.min(rows.length, Math.ceil(sy.invert(size.height)));
    const across = Math.ceil((to - from) / perColumn);
    const down = Math.ceil((end - top) / perRow);
    if (across < 1 || down < 1) return;
    buffer.width = across;
    buffer.height = down;
    const image = buffer.getContext("2d").createImageData(across, down);
    const pixels = new Uint32Array(image.data.buffer);
    for (let j = 0; j < down; j++)
      for (let i = 0; i < across; i++) {
        const drop = strongest(from + i * perColumn, perColumn, top + j * perRow, perRow);
        pixels[j * across + i] = palette.at(drop / extreme);
      }
    buffer.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    const box = [sx(from), sy(top), sx(from + across * perColumn) - sx(from), sy(top + down * perRow) - sy(top)];
    context.drawImage(buffer, ...box);
    if (sy(1) - sy(0) < 10) return;
    context.fillStyle = colour("surface");
    for (let row = top + 1; row < end; row++) context.fillRect(0, Math.round(sy(row)) - 1, size.width, 1);
  }

  function strongest(column, wide, row, tall) {
    let found = NaN;
    const lastColumn = Math.min(column + wide, columns.length);
    const lastRow = Math.min(row + tall, rows.length);
    for (let r = row; r < lastRow; r++)
      for (let c = column; c < lastColumn; c++) {
        const drop = shownDrop(columns[c], rows[r]);
        if (Number.isNaN(found) || Math.abs(drop) > Math.abs(found)) found = drop;
      }
    return found;
  }

  function shownDrop(unit, k) {
    return state.only && !isSignificant(unit, k) ? 0 : classDrop(unit, k);
  }

  function paintNames() {
    const { width, height, left } = size;
    const [sx, sy] = [x(), y()];
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = colour("text");
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(13 / (sy(1) - sy(0)));
    for (let r = 0; r < rows.length; r += every) {
      const at = sy(r + 0.5);
      if (at < 4 || at > height - 4) continue;
      context.fillText(fitted(className(rows[r]), left - 12), left - 7, HEAT.top + at);
    }
    context.textAlign = "left";
    let free = -Infinity;
    for (const [column, layer] of starts) {
      const at = sx(column);
      if (at >= 0 && at <= width && column > 0) {
        context.fillStyle = colour("muted");
        context.fillRect(left + at - 0.5, HEAT.top - 4, 1, height + 4);
      }
      const next = starts.find(([other]) => other > column);
      const end = Math.min(width, next ? sx(next[0]) : width);
      const begin = Math.max(0, at);
      const name = fitted(data.layers[layer].name, end - begin - 6);
      if (end - begin < 18 || begin < free || name.length < 3) continue;
      context.fillStyle = colour("muted");
      context.fillText(name, left + begin + 3, HEAT.top - 11);
      free = begin + context.measureText(name).width + 6;
    }
  }

  function fitted(text, room) {
    if (context.measureText(text).width <= room) return text;
    let length = text.length;
    while (length > 1 && context.measureText(`${text.slice(0, length)}\u2026`).width > room) length--;
    return `${text.slice(0, length)}\u2026`;
  }

  function paintCursor() {
    if (!state.cursor) return;
    const [sx, sy] = [x(), y()];
    const { column, row } = state.cursor;
    const wide = Math.max(3, sx(column + 1) - sx(column));
    const tall = Math.max(3, sy(row + 1) - sy(row));
    context.strokeStyle = colour("text");
    context.lineWidth = 2;
    context.strokeRect(size.left + sx(column) - 1, HEAT.top + sy(row) - 1, wide + 2, tall + 2);
    context.lineWidth = 1;
  }

  function moved(event) {
    transform = event.transform;
    paint();
  }

  // Which cell is under the pointer; among those that share a pixel the one that is drawn.
  function under(event) {
    const [px, py] = d3.pointer(event, canvas);
    const [sx, sy] = [x(), y()];
    const row = Math.floor(sy.invert(py - HEAT.top));
    if (row < 0 || row >= rows.length || py < HEAT.top || py > HEAT.top + size.height) return null;
    if (px < size.left) return { row, column: null };
    const sharing = (scale, at, number) => {
      const together = Math.max(1, Math.ceil(1 / (scale(1) - scale(0))));
      const from = Math.floor(scale.invert(at) / together) * together;
      return d3.range(Math.max(0, from), Math.min(from + together, number));
    };
    const cells = d3.cross(sharing(sy, py - HEAT.top, rows.length), sharing(sx, px - size.left, columns.length));
    const drawn = d3.greatest(cells, ([r, c]) => Math.abs(shownDrop(columns[c], rows[r])));
    return drawn === undefined ? null : { row: drawn[0], column: drawn[1] };
  }

  function lines({ column, row }) {
    const [unit, k] = [columns[column], rows[row]];
    const at = cell(unit, k);
    return [
      `${data.units.label[unit]} \u00b7 ${className(k)}`,
      `drop ${signedPoints(classDrop(unit, k))} points`,
      `lost ${count(data.cells.lost[at])}, gained ${count(data.cells.gained[at])} of ${count(data.classes.size[k])}`,
      `p ${chance(data.cells.p[at])}, q ${chance(data.cells.q[at])}`,
    ];
  }

  function zoom(factor, around) {
    const at = around || [size.width / 2, size.height / 2];
    const k = Math.max(1, Math.min(behaviour.scaleExtent()[1], transform.k * factor));
    const [px, py] = transform.invert(at);
    const wantedView = d3.zoomIdentity.translate(at[0] - px * k, at[1] - py * k).scale(k);
    const box = [[0, 0], [size.width, size.height]];
    transform = behaviour.constrain()(wantedView, box, box);
    canvas.__zoom = transform;
    paint();
  }

  function moveCursor(dx, dy) {
    const at = state.cursor || { column: -Math.sign(dx), row: 0 };
    const column = Math.max(0, Math.min(columns.length - 1, at.column + dx));
    const row = Math.max(0, Math.min(rows.length - 1, at.row + dy));
    state.cursor = { column, row };
    reveal(column, row);
    paint();
    const text = lines(state.cursor);
    const box = canvas.getBoundingClientRect();
    showTip(text, box.left + size.left + x()(column), box.top + HEAT.top + y()(row));
    announce(text.join(". "));
  }

  // Moves the view so that a cell lies inside.
  function reveal(column, row) {
    const [sx, sy] = [x(), y()];
    const dx = sx(column) < 0 ? -sx(column) : Math.min(0, size.width - sx(column + 1));
    const dy = sy(row) < 0 ? -sy(row) : Math.min(0, size.height - sy(row + 1));
    if (!dx && !dy) return;
    // How far the whole map moves where one direction has grown less than the other.
    const whole = (by, scale, number, length) => {
      const k = ((scale(1) - scale(0)) * number) / length;
      return by && k > 1 ? (by * (1 - transform.k)) / (1 - k) : 0;
    };
    const right = whole(dx, sx, columns.length, size.width);
    const down = whole(dy, sy, rows.length, size.height);
    const box = [[0, 0], [size.width, size.height]];
    transform = behaviour.constrain()(transform.translate(right / transform.k, down / transform.k), box, box);
    canvas.__zoom = transform;
  }

  function pressed(event) {
    const far = event.shiftKey ? 10 : 1;
    const moves = { ArrowRight: [far, 0], ArrowLeft: [-far, 0], ArrowDown: [0, far], ArrowUp: [0, -far] };
    const centre = state.cursor && [x()(state.cursor.column + 0.5), y()(state.cursor.row + 0.5)];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves) moveCursor(...moves[event.key]);
    else if (event.key === "Home") moveCursor(-columns.length, 0);
    else if (event.key === "End") moveCursor(columns.length, 0);
    else if (event.key === "+" || event.key === "=") zoom(2, centre);
    else if (event.key === "-") zoom(1 / 2, centre);
    else if (event.key === "0") reset();
    else if (event.key === "Enter" && state.cursor) openUnit(columns[state.cursor.column]);
    else if (event.key === "c" && state.cursor) openClass(rows[state.cursor.row]);
    else return;
    event.preventDefault();
  }

  function reset() {
    zoom(0);
  }

  d3.select(canvas).call(behaviour).on("dblclick.zoom", null);
  canvas.addEventListener("pointermove", (event) => {
    const at = under(event);
    canvas.style.cursor = at ? "pointer" : "default";
    if (!at || at.column === null || event.buttons) hideTip();
    else showTip(lines(at), event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", (event) => {
    const at = under(event);
    if (!at) return;
    holder.focus({ preventScroll: true });
    if (at.column === null) openClass(rows[at.row]);
    else openUnit(columns[at.column]);
  });
  holder.addEventListener("keydown", pressed);
  holder.addEventListener("blur", hideTip);
  arrange();
  return { draw, arrange, zoom, reset };
}

function largestDrop() {
  let largest = 0;
  for (let unit = 0; unit < unitCount(); unit++)
    for (let k = 0; k < classCount(); k++) {
      const drop = Math.abs(classDrop(unit, k));
      if (drop > largest) largest = drop;
    }
  return largest || 1;
}

// Colours from the most helped (-1) over 0 to the most hurt (1), by the root of the size.
function heatPalette() {
  const names = ["help-2", "help-1", "surface", "harm-1", "harm-2"];
  const blend = d3.piecewise(d3.interpolateLab, names.map(colour));
  const words = (rgb) => ((255 << 24) | (rgb.b << 16) | (rgb.g << 8) | rgb.r) >>> 0;
  const steps = d3.range(513).map((i) => d3.rgb(blend(i / 512)));
  const table = Uint32Array.from(steps, words);
  const place = (t) => 0.5 + 0.5 * Math.sign(t) * Math.sqrt(Math.min(1, Math.abs(t)));
  return {
    at: (t) => table[Math.round(512 * place(t))],
    css: (t) => String(steps[Math.round(512 * place(t))]),
  };
}

function drawLegend(holder, palette, extreme) {
  const values = [-1, -0.25, -0.05, 0, 0.05, 0.25, 1];
  const boxes = values.map((t) =>
    make(
      "span",
      { class: "step" },
      make("i", { style: { background: palette.css(t) } }),
      t === 0 ? "0" : signedPoints(t * extreme),
    ),
  );
  holder.replaceChildren(
    make("span", {}, `Drop of class ${score()} (points)`),
    make("span", { class: "steps" }, boxes),
  );
}
