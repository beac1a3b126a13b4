// Keys to touch, for a screen without a keyboard.

import { $, element } from "./dom.js";
import { LAYOUTS, SYMBOLS } from "./layouts.js";

/** A phone has a keyboard of its own; on the board's screen nothing else would show one. */
export const HAS_KEYS = navigator.userAgentData?.mobile || /Android|iPhone|iPad/.test(navigator.userAgent);

export class Keyboard {
  constructor(ask) {
    this.ask = ask; this.upper = false; this.symbols = false;
    const language = navigator.language.slice(0, 2);
    this.language = language in LAYOUTS ? language : "en";
  }
  show(open) {
    $("keys").hidden = !open;
    $("board").setAttribute("aria-expanded", open);
    document.body.classList.toggle("typing", open);
    if (open) this.draw();
  }
  get open() { return !$("keys").hidden; }
  draw() {
    const rows = (this.symbols ? SYMBOLS : LAYOUTS[this.language].slice(1)).map(row => [...row].map(c => this.letter(c)));
    rows[2] = [this.key("⇧", "Shift", () => { this.upper = !this.upper; this.draw(); }, "half"), ...rows[2],
      this.key("⌫", "Delete", () => this.type(""), "half")];
    rows.push([this.key(this.symbols ? "abc" : "?12", this.symbols ? "abc: letters" : "?12: digits and signs", () => { this.symbols = !this.symbols; this.draw(); }, "half"),
      this.languages(), this.letter(","), this.key("space", "Space", () => this.type(" "), "wide"), this.letter("."), this.letter("?"),
      this.key("Ask", "", this.ask, "main half")]);
    rows[2][0].setAttribute("aria-pressed", this.upper);
    $("keys").replaceChildren(...rows.map(row => element("div", "", ...row)));
  }
  letter(c) { const shown = this.upper ? c.toLocaleUpperCase(this.language) : c; return this.key(shown, "", () => this.type(shown)); }
  key(face, name, does, kind = "") {
    const button = element("button", kind, face);
    button.type = "button";
    if (name) button.setAttribute("aria-label", name);
    button.onpointerdown = event => event.preventDefault();  // the field keeps the cursor
    button.onclick = does;
    return button;
  }
  languages() {
    const choice = element("select", "half", ...Object.entries(LAYOUTS).map(([code, [name]]) => new Option(`${code.toUpperCase()} ${name}`, code, false, code === this.language)));
    choice.setAttribute("aria-label", "The keyboard's language");
    choice.onchange = () => { this.language = choice.value; this.draw(); $("text").focus(); };
    return choice;
  }
  type(c) {  // at the cursor; nothing: takes away what is before it
    const field = $("text"), { selectionStart: from, selectionEnd: to } = field;
    const before = [...field.value.slice(0, from)].at(-1) || "";
    field.setRangeText(c, c || from < to ? from : from - before.length, to, "end");
    field.dispatchEvent(new Event("input"));
    if (this.upper && c) { this.upper = false; this.draw(); }
  }
}
