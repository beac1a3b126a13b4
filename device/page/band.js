// The band across the top: what the machine does, to be seen from two metres.

import { $ } from "./dom.js";
import { STATES } from "./words.js";

export function showPhase(phase, notice = "") {
  const name = phase in STATES ? phase : "loading";
  document.body.dataset.phase = name;
  if ($("state").textContent !== STATES[name]) $("state").textContent = STATES[name];
  if ($("notice").textContent !== notice) $("notice").textContent = notice;
}

/** The line below the state, and the bar, from all jobs that are under way. */
export function showJobs(jobs, own) {
  const running = [...jobs.values()].filter(job => job.started), waiting = jobs.size - running.length;
  const first = running[0];
  const parts = [];
  if (first) parts.push(first.number === own ? "your question" : first.who);
  if (waiting) parts.push(`${waiting} waiting`);
  $("doing").textContent = parts.join(", ");
  const reading = running.find(job => !job.speaks);
  $("bar").hidden = !reading;
  if (reading?.total) {
    $("bar").setAttribute("aria-valuemax", reading.total);
    $("bar").setAttribute("aria-valuenow", reading.done);
    $("bar").style.setProperty("--share", reading.done / reading.total);
  } else $("bar").removeAttribute("aria-valuenow");
}
