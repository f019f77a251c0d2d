// Numbers as text. Drops are shares in the data and percentage points on the page.

const minus = (text) => text.replace("-", "\u2212");
// Whole, but of an estimated run.
const count = (number) => minus(number.toLocaleString("en", { maximumFractionDigits: 1 }));
const points = (share) => (Number.isFinite(share) ? minus((100 * share).toFixed(2)) : "\u2013");
const percent = (share) => (Number.isFinite(share) ? `${(100 * share).toFixed(2)} %` : "\u2013");

function signedPoints(share) {
  return share > 0 ? `+${points(share)}` : points(share);
}

function chance(p) {
  if (!Number.isFinite(p)) return "\u2013";
  if (p < 1e-4) return "< 0.0001";
  return p >= 0.9995 ? "1" : p.toPrecision(2);
}

function plain(number) {
  if (number === null || !Number.isFinite(number)) return "\u2013";
  const size = Math.abs(number);
  if (Number.isInteger(number) && size < 1e7) return minus(count(number));
  return minus(size !== 0 && (size < 1e-3 || size >= 1e5) ? number.toExponential(2) : number.toPrecision(4));
}

const correlation = (r) => (r > 0 ? "+" : "") + minus(r.toFixed(2));
