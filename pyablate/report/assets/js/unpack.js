// The data of the page: JSON in which arrays are compressed, see pyablate/report/packed.py.

const ARRAYS = { Uint8Array, Uint16Array, Uint32Array, Int32Array, Float32Array };

async function unpackArray({ type, gzip }) {
  const bytes = Uint8Array.from(atob(gzip), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new ARRAYS[type](await new Response(stream).arrayBuffer());
}

async function unpack(node) {
  if (node === null || typeof node !== "object") return node;
  if (Array.isArray(node)) return Promise.all(node.map(unpack));
  if ("gzip" in node && "shape" in node) return unpackArray(node);
  const entries = Object.entries(node).map(async ([name, value]) => [name, await unpack(value)]);
  return Object.fromEntries(await Promise.all(entries));
}

// Everything that the sections read; filled once by main.js.
let data;

const unitCount = () => data.units.label.length;
const classCount = () => data.classes.name.length;
// Accuracy, or agreement where there are no labels.
const score = () => data.summary.word;
// Numbers of the classes that have images.
const presentClasses = () => d3.range(classCount()).filter((k) => data.classes.size[k]);
const estimated = () => data.summary.guarantee === "estimated";
const titled = (text) => text[0].toUpperCase() + text.slice(1);
const cell = (unit, k) => unit * classCount() + k;
const layerName = (unit) => data.layers[data.units.layer[unit]].name;
const className = (k) => (k < 0 ? "none" : data.classes.name[k]); // logits NaN or infinite

// Accuracy drop of one class; NaN for a class without images.
function classDrop(unit, k) {
  const at = cell(unit, k);
  return (data.cells.lost[at] - data.cells.gained[at]) / (data.classes.size[k] || NaN);
}

const isSignificant = (unit, k) => data.cells.q[cell(unit, k)] <= data.fdr;

// What a unit can be sorted and coloured by: [name, text, numbers].
function unitFigures() {
  const units = data.units;
  const figures = [
    ["max_class_drop", "Largest class drop", units.max_class_drop],
    ["accuracy_drop", titled(`${score()} drop`), units.accuracy_drop],
    ...(estimated() ? [] : [["split_half_drop", "Split-half class drop", units.split_half_drop]]),
    ["flips", "Changed predictions", units.flips],
    ...Object.entries(units.measures).map(([name, values]) => [name, spaced(name), values]),
  ];
  const attributes = data.attributes
    ? data.attributes.name.map((name, i) => [`attribute:${name}`, name, data.attributes.values[i]])
    : [];
  return { figures, attributes };
}

const spaced = (name) => name.replaceAll("_", " ");

function unitFigure(name) {
  const { figures, attributes } = unitFigures();
  return [...figures, ...attributes].find((figure) => figure[0] === name)[2];
}

function figureChoices() {
  const { figures, attributes } = unitFigures();
  const choices = figures.map(([name, text]) => [name, text]);
  if (attributes.length) choices.push(["Attributes", attributes.map(([name, text]) => [name, text])]);
  return choices;
}

// Units by falling numbers, NaN last, equal ones in the order of the network.
function fallingOrder(units, numbers) {
  const known = (unit) => (Number.isNaN(numbers[unit]) ? -Infinity : numbers[unit]);
  return units.slice().sort((a, b) => known(b) - known(a) || a - b);
}
