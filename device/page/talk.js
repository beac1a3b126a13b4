// The talk: what this page asked, and what the machine's own triggers asked, in the order in which it came.

import { render } from "./answer.js";
import { $, element } from "./dom.js";
import { decision, ending, failure, Refused, waiting } from "./words.js";

const MOST_SHOWN = 40, NEAR_THE_END = 80;  // turns, pixels

/** One question and its answer. */
export class Turn {
  constructor(who, asked) {
    this.text = ""; this.since = Date.now(); this.live = true; this.about = () => undefined;
    this.answer = element("div", "answer live");
    this.note = element("p", "note");
    this.done = element("ul", "did");
    this.box = element("article", "turn", element("p", "asked", element("b", "", `${who}: `), asked), this.done, this.answer, this.note);
    this.box.setAttribute("aria-busy", "true");
    this.tick();
    append(this.box);
  }
  say(piece) {
    this.text += piece;
    this.drawn ??= requestAnimationFrame(() => { this.drawn = null; this.draw(); });
  }
  draw() { follow(() => { render(this.answer, this.text); if (this.live) this.tick(); }); }
  /** What the machine did for the answer, in words. */
  did(words) { follow(() => this.done.append(element("li", "", words))); }
  restart() { this.text = ""; this.draw(); }
  /** What is told every half second until the first word comes. */
  tick() {
    const seconds = Math.floor((Date.now() - this.since) / 1000);
    this.note.textContent = this.text ? "" : waiting(this.about() || {}, seconds);
  }
  end(note = "", small = "", bad = false) {
    if (!this.live) return;
    this.live = false;
    this.answer.classList.remove("live");
    this.box.removeAttribute("aria-busy");
    follow(() => {
      render(this.answer, this.text);
      this.note.textContent = note;
      this.note.classList.toggle("bad", bad);
      if (small) this.note.append(element("small", "", small));
    });
  }
  /** A button that has a cut answer go on. */
  offer(goOn) {
    const button = element("button", "on", "Go on");
    button.type = "button";
    button.onclick = () => { button.remove(); goOn(); };
    follow(() => this.box.append(button));
  }
}

/** The turns of the machine's triggers, by job. */
export class Overheard {
  constructor() { this.turns = new Map(); }
  heard(told, about) {
    if (told.kind === "asked" && told.asked) {
      const turn = this.turns.get(told.job) || new Turn(told.who, told.asked);
      turn.about = () => about;
      this.turns.set(told.job, turn);
    }
    const turn = this.turns.get(told.job);
    if (!turn) return;
    if (told.kind === "text" && told.text) turn.say(told.text);
    else if (told.kind === "did") turn.did(told.text);
    else if (told.kind === "restarted") turn.restart();
    else if (told.kind === "ended") this.ended(turn, told);
    else turn.tick();
  }
  ended(turn, told) {
    this.turns.delete(told.job);
    turn.text = told.text || "";
    const parts = [decision(turn.text, told.probabilities || {}), told.driven, told.cut ? "The answer was cut short." : "", ending(told.state)];
    turn.end(parts.filter(part => part).join(" "), "", told.state === "failed" || told.state === "expired");
  }
  tick() { for (const turn of this.turns.values()) turn.tick(); }
  /** The machine has stopped: what it was asked is kept, and told again when it is back. */
  lost() { for (const turn of this.turns.values()) turn.restart(); }
}

function append(box) {
  const talk = $("talk");
  follow(() => talk.append(box));
  while (talk.children.length > MOST_SHOWN) talk.firstElementChild.remove();
}

/** Does something to the talk, and stays at its end if that was in sight. */
function follow(change) {
  const main = $("main"), follows = main.scrollTop + main.clientHeight > main.scrollHeight - NEAR_THE_END;
  change();
  if (follows) main.scrollTop = main.scrollHeight;
}

// --- asking

/** Asks, and shows the answer in `turn` as it comes. Gives the text and whether it was cut; raises what went wrong. */
export async function ask(turn, messages, signal, accepted) {
  const reply = await fetch("v1/chat/completions", { method: "POST", signal,
    body: JSON.stringify({ model: "flashd", stream: true, priority: 6, forget: true, board_tools: true, messages }) });
  if (!reply.ok) throw new Refused(reply.status, (await reply.json()).error.message);
  accepted(Number(reply.headers.get("X-Job")));
  let cut = false;
  for await (const line of lines(reply.body)) {
    if (line === "data: [DONE]") return { text: turn.text, cut };
    if (!line.startsWith("data: ")) continue;
    const event = JSON.parse(line.slice(6));
    if (event.error) throw new Refused(event.error.type, event.error.message);
    if (event.flashd?.did) turn.did(event.flashd.did);
    for (const choice of event.choices) {
      turn.say(choice.delta.content || "");
      cut ||= choice.finish_reason === "length";
    }
  }
  throw new TypeError("the answer broke off");
}

export function failed(turn, error) {
  if (error.name === "AbortError") turn.end("You stopped it.");
  else turn.end(...failure(error), true);
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts.filter(part => part);
  }
}
