// What the page says, in plain words.

export const STATES = {
  loading: "Starting", idle: "Ready", listening: "Listening", understanding: "Understanding", thinking: "Thinking", confirming: "Press the button?",
  answering: "Answering", error: "It failed", muted: "Muted",
};

const AGAIN = "The machine is starting again. Please ask once more in a moment.";
const BUSY = "Many questions are waiting. Please ask again in a moment.";
const LATE = "The answer took too long, so the machine stopped.";
const WHO = "The PIN is needed again.";
const BROKEN = "Something went wrong in the machine. Please ask again.";
const STARTED_ANEW = "Something more urgent came first. The machine begins this answer anew.";

export class Refused extends Error {
  constructor(kind, message) { super(message); this.kind = kind; }  // an HTTP status, or an event's type
}

/** A sentence for whoever asked, and what a technician would want to read. */
export function failure(error) {
  if (!(error instanceof Refused)) return [AGAIN, ""];
  if (error.kind === 401) return [WHO, ""];
  if (error.kind === 429) return [BUSY, error.message];
  if (error.kind === 503 || error.kind === "stopping") return [AGAIN, error.message];
  if (error.kind === "expired") return [LATE, error.message];
  if (error.kind === 400 || error.kind === "invalid_request_error") return ["The machine cannot answer this question.", error.message];
  return [BROKEN, error.message];
}

/** How a job of somebody else's ended, "" if it was answered. */
export function ending(state) {
  return { failed: BROKEN, expired: LATE, cancelled: "It was stopped." }[state] || "";
}

/** What happens before the first word. */
export function waiting(job, seconds) {
  let what = "Waiting";
  if (job.restarted) what = STARTED_ANEW;
  else if (job.total) what = `Reading: layer ${job.done} of ${job.total}${job.card ? `, ${job.card} MiB from the card` : ""}`;
  else if (job.started) what = "Reading";
  else if (job.position) what = `Waiting: ${job.position} ${job.position === 1 ? "question is" : "questions are"} before this one`;
  return `${what} · ${seconds} s`;
}

/** A decision: what the model was asked to choose from, and how sure it is. */
export function decision(answer, probabilities) {
  const shares = Object.entries(probabilities).map(([name, p]) => `${name} ${Math.round(100 * p)} %`);
  return shares.length ? `Decided: ${answer} (${shares.join(", ")}).` : "";
}
