// How the board says when, who and how.

import { el } from "./dom.js";

const UNITS = [
  [86_400, "day"],
  [3_600, "hour"],
  [60, "minute"],
];
const RELATIVE = new Intl.RelativeTimeFormat("en", { numeric: "always" });
const EXACT = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const DAY = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", timeZone: "UTC" });

const ACTORS = { clock: "The clock", cli: "The command line", trial: "A trial", watch: "The watch over a new policy", trainer: "The trainer" };
const ACTS = {
  "key.create": "made a key",
  "key.revoke": "revoked a key",
  "policy.promote": "promoted",
  "rater.confirm": "left out the votes of",
  "rater.release": "released the votes of",
  "rater.reconsider": "left to the next run the votes of",
  "run.cancel": "cancelled",
  "run.request": "asked for",
  "run.resume": "begins again, as",
  "schedule.create": "added a schedule",
  "schedule.edit": "changed a schedule",
  "schedule.join": "came due during",
  "schedule.pause": "paused a schedule",
  "schedule.remove": "removed a schedule",
  "schedule.resume": "resumed a schedule",
  "trusted.import": "imported trusted pairs",
  "user.forget": "had a user forgotten",
};

/** "3 minutes ago", with the exact time beside it. */
export function when(at) {
  if (!at) return "–";
  const moment = new Date(at);
  return el("time", { datetime: at, title: EXACT.format(moment) }, relative((moment - Date.now()) / 1000));
}

function relative(seconds) {
  for (const [length, unit] of UNITS) {
    if (Math.abs(seconds) >= length) return RELATIVE.format(Math.trunc(seconds / length), unit);
  }
  return seconds > 0 ? "in a moment" : "just now";
}

export const exactly = (at) => EXACT.format(new Date(at));
export const dayOf = (day) => DAY.format(new Date(`${day}T12:00:00Z`));

/** "4 min 12 s" between two moments. */
export function took(from, to) {
  if (!from) return null;
  const seconds = Math.max(0, Math.round((new Date(to ?? Date.now()) - new Date(from)) / 1000));
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min ${seconds % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** Who acted: an operator by the label of their key, a schedule, or a part of the service. */
export function who(actor, board) {
  if (ACTORS[actor]) return ACTORS[actor];
  if (board.operators[actor]) return board.operators[actor];
  return actor.startsWith("sched_") ? "A schedule" : actor;
}

export const did = (action) => ACTS[action] ?? action;

export const plural = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
