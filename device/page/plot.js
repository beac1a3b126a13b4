// Small plots with axes that say what they show.

const WIDTH = 320, HEIGHT = 120, LEFT = 46, RIGHT = 310, TOP = 20, BOTTOM = 96;

/** The next of 1, 2, 5, 10, ... that is not below a value. */
function above(value) {
  const ten = 10 ** Math.floor(Math.log10(value || 1));
  return [1, 2, 5, 10].map(n => n * ten).find(n => n >= value);
}

function drawn(name, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/** A line through `values`, from zero, or less, up to a round number; `from` and `to` say what the ends of the other axis are. */
export function plot(name, values, unit, from, to) {
  const low = Math.min(...values, 0) && -above(-Math.min(...values)), top = above(Math.max(...values, 0));
  const last = values.at(-1);
  const x = i => LEFT + (RIGHT - LEFT) * (values.length > 1 ? i / (values.length - 1) : 1);
  const y = v => BOTTOM - (BOTTOM - TOP) * (v - low) / (top - low);
  const svg = drawn("svg", { class: "plot", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": `${name}: ${values.length} values, ${from} to ${to}, the last ${round(last)} ${unit}` });
  svg.append(
    drawn("path", { class: "axis", d: `M${LEFT} ${TOP}V${BOTTOM}H${RIGHT}` }),
    drawn("text", { x: LEFT - 5, y: TOP + 5, "text-anchor": "end" }, round(top)),
    drawn("text", { x: LEFT - 5, y: BOTTOM, "text-anchor": "end" }, round(low)),
    drawn("text", { x: LEFT + 6, y: TOP - 8 }, unit),
    drawn("text", { x: LEFT, y: HEIGHT - 8 }, from),
    drawn("text", { x: RIGHT, y: HEIGHT - 8, "text-anchor": "end" }, to),
    drawn("polyline", { points: values.map((v, i) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`).join(" ") }),
    drawn("circle", { cx: x(values.length - 1), cy: y(last), r: 3.5 }));
  return svg;
}

export function round(value) { return String(Number(value.toPrecision(value >= 100 ? 3 : 2))); }
