// Schedules: when runs begin by themselves.

import { call } from "./api.js";
import { button, el } from "./dom.js";
import { plural, when } from "./words.js";

const KINDS = {
  cron: { label: "At set times", field: "Cron expression", value: "0 3 * * *", hint: "Minute, hour, day of the month, month, day of the week: 0 3 * * * is every day at 3:00." },
  every: { label: "Every so often", field: "Interval", value: "6h", hint: "A number and s, m, h or d: 30m, 6h, 1d." },
  votes: { label: "After so many votes", field: "New votes", value: "500", hint: "A run begins when so many have been cast since the last one that this began." },
};

export function says(schedule) {
  if (schedule.kind === "cron") return `${schedule.cron} (${schedule.timezone})`;
  if (schedule.kind === "every") return `every ${schedule.every}`;
  return `after ${plural(schedule.votes, "new vote")}`;
}

export function scheduleList(board, { onEdit, onPause, onRemove }) {
  return el(
    "ul",
    { class: "rows" },
    board.schedules.map((schedule) => {
      const name = says(schedule);
      const act = (label, does, more = {}) =>
        button(label, () => does(schedule), { class: "quiet", "data-key": `${label} ${schedule.id}`, "aria-label": `${label} the schedule ${name}`, ...more });
      const next = schedule.kind === "votes" ? `${schedule.new_votes.toLocaleString("en")} of them so far` : ["next ", when(schedule.next_due_at)];
      return el(
        "li",
        {},
        schedule.paused && el("span", { class: "pill" }, "paused"),
        el(
          "div",
          { class: "grow" },
          el("p", {}, el("strong", {}, name)),
          el("p", { class: "hint" }, schedule.paused ? "Nothing is due until you resume it." : next, schedule.last_due_at ? [" · last came due ", when(schedule.last_due_at)] : ""),
          schedule.problem && el("p", { class: "bad" }, schedule.problem),
        ),
        el("div", { class: "row tight" }, act(schedule.paused ? "Resume" : "Pause", onPause), act("Edit", onEdit), act("Remove", onRemove)),
      );
    }),
  );
}

/** Ask for a schedule, or for what one is to be; resolves to it once the service has taken it, or to null. */
export function askForSchedule(schedule = null) {
  return new Promise((resolve) => {
    let taken = null;
    const kind = el("select", { id: "schedule-kind" }, Object.entries(KINDS).map(([name, { label }]) => el("option", { value: name }, label)));
    const label = el("label", { for: "schedule-value" });
    const value = el("input", { id: "schedule-value", required: true, autocomplete: "off", spellcheck: "false", "aria-describedby": "schedule-hint" });
    const hint = el("p", { class: "hint", id: "schedule-hint" });
    const zone = el("input", { id: "schedule-zone", autocomplete: "off", spellcheck: "false", required: true });
    const zoneField = el("div", {}, el("label", { for: "schedule-zone" }, "Time zone"), zone);
    const problem = el("p", { class: "bad", role: "alert" });
    const change = () => {
      const chosen = KINDS[kind.value];
      label.textContent = chosen.field;
      hint.textContent = chosen.hint;
      value.value = schedule?.kind === kind.value ? schedule[kind.value] : chosen.value;
      value.inputMode = kind.value === "votes" ? "numeric" : "text";
      zoneField.hidden = zone.disabled = kind.value !== "cron";
    };
    kind.value = schedule?.kind ?? "cron";
    zone.value = schedule?.timezone ?? Intl.DateTimeFormat().resolvedOptions().timeZone;
    kind.addEventListener("change", change);
    change();

    const save = async (event) => {
      event.preventDefault();
      const count = Number(value.value);
      const body = { [kind.value]: kind.value === "votes" && Number.isInteger(count) ? count : value.value };
      if (kind.value === "cron") body.timezone = zone.value;
      problem.textContent = "";
      try {
        taken = await (schedule ? call("PATCH", `/v1/schedules/${schedule.id}`, body) : call("POST", "/v1/schedules", body));
        dialog.close();
      } catch (error) {
        problem.textContent = error.message;
        value.focus();
      }
    };
    const dialog = el(
      "dialog",
      { class: "ask", "aria-labelledby": "schedule-title" },
      el(
        "form",
        { class: "fields", onsubmit: save, novalidate: true },
        el("h2", { id: "schedule-title" }, schedule ? "Change the schedule" : "Add a schedule"),
        el("div", {}, el("label", { for: "schedule-kind" }, "A run begins"), kind),
        el("div", {}, label, value, hint),
        zoneField,
        problem,
        el("div", { class: "row" }, button("Cancel", () => dialog.close()), el("button", { class: "strong", type: "submit" }, schedule ? "Save" : "Add")),
      ),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(taken);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
