// Charts of units as points: pointer and arrow keys find one, click and Enter open its card.

const TICKS = [-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100];

// A scale for drops in points that shows both the many small and the few large ones.
function dropScale(values, label) {
  const low = Math.min(0, d3.min(values));
  const high = Math.max(1, d3.max(values));
  const domain = [1.1 * low - 0.15, 1.12 * high];
  const ticks = TICKS.filter((tick) => tick >= domain[0] && tick <= domain[1]);
  return { type: "symlog", constant: 1, domain, ticks, tickFormat: (tick) => minus(String(tick)), label };
}

// A scale for any numbers: logarithmic beyond small ones where one in fifty, or a single one, would
// take half of the axis.
function anyScale(values, label, ticks) {
  const sizes = d3.sort(values, Math.abs).map(Math.abs);
  const rest = sizes.at(-1 - Math.max(1, Math.floor(sizes.length / 50)));
  if (sizes.length < 8 || !(sizes.at(-1) > 2 * rest && rest > 0)) return { label, nice: true, ticks, labelArrow: "none" };
  const constant = 10 ** Math.floor(Math.log10(d3.median(sizes.filter((size) => size > 0))));
  const decades = Math.ceil(Math.log10(sizes.at(-1) / constant));
  const up = d3.range(decades + 1).flatMap((decade) =>
    (decades > 3 ? [1] : [1, 2, 5]).map((digit) => Number((digit * constant * 10 ** decade).toPrecision(1))),
  );
  const [low, high] = d3.extent(values);
  const shown = [...up.map((tick) => -tick), 0, ...up].filter((tick) => tick >= low && tick <= high);
  return {
    type: "symlog", constant, ticks: shown, tickFormat: (tick) => minus(d3.format("~g")(tick)),
    label: `${label}, logarithmic`, labelArrow: "none",
  };
}

// Puts a drawing of points {x, y, unit} into a holder that reacts to pointer and keys.
function pickable(holder, figure, marks, describe) {
  const x = figure.scale("x");
  const y = figure.scale("y");
  const placed = marks
    .map((mark) => ({ ...mark, px: x.apply(mark.x), py: y.apply(mark.y) }))
    .filter((mark) => Number.isFinite(mark.px) && Number.isFinite(mark.py));
  const tree = d3.quadtree(placed, (mark) => mark.px, (mark) => mark.py);
  const order = placed.map((_, i) => i).sort((a, b) => placed[a].px - placed[b].px);
  const rank = new Map(order.map((i, place) => [placed[i], place]));
  const ring = d3.select(figure).append("circle").attr("r", 6).attr("class", "ring").attr("opacity", 0);
  let current = null;

  function point(mark, spoken) {
    current = mark;
    ring.attr("opacity", mark ? 1 : 0);
    if (!mark) return hideTip();
    ring.attr("cx", mark.px).attr("cy", mark.py);
    const box = figure.getBoundingClientRect();
    const lines = describe(mark);
    showTip(lines, box.left + mark.px, box.top + mark.py);
    if (spoken) announce(lines.join(". "));
  }

  function nearest(event) {
    const [px, py] = d3.pointer(event, figure);
    return tree.find(px, py, 24) || null;
  }

  function step(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20 };
    const last = order.length - 1;
    let to;
    if (event.key in steps) to = current ? rank.get(current) + steps[event.key] : last;
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = last;
    else if (event.key === "Enter" && current) return openUnit(current.unit);
    else return;
    event.preventDefault();
    point(placed[order[Math.max(0, Math.min(last, to))]], true);
  }

  figure.addEventListener("pointermove", (event) => point(nearest(event)));
  figure.addEventListener("pointerleave", () => point(null));
  figure.addEventListener("click", (event) => {
    const mark = nearest(event);
    if (mark) openUnit(mark.unit);
  });
  holder.onkeydown = placed.length ? step : null;
  holder.onblur = () => point(null);
  holder.replaceChildren(figure);
}

function pointsHolder(label) {
  return make("div", {
    class: "chart points",
    tabindex: "0",
    role: "application",
    "aria-label": `${label}. Left and right arrow keys go from unit to unit, Enter opens its card.`,
  });
}
