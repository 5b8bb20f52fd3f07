// Raters: whose votes are left out and why, and the operator's word on it.

import { short } from "./chart.js";
import { button, el } from "./dom.js";
import { plural, when } from "./words.js";

export const nameOf = (rater) => rater.label || rater.key;

export function raterList(board, { onConfirm, onRelease, onReconsider }) {
  const { listed, total } = board.raters;
  if (!listed.length) return el("p", { class: "hint" }, "Nobody has voted yet.");
  return [
    el("ul", { class: "rows" }, listed.map((rater) => row(rater, { onConfirm, onRelease, onReconsider }))),
    total > listed.length && el("p", { class: "hint" }, `${plural(total - listed.length, "more rater")} with fewer votes: `, el("code", {}, "nightshift raters list"), "."),
  ];
}

function row(rater, { onConfirm, onRelease, onReconsider }) {
  const act = (label, does) =>
    button(label, () => does(rater), { class: "quiet", "data-key": `${label} ${rater.key}`, "aria-label": `${label} ${nameOf(rater)}` });
  const { quarantine } = rater;
  const ruled = quarantine === "confirmed" || quarantine === "released";
  const left = quarantine === "suspected" || quarantine === "confirmed";
  return el(
    "li",
    {},
    quarantine && el("span", { class: `pill ${quarantine}` }, left ? `left out${quarantine === "suspected" ? "?" : ""}` : quarantine),
    el(
      "div",
      { class: "grow" },
      el("p", {}, el("strong", {}, nameOf(rater)), ` · ${did(rater)}`),
      quarantine && el("p", { class: left ? "bad" : "hint" }, rater.reason),
      quarantine && el("p", { class: "hint" }, quarantine === "suspected" ? ["A run left the votes out ", when(rater.since), "; they stay on disk, and you decide."] : ["An operator's ruling, ", when(rater.ruled_at), "."]),
    ),
    el("div", { class: "row tight" }, quarantine !== "confirmed" && act("Leave out", onConfirm), left && act("Release", onRelease), ruled && act("Reconsider", onReconsider)),
  );
}

function did({ votes, first, second, gold, gold_right, reliability }) {
  const decisive = first + second;
  return [
    plural(votes, "vote"),
    decisive > 0 && `${Math.round((100 * first) / decisive)}% for the answer shown first`,
    reliability !== null && `reliability ${short(reliability)}`,
    gold > 0 && `${gold_right} of ${plural(gold, "gold question")} right`,
  ]
    .filter(Boolean)
    .join(", ");
}
