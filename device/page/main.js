// The page: brings its parts together.

import { showJobs, showPhase } from "./band.js";
import { showBoard } from "./board.js";
import { $, element } from "./dom.js";
import { showStatus } from "./drawer.js";
import { Feed } from "./feed.js";
import { HAS_KEYS, Keyboard } from "./keyboard.js";
import { ask, failed, Overheard, Turn } from "./talk.js";

const MOST_TURNS = 64, LEFT_ALONE = 180_000, LOOK = 2000, TICK = 500;  // messages, milliseconds
const GO_ON = "Go on.";
let messages = [], shown = [], running = null, known = "", muted = false, board = false, touched = Date.now();

const overheard = new Overheard();
const feed = new Feed(
  (phase, notice) => { showPhase(phase, notice); if (phase === null) overheard.lost(); },
  (told, about) => {
    overheard.heard(told, about);
    drawJobs();
  });
const keyboard = new Keyboard(() => send($("text").value));

function drawJobs() { showJobs(feed.jobs, running?.job); }

function busy() {
  const on = !!running;
  $("stop").hidden = !on; $("ask").hidden = on; $("again").hidden = on || !shown.length;
  $("presets").hidden = !!shown.length;
  document.querySelectorAll("#presets button, .on").forEach(button => { button.disabled = on; });
}

async function send(text, goesOn = false) {
  if (!text.trim() || running) return;
  const turn = new Turn(goesOn ? "You, again" : "You", text);
  running = { stop: new AbortController(), job: null, turn };
  shown.push(turn);
  if (!goesOn) { $("text").value = ""; grow(); }
  keyboard.show(false);
  document.querySelectorAll(".on").forEach(button => button.remove());
  busy();
  $("main").scrollTop = $("main").scrollHeight;
  try {
    const asked = [...messages, { role: "user", content: text }];
    const { text: answer, cut } = await ask(turn, asked, running.stop.signal, job => { running.job = job; turn.about = () => feed.jobs.get(job); });
    messages = [...asked, { role: "assistant", content: answer }];
    if (messages.length > MOST_TURNS) messages.splice(0, MOST_TURNS / 2);
    turn.end(cut ? "The answer was cut short." : "");
    if (cut) turn.offer(() => send(GO_ON, true));
  } catch (error) { failed(turn, error); }
  running = null; touched = Date.now();
  busy();
}

function forget() {  // whoever comes next begins anew
  running?.stop.abort();
  shown.forEach(turn => turn.box.remove());
  messages = []; shown = []; $("text").value = ""; grow();
  busy();
}

function grow() {  // the field is as high as what is written in it
  const field = $("text");
  field.style.height = "";
  if (field.value) field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

function preset(text) {
  const button = element("button", "", text);
  button.type = "button";
  button.onclick = () => send(text);
  return button;
}

function sense([name, value]) { return element("li", "", `${name.replaceAll("_", " ")} `, element("b", "", value)); }

async function look() {
  try {
    const reply = await fetch("api/status");
    if (reply.status === 401) { location.reload(); return; }  // on the local network: the PIN is asked for again
    const status = await reply.json();
    muted = status.muted;
    if (!feed.connected) showPhase(status.phase);
    $("title").textContent = document.title = status.title;
    $("mute").textContent = muted ? "Unmute" : "Mute";
    $("senses").replaceChildren(...Object.entries(status.sensors).map(sense));
    const presets = JSON.stringify(status.presets);
    if (presets !== known) { known = presets; $("presets").replaceChildren(...status.presets.map(preset)); busy(); }
    if (status.demo && !board) { board = true; showBoard(); }
    showStatus(status);
  } catch { showPhase(null); }
  if (!running && shown.length && Date.now() - touched > LEFT_ALONE) forget();
}

$("form").onsubmit = event => { event.preventDefault(); send($("text").value); };
$("text").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send($("text").value); }
};
$("text").oninput = grow;
if (!HAS_KEYS) {
  $("text").inputMode = "none";  // no second keyboard beside ours
  $("text").onclick = event => { if (event.pointerType === "touch") keyboard.show(true); };
}
$("board").onclick = () => { keyboard.show(!keyboard.open); $("text").focus(); };
$("stop").onclick = () => running?.stop.abort();
$("again").onclick = forget;
$("more").onclick = () => { $("drawer").showModal(); look(); };
$("shut").onclick = () => $("drawer").close();
$("mute").onclick = async () => { await fetch(`api/mute/${muted ? "off" : "on"}`, { method: "POST" }).catch(() => {}); look(); };
document.addEventListener("keydown", event => { if (event.key === "Escape" && !$("drawer").open) running?.stop.abort(); });
for (const kind of ["pointerdown", "keydown"]) document.addEventListener(kind, () => { touched = Date.now(); });

look();
setInterval(look, LOOK);
setInterval(() => { overheard.tick(); if (running) running.turn.tick(); }, TICK);
