// What happens on the machine, as it happens: its state, and every job.

const COME_AGAIN = 3000;  // milliseconds, if the machine has no place for another page

export class Feed {
  /** phase(name, notice) is told the state and what is to be read at once; each job's happenings go to job(told, about), about being all that is known of it. */
  constructor(phase, job) {
    this.phase = phase; this.job = job; this.jobs = new Map(); this.connected = false;
    this.open();
  }
  open() {
    const source = new EventSource("api/events");
    source.onmessage = event => this.heard(JSON.parse(event.data));
    source.onopen = () => { this.connected = true; this.jobs.clear(); };
    source.onerror = () => {
      this.connected = false;
      this.phase(null);
      if (source.readyState === EventSource.CLOSED) setTimeout(() => this.open(), COME_AGAIN);
    };
  }
  heard(told) {
    if (told.kind === "phase") { this.phase(told.phase, told.notice || ""); return; }
    const about = this.of(told.job);
    if (told.kind === "asked") Object.assign(about, { who: told.who, asked: told.asked || "" });
    else if (told.kind === "queued" || told.kind === "moved") about.position = told.position || 0;
    else if (told.kind === "started") Object.assign(about, { started: true, restarted: false });
    else if (told.kind === "progress") Object.assign(about, { started: true, done: told.done || 0, total: told.total, card: (told.card_bytes || 0) >> 20 });
    else if (told.kind === "text") about.speaks = true;
    else if (told.kind === "restarted") Object.assign(about, { started: false, restarted: true, speaks: false, total: 0 });
    else if (told.kind === "ended") this.jobs.delete(told.job);
    this.job(told, about);
  }
  /** What is known of a job. */
  of(number) {
    if (!this.jobs.has(number)) this.jobs.set(number, { number, who: "", asked: "", position: 0, started: false, total: 0 });
    return this.jobs.get(number);
  }
}
