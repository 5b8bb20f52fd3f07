// The policies: where each came from, what the gate and the people said of it, and pairs of answers to read.

import { showAll } from "./answer.js";
import { call } from "./api.js";
import { button, el } from "./dom.js";
import { percent, short } from "./chart.js";
import { exactly, plural, when, who } from "./words.js";

const STATUS = { rolled_back: "rolled back" };
const CHECKS = {
  judge: "Judge",
  kl: "KL",
  length_drift: "Length",
  unfinished: "Endings",
  repetition: "Repetition",
  reward_model: "Reward model",
  facts: "Facts",
  refusals: "Refusals",
  sycophancy: "Sycophancy",
};
const PAIRS = 20;

const pill = ({ status }) => el("span", { class: `pill ${status}` }, STATUS[status] ?? status);

/** The family tree, the latest first. The line that leads to what serves is straight; what led nowhere hangs off it. */
export function tree(board, shown, onShow) {
  const children = new Map();
  for (const policy of board.policies) children.set(policy.parent, [...(children.get(policy.parent) ?? []), policy]);
  const serving = board.policies.find((policy) => policy.status === "serving");
  const byName = new Map(board.policies.map((policy) => [policy.name, policy]));
  const line = new Set();
  for (let one = serving; one; one = byName.get(one.parent)) line.add(one.name);

  const item = (policy, branches) =>
    el(
      "li",
      { class: policy.status === "serving" ? "serving" : "" },
      button([el("span", {}, policy.name), pill(policy)], () => onShow(policy.name), {
        class: "node",
        "data-key": `policy ${policy.name}`,
        "aria-pressed": String(policy.name === shown),
      }),
      branches.length > 0 && el("ul", { "aria-label": `Made from ${policy.name}` }, branches.toReversed().flatMap(chain)),
    );
  /** The items of a policy and of the one after the other that took its place, the latest first. */
  const chain = (policy) => {
    const items = [];
    for (let one = policy; one; ) {
      const own = children.get(one.name) ?? [];
      const heir = own.find((child) => line.has(child.name)) ?? own.findLast((child) => children.has(child.name));
      items.unshift(item(one, own.filter((child) => child !== heir)));
      one = heir;
    }
    return items;
  };
  return el("ul", {}, (children.get(null) ?? []).flatMap(chain));
}

/** What is known of one policy, `whole` as GET /v1/policies/{name} answers it. */
export function detail(board, whole, { onPromote, onPairs }) {
  const failed = (whole.gate?.checks ?? []).filter((check) => !check.passed).length;
  const mayServe = !["serving", "promoted"].includes(whole.status) && (whole.gate === null || whole.gate.passed);
  const loads = board.pending === whole.name && whole.status === "promoted";
  return [
    el("div", { class: "sheet-head" }, el("h3", {}, whole.name, " ", pill(whole)), el(
      "div",
      { class: "row" },
      mayServe && button("Promote", () => onPromote(whole.name), { class: "strong", "data-key": "promote" }),
      button(`Read ${PAIRS} random pairs`, () => onPairs(whole.name), { "data-key": "pairs" }),
    )),
    el("p", { class: "hint" }, whole.parent ? "Made " : "Added ", when(whole.created_at), whole.parent ? ` from ${whole.parent}.` : "."),
    loads && el("p", { class: "said" }, "The engines are loading it; it serves as soon as all of them hold it."),
    whole.problem && el("p", { class: "failure" }, whole.problem),
    whole.gate
      ? el("h4", {}, failed ? `The gate turned it away: ${failed} of ${plural(whole.gate.checks.length, "check")} failed` : `The gate let it through: all ${whole.gate.checks.length} checks passed`)
      : el("p", {}, whole.parent ? "It never met the gate." : "The base model under an adapter that changes nothing: it never met the gate."),
    whole.gate && el("ul", { class: "checks" }, [...whole.gate.checks].sort((a, b) => a.passed - b.passed).map(check)),
    whole.duels.length > 0 && el("h4", {}, "What people said"),
    whole.duels.length > 0 && el("ul", { class: "plain-list" }, whole.duels.map((duel) => el("li", {}, duelSentence(duel)))),
    whole.swaps.length > 0 && el("h4", {}, "In and out of service"),
    whole.swaps.length > 0 && el("ul", { class: "plain-list" }, whole.swaps.map((swap) => el("li", {}, ...swapSentence(swap, board)))),
  ];
}

function check({ name, passed, sentence }) {
  return el(
    "li",
    { class: passed ? "passed" : "bad" },
    el("span", { class: "sign", "aria-hidden": "true" }, passed ? "✓" : "✗"),
    el("span", {}, el("strong", {}, `${CHECKS[name] ?? name} ${passed ? "passed" : "failed"}. `), sentence),
  );
}

export function duelSentence(duel) {
  const decisive = duel.wins + duel.losses;
  const figures = decisive
    ? `${duel.challenger} was preferred in ${percent(duel.wins / decisive)} of ${plural(decisive, "decisive vote")} (${percent(duel.rate_low)} to ${percent(duel.rate_high)}), with ${plural(duel.ties, "tie")}; E is ${short(duel.e_value)} of ${short(duel.threshold)}.`
    : duel.ties
      ? `no vote prefers ${duel.challenger} or ${duel.incumbent}, and ${plural(duel.ties, "is a tie", "are ties")}.`
      : `Nobody has voted on ${duel.challenger} yet.`;
  const name = duel.kind === "trial" ? "Trial" : "Watch";
  const end = {
    running: "It goes on.",
    won: `${duel.challenger} won.`,
    lost: `${duel.challenger} lost.`,
    undecided: "The votes were used up before anybody had won.",
    ended: `It was broken off: ${duel.reason}.`,
  }[duel.status];
  return `${name} of ${duel.challenger} against ${duel.incumbent}: ${figures} ${end}`;
}

function swapSentence(swap, board) {
  const by = swap.actor === "start" ? "" : ` (${who(swap.actor, board)}: ${swap.reason})`;
  if (!swap.flipped_at) return [`${swap.policy} was to serve `, when(swap.requested_at), by, swap.problem ? `: ${swap.problem}` : "."];
  const place = swap.replaced ? `${swap.policy} took the place of ${swap.replaced} ` : `${swap.policy} began to serve `;
  return [place, when(swap.flipped_at), by, "."];
}

/** Draw pairs of answers that the policy and another one gave to the same prompts, into `container`. Throws ApiError. */
export async function showPairs(container, name, { onAgain, onClose }) {
  const { data } = await call("GET", `/v1/policies/${encodeURIComponent(name)}/pairs?limit=${PAIRS}`);
  const again = button("Draw others", onAgain, { "data-key": "others" });
  const close = button("Close", onClose, { class: "quiet" });
  const title = el("h3", { tabindex: "-1" }, `What ${name} says beside the others`);
  const head = el("div", { class: "sheet-head" }, title, el("div", { class: "row" }, data.length > 0 && again, close));
  if (!data.length) {
    container.replaceChildren(head, el("p", { class: "hint" }, `Nobody has been shown ${name} beside another policy yet. Pairs come from its trial: they are drawn while people chat and the service asks.`));
  } else {
    const bodies = [];
    container.replaceChildren(
      head,
      el("p", { class: "hint" }, `${plural(data.length, "prompt")}, drawn by chance from its duels; the older policy is on the left.`),
      el("ol", { class: "read" }, data.map((pair) => pairItem(pair, name, bodies))),
    );
    showAll(bodies);
  }
  title.focus({ preventScroll: true });
  title.scrollIntoView({ block: "nearest" });
}

function pairItem(pair, name, bodies) {
  const text = ({ content }) => (typeof content === "string" ? content : (content ?? []).map((part) => part.text).join(""));
  const turns = pair.messages.map((message) => el("p", { class: "bubble", dir: "auto" }, text(message)));
  const earlier = turns.slice(0, -1);
  const card = (policy, answer, votes) => {
    const body = el("div", { class: "prose", dir: "auto" });
    bodies.push([answer, body]);
    return el("article", { class: "card", "aria-label": `Answer of ${policy}` }, el("h4", {}, policy, votes > 0 && el("span", { class: "pill passed" }, plural(votes, "vote"))), body);
  };
  const cards = [card(pair.against, pair.against_answer, pair.votes.against), card(name, pair.answer, pair.votes.policy)];
  const neither = [pair.votes.tie && plural(pair.votes.tie, "tie"), pair.votes.both_bad && `${pair.votes.both_bad} × both bad`].filter(Boolean);
  return el(
    "li",
    {},
    earlier.length > 0 && el("details", {}, el("summary", {}, plural(earlier.length, "earlier message")), ...earlier),
    turns.at(-1),
    el("div", { class: "answers" }, pair.against < name ? cards : cards.toReversed()),
    el("p", { class: "hint" }, neither.length ? `Also ${neither.join(", ")}. ` : "", "Asked on ", exactly(pair.created_at), "."),
  );
}
