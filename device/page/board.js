// The demo's board: what is on its pins, drawn as it is, with buttons to press.

import { $, element } from "./dom.js";

const TICK = 500;
const TOUCHES = { button: [["Press", "press"], ["Hold", "hold"]], door: [["Open", "press"]], motion: [["Move", "press"]] };
let shown = [];

function lamp() {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  for (const [kind, r] of [["glow", 11], ["bulb", 7]]) {
    const circle = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    for (const [name, value] of Object.entries({ class: kind, cx: 12, cy: 12, r })) circle.setAttribute(name, value);
    svg.append(circle);
  }
  return svg;
}

function touch(part, name, how) {
  const button = element("button", "", name);
  button.type = "button";
  button.setAttribute("aria-label", `${name} ${part.label}`);
  button.onclick = async () => {
    button.disabled = true;
    await fetch(`demo/${how}/${part.pin}`, { method: "POST" }).catch(() => {});
    button.disabled = false;
  };
  return button;
}

function made(part) {
  const word = element("b"), box = element("li", `part ${part.role}`, lamp(), element("span", "", `${part.label} `, word));
  for (const [name, how] of TOUCHES[part.role] || []) box.append(touch(part, name, how));
  return { pin: part.pin, box, word };
}

function draw(one, part) {
  Object.assign(one, { part, at: Date.now() });
  one.box.dataset.on = part.on;
  tell(one);
}

function tell({ word, part, at }) {
  const of = part.on && part.most ? ` of ${part.most}` : "";
  const seconds = Math.min(part.seconds + (Date.now() - at) / 1000, of ? part.most : Infinity);
  word.textContent = `${part.word}, ${seconds < 10 ? seconds.toFixed(1) : seconds.toFixed(0)}${of} s`;
}

/** Shows the board from now on. */
export function showBoard() {
  const source = new EventSource("demo/board");
  source.onmessage = event => {
    const parts = JSON.parse(event.data);
    if (String(shown.map(one => one.pin)) !== String(parts.map(part => part.pin))) {
      shown = parts.map(made);
      $("parts").replaceChildren(...shown.map(one => one.box));
    }
    shown.forEach((one, i) => draw(one, parts[i]));
  };
  setInterval(() => shown.forEach(tell), TICK);
}
