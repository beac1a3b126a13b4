// The drawer: how the machine is doing, in plain words.

import { $, element } from "./dom.js";
import { plot } from "./plot.js";

const MOST_POINTS = 60, EVERY = 2;  // seconds between two looks at the temperature
const past = { speed: [], card: [], hits: [], heat: [] };
const MODEL = { name: "The model", context: "It remembers at most", memory: "Memory in use", "neurons in RAM": "Of the model in memory" };
let lastSeen = "", last = null;

function keep(series, value) { series.push(value); if (series.length > MOST_POINTS) series.shift(); }

function figure(name, value, picture = null) {
  const text = element("dd", "", value);
  if (picture) text.append(picture);
  return element("div", "", element("dt", "", name), text);
}

function answers(name, series, unit) {
  const ago = series.length - 1;
  return ago > 0 ? plot(name, series, unit, `${ago} ${ago === 1 ? "answer" : "answers"} ago`, "the last answer") : null;
}

function heat() {
  const seconds = EVERY * (past.heat.length - 1);
  return seconds > 0 ? plot("Temperature", past.heat, "°C", `${seconds} s ago`, "now") : null;
}

/** Takes what the machine says of itself, and shows it. */
export function showStatus(status) {
  const seen = JSON.stringify(status.last);
  if (status.last.decode_tokens_per_second && seen !== lastSeen) {  // a decision writes nothing: it has no speed
    lastSeen = seen; last = status.last;
    keep(past.speed, last.decode_tokens_per_second);
    keep(past.card, last.card_bytes_per_token / 1048576);
    keep(past.hits, 100 * last.window_hit_rate);
  }
  if (status.temperature !== null) keep(past.heat, status.temperature);
  if (!$("drawer").open) return;
  const cells = [];
  if (last) cells.push(
    figure("How fast it writes", `${last.decode_tokens_per_second.toFixed(2)} tokens a second; a token is a short word or a part of one`, answers("Speed", past.speed, "tokens a second")),
    figure("Its first token came after", `${last.first_token_seconds.toFixed(1)} seconds`),
    figure("Read from the card for each token", `${(last.card_bytes_per_token / 1048576).toFixed(1)} MiB`, answers("Card", past.card, "MiB a token")),
    figure("Found in memory, so not read", `${(100 * last.window_hit_rate).toFixed(0)} %`, answers("Found in memory", past.hits, "%")));
  if (status.temperature !== null) cells.push(figure("Temperature of the processor", `${status.temperature.toFixed(0)} °C`, heat()));
  cells.push(figure("Is it slowed down?", { true: "yes: it is too hot, or its power supply is too weak", false: "no" }[status.throttled] || "the board does not say"));
  for (const [name, value] of Object.entries(status.model)) cells.push(figure(MODEL[name] || name, value));
  $("figures").replaceChildren(...cells);
}
