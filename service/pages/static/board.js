// The operator's board: is it learning? One query every few seconds says all that changes; a run is watched live.

import { call } from "./api.js";
import { Chart, gauge, percent, short } from "./chart.js";
import { announce, button, confirmed, el, find, notice } from "./dom.js";
import { ACTIVE, LiveRun, runList } from "./live.js";
import { detail, duelSentence, showPairs, tree } from "./policies.js";
import { nameOf, raterList } from "./raters.js";
import { askForSchedule, says, scheduleList } from "./schedules.js";
import { openPage } from "./shell.js";
import { dayOf, did, exactly, plural, when, who } from "./words.js";

const LOOK_MS = 3000;
const DAY_MS = 86_400_000;

let board = null;
let timer = null;
let looks = 0; // an answer that a later look has overtaken is not shown
let chosenRun = null; // by hand; else the latest is watched
let chosenPolicy = null; // by hand; else the one that is next to be decided on
const wholes = new Map(); // policy -> {key, whole}: as it was when its entry in the board last changed

const votesChart = new Chart();
const rewardChart = new Chart();
const duelChart = new Chart();
const live = new LiveRun(find("run"), { onEnd: look, onBroken: (text) => notice("watch", text) });

// Looking

async function look() {
  clearTimeout(timer);
  const mine = ++looks;
  try {
    const fresh = await call("GET", "/v1/board");
    if (mine !== looks) return;
    board = fresh;
    notice("board");
  } catch (error) {
    if (mine !== looks) return;
    if (error.code === "insufficient_role") return showNoOperator();
    notice("board", `The board shows what was${board ? ` at ${exactly(board.at)}` : " not yet"}. ${error.message}`);
  }
  if (board) await show();
  if (mine === looks) timer = setTimeout(look, LOOK_MS);
}

function showNoOperator() {
  find("sections").hidden = false;
  find("sections").replaceChildren(
    el(
      "div",
      { class: "welcome" },
      el("h2", {}, "This board is for operators"),
      el("p", {}, "An operator makes a key for you with ", el("code", {}, "nightshift keys create --role operator"), "; sign in with that."),
      el("div", { class: "row" }, el("a", { class: "button", href: "/" }, "To the chat")),
    ),
  );
}

const painted = new Map();

/** Draw a part anew where what it shows has changed; the keyboard stays where it was. */
function paint(id, shows, build) {
  const key = JSON.stringify(shows);
  if (painted.get(id) === key) return;
  painted.set(id, key);
  const part = find(id);
  const focused = part.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  part.replaceChildren(...[build()].flat().filter(Boolean));
  if (focused) (part.querySelector(`[data-key="${CSS.escape(focused)}"]`) ?? find("main")).focus({ preventScroll: true });
}

async function show() {
  find("sections").hidden = false;
  const minute = board.at.slice(0, 16); // what says "3 minutes ago" is drawn anew every minute
  paint("acts", [board.predecessor, activeRun()?.id], acts);
  paint("alarms", [board.engines, board.runs[0], board.swaps, board.pending, board.clock_runs, board.schedules.length], alarms);
  paint("verdict", [board.policies, board.votes, board.swaps, board.reward_models.length, activeRun()?.status, minute], verdict);
  paint("figures", [board.votes.choices, board.votes.days, board.votes.since_last_run, board.agreement, board.gold, board.first_share, board.reward_models.at(-1), serving()?.name, minute], tiles);
  showRun();
  showDuel(minute);
  showVotes();
  showReward();
  paint("tree", [board.policies, shownPolicy()], () => tree(board, shownPolicy(), choosePolicy));
  await showPolicy(minute);
  paint("schedule-acts", 1, () => button("Add a schedule", () => changeSchedule(null)));
  paint("schedules", [board.schedules, minute], schedules);
  paint("runs", [board.runs, board.policies, live.id, minute], runs);
  paint("raters", [board.raters, minute], raters);
  paint("audit", [board.audit, minute], audit);
}

const activeRun = () => board.runs.find((run) => ACTIVE.includes(run.status));
const serving = () => board.policies.find((policy) => policy.status === "serving");
const total = () => Object.values(board.votes.choices).reduce((sum, count) => sum + count, 0);

// What to do

/** Do it after asking once, and look at what came of it; says so loudly where it failed. */
async function act(does, done) {
  try {
    await does();
    notice("act");
    announce(done);
  } catch (error) {
    notice("act", error.message);
  }
  await look();
}

async function ask(question, consequence, action, does, done) {
  if (await confirmed(question, consequence, action)) await act(does, done);
}

function acts() {
  return [
    button("Train now", trainNow, { class: "strong", disabled: Boolean(activeRun()), "data-key": "train" }),
    button("Roll back", rollBack, { disabled: !board.predecessor, "data-key": "back", title: board.predecessor ? null : "What serves took no other policy's place" }),
  ];
}

const trainNow = () =>
  ask(
    "Train now?",
    `A run learns from all ${plural(total(), "vote")}, ${board.votes.since_last_run.toLocaleString("en")} of them new. It stands back while people chat, and nothing serves before it has passed the gate.` +
      (board.clock_runs ? "" : " The clock is not running, so it will wait until somebody starts that."),
    "Train",
    () => call("POST", "/v1/runs", {}),
    "The run is asked for.",
  );

const cancelRun = (run) =>
  ask("Cancel the run?", "It ends in order, a step later at most. Nothing of it will be in use.", "Cancel the run", () => call("POST", `/v1/runs/${run.id}/cancel`), "The run is being cancelled.");

const promote = (name) =>
  ask(
    `Let ${name} serve?`,
    `Every engine loads it, and then new requests take it in place of ${serving()?.name ?? "none"}. A trial that runs is broken off. You can roll back.`,
    "Promote",
    () => call("POST", `/v1/policies/${encodeURIComponent(name)}/promote`, {}),
    `${name} is to serve.`,
  );

function rollBack() {
  const from = serving().name; // another one may serve by the time that this is confirmed
  return ask(
    `Go back to ${board.predecessor}?`,
    `The engines that answer go back to it, and then new requests take it in place of ${from}.`,
    "Roll back",
    () => call("POST", "/v1/policies/rollback", { from }),
    `${board.predecessor} is to serve again.`,
  );
}

async function changeSchedule(schedule) {
  const taken = await askForSchedule(schedule);
  if (!taken) return;
  announce(`The schedule ${says(taken)} is kept.`);
  await look();
}

// What is wrong

function alarms() {
  const [run] = board.runs;
  const wrong = board.engines
    .filter((engine) => !engine.ready)
    .map((engine) => [`The engine at ${engine.url} gets no traffic: ${engine.problem}.`, "nightshift doctor says more."]);
  if (!board.engines.length) wrong.push(["No engine is named, so nobody is answered.", "Start `nightshift up`, or name one in engine.urls."]);
  if (run?.status === "failed") wrong.push([`The last run failed (${exactly(run.ended_at)}).`, run.error]); // no "ago": each change is read out
  const swap = board.swaps[0];
  const isLate = swap?.policy === board.pending;
  if (swap && !swap.flipped_at && swap.problem && (isLate || Date.now() - new Date(swap.requested_at) < DAY_MS)) {
    wrong.push([`${swap.policy} ${isLate ? "cannot serve yet" : "was to serve and does not"}.`, swap.problem]);
  }
  if (!board.clock_runs && (run?.status === "queued" || board.schedules.some((schedule) => !schedule.paused))) {
    wrong.push(["The clock is not running, so no run begins.", "`nightshift up` starts it; where you start the parts yourself, it is `python -m trainer clock`."]);
  }
  return wrong.map(([what, why]) => el("div", { class: "failure" }, el("p", {}, el("strong", {}, what), " ", why)));
}

// What it comes to

function verdict() {
  const now = serving();
  const latest = board.policies.at(-1);
  if (!total()) return ["Not yet: nobody has voted. ", el("a", { href: "/" }, "Chat"), " and vote on the pairs you are shown; comparisons.rate says how often the service asks."];
  if (now?.parent) {
    const swap = board.swaps.find((one) => one.flipped_at && one.policy === now.name); // if it is among the latest
    const how = swap ? [`; it took the place of ${swap.replaced} `, when(swap.flipped_at), `. ${sentence(swap.reason)}`] : ["."];
    return [el("strong", {}, `Yes: ${now.name} serves`), ...how];
  }
  if (latest?.status === "trial") return `${latest.name} passed the gate and is on trial against ${now?.name ?? "nobody"}: votes decide.`;
  if (latest?.parent) return `Not yet: ${now?.name ?? "nothing"} serves. ${latest.problem ?? `${latest.name} is ${latest.status.replace("_", " ")}.`}`;
  const run = activeRun();
  if (run) return `Not yet: ${plural(total(), "vote")}, and ${run.status === "queued" ? "a run is queued" : "a run is under way"}.`;
  if (tooFew()) return `Not yet: ${tooFew()}`;
  return board.runs.some((run) => run.status === "succeeded") ? "Not yet: no run has made a policy that serves." : `Not yet: ${plural(total(), "vote")} wait for a first run. Train now, or add a schedule.`;
}

/** Why a run would find nothing to learn from; "" where it would. */
function tooFew() {
  const { needed, choices } = board.votes;
  const decisive = (choices.a ?? 0) + (choices.b ?? 0);
  return decisive < needed ? `a run needs about ${needed.toLocaleString("en")} votes that prefer an answer, and there are ${decisive.toLocaleString("en")}.` : "";
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

const tile = (name, figure, ...more) => el("div", { class: "tile" }, el("h2", {}, name), el("p", { class: "figure" }, figure), ...more);
const small = (...text) => el("p", { class: "hint" }, ...text.flat());

function tiles() {
  const week = board.votes.days.slice(-7).reduce((sum, day) => sum + day.votes, 0);
  const { agreement, gold, first_share: first } = board;
  const report = board.reward_models.at(-1);
  const fair = first.low <= 0.5 && first.high >= 0.5;
  const reach = `${percent(first.low)} to ${percent(first.high)}`;
  return [
    tile("Serving", serving()?.name ?? "nothing yet", small(serving()?.parent ? ["Made ", when(serving().created_at), "."] : "The base model, as it came.")),
    tile("Votes", total().toLocaleString("en"), small(`${week.toLocaleString("en")} in the last 7 days, ${board.votes.since_last_run.toLocaleString("en")} since the last run.`)),
    tile(
      "Raters agree",
      percent(agreement.share),
      small(agreement.total ? `On ${plural(agreement.total, "pair")} that two people judged.` : "No pair has two votes yet: raters bring the second."),
      gold.total > 0 && small(`${percent(gold.share)} of ${plural(gold.total, "gold question")} answered rightly.`),
    ),
    tile(
      "First answer preferred",
      percent(first.share, 1),
      first.total > 0 && gauge(first, `${percent(first.share, 1)} of ${plural(first.total, "decisive vote")} went to the answer shown first; the 95% interval is ${reach}.`),
      el(
        "p",
        { class: fair ? "hint" : "bad" },
        first.total === 0 ? "No decisive vote yet." : fair ? `${reach} holds 50%: no position bias seen.` : `${reach} leaves out 50%: people vote for the place. Look at who cast these votes.`,
      ),
    ),
    tile(
      "Reward model",
      report ? percent(report.accuracy) : "–",
      small(report ? `Right about so many of ${report.pairs} unseen votes; length alone about ${percent(report.length_accuracy)}.` : "The first run fits one."),
    ),
  ];
}

// The parts

function showRun() {
  const run = board.runs.find((one) => one.id === chosenRun) ?? board.runs[0];
  const running = activeRun();
  paint("run-acts", [running], () => running && button("Cancel the run", () => cancelRun(running), { class: "danger", "data-key": "cancel" }));
  if (!run) {
    paint("run", 0, () => el("p", { class: "hint" }, tooFew() ? `No run yet: ${tooFew()} Let people chat first; a schedule can wait for their votes.` : "No run yet. Train now, or add a schedule below."));
    return;
  }
  live.watch(run, board);
}

function watch(run) {
  chosenRun = run.id;
  show();
  find("run-title").scrollIntoView({ block: "start" });
  announce("The curves of this run are shown.");
}

function runs() {
  return board.runs.length ? runList(board, live.id, watch) : el("p", { class: "hint" }, "None yet: what each run did and what came of it is listed here.");
}

function showDuel(minute) {
  const { duel } = board;
  paint("duel", duel && [duel.id, duel.status, duel.wins, duel.losses, duel.ties, minute], () => {
    if (!duel) {
      const how = {
        trial: "A candidate that passes the gate goes on trial by itself: a share of the comparisons is then between it and what serves, and votes decide.",
        offline: "With gate.mode = offline a candidate that passes the gate serves at once.",
        manual: "With gate.mode = manual a candidate that passes the gate waits until you promote it.",
      }[board.gate_mode];
      return el("p", { class: "hint" }, how);
    }
    const decisive = duel.wins + duel.losses;
    const rate = { share: decisive ? duel.wins / decisive : 0.5, low: duel.rate_low, high: duel.rate_high };
    return [
      el("p", { class: "said" }, el("span", { class: `pill ${duel.status}` }, duel.status), " ", duelSentence(duel)),
      duelChart.element,
      decisive > 0 && el("div", { class: "rate" }, el("span", { class: "hint" }, `${duel.challenger} preferred`), gauge(rate, `Win rate of ${duel.challenger}: ${percent(rate.share)}, from ${percent(rate.low)} to ${percent(rate.high)}.`)),
      small(
        `It ${duel.kind === "trial" ? "is promoted" : "comes back"} at E = ${short(duel.threshold)}, ${duel.kind === "trial" ? "rejected" : "let go"} when the evidence for ${duel.incumbent} is ${short(duel.reject_at)}, and the duel ends after ${plural(duel.budget, "vote")} in any case. Begun `,
        when(duel.started_at),
        ".",
      ),
    ];
  });
  if (!duel) return;
  const start = [0, 1];
  const floor = 1 / (2 * duel.reject_at);
  const clip = (value) => Math.min(Math.max(value, floor), 2 * duel.threshold);
  const [won, lost] = duel.kind === "trial" ? ["promote", "reject"] : ["go back", "let go"];
  duelChart.show({
    title: "Evidence over votes",
    says:
      `Evidence after ${plural(duel.wins + duel.losses, "decisive vote")}: E is ${short(duel.e_value)} for ${duel.challenger}, and ${duel.kind === "trial" ? "promotes it" : "brings it back"} at ${short(duel.threshold)};` +
      ` for ${duel.incumbent} it is ${short(duel.e_mirrored)}, and ends the duel at ${short(duel.reject_at)}.`,
    height: 240,
    series: [
      { name: `E: ${duel.challenger} is better`, tone: "accent", points: [start, ...duel.curve.map(([votes, e]) => [votes, clip(e)])] },
      { name: `1 / E of the mirror: ${duel.incumbent} is better`, tone: "bad", points: [start, ...duel.curve.map(([votes, , mirrored]) => [votes, clip(1 / mirrored)])] },
    ],
    marks: [
      { y: duel.threshold, label: `${won}: E = ${short(duel.threshold)}`, tone: "accent" },
      { y: 1 / duel.reject_at, label: `${lost}: ${short(duel.reject_at)} the other way`, tone: "bad", below: true },
    ],
    x: { label: "votes" },
    y: { log: true, from: floor, to: 2 * duel.threshold, ticks: [duel.threshold, 1, 1 / duel.reject_at], tick: (value) => (value < 1 ? `1/${short(1 / value)}` : short(value)) },
  });
}

function showVotes() {
  const { days } = board.votes;
  const sum = days.reduce((so, day) => so + day.votes, 0);
  paint("votes", sum > 0, () => (sum ? votesChart.element : el("p", { class: "hint" }, `No vote in the last ${days.length} days. People are asked while they chat: comparisons.rate says how often.`)));
  if (!sum) return;
  const best = days.reduce((most, day) => (day.votes > most.votes ? day : most));
  votesChart.show({
    title: `Last ${days.length} days`,
    says: `Votes a day over ${days.length} days: ${sum} in all, most on ${dayOf(best.day)} with ${best.votes}, and ${days.at(-1).votes} today.`,
    rests: `${days.at(-1).votes.toLocaleString("en")} today`,
    height: 150,
    series: [
      { name: "all", kind: "bars", tone: "soft", points: days.map((day, index) => [index, day.votes]) },
      { name: "decisive", kind: "bars", tone: "accent", points: days.map((day, index) => [index, day.decisive]) },
    ],
    x: { format: (index) => dayOf(days[index].day) },
    y: { from: 0 },
  });
}

function showReward() {
  const reports = board.reward_models;
  paint("reward", reports.length > 0, () => (reports.length ? rewardChart.element : el("p", { class: "hint" }, "None yet. Each run fits one, and tests it on votes that it has not seen.")));
  if (!reports.length) return;
  const last = reports.at(-1);
  rewardChart.show({
    title: "Right about unseen votes",
    says: `Accuracy of the last ${plural(reports.length, "reward model")} on unseen votes: ${percent(last.accuracy)} for the latest, and ${percent(last.length_accuracy)} for length alone.`,
    height: 170,
    series: [
      { name: "reward model", kind: "dots", tone: "accent", points: reports.map((report, index) => [index, report.accuracy]) },
      { name: "length alone", kind: "dots", tone: "warm", points: reports.map((report, index) => [index, report.length_accuracy]) },
    ],
    marks: [{ y: 0.5, label: "a coin", tone: "soft", below: true }],
    x: { format: (index) => dayOf(reports[index].created_at.slice(0, 10)) },
    y: { from: 0.4, format: (share) => percent(share) },
  });
}

/** The policy whose page is open: chosen by hand, or the one that is on trial or waits, or the latest. */
function shownPolicy() {
  const names = board.policies.map((policy) => policy.name);
  if (names.includes(chosenPolicy)) return chosenPolicy;
  const open = board.policies.findLast((policy) => ["trial", "candidate", "promoted"].includes(policy.status));
  return open?.name ?? names.at(-1);
}

function choosePolicy(name) {
  chosenPolicy = name;
  show();
  announce(`${name} is shown.`);
}

async function showPolicy(minute) {
  const name = shownPolicy();
  const key = JSON.stringify([board.policies.find((policy) => policy.name === name), board.duel?.wins, board.duel?.losses, board.duel?.ties, board.duel?.status, board.swaps]);
  if (wholes.get(name)?.key !== key) {
    try {
      wholes.set(name, { key, whole: await call("GET", `/v1/policies/${encodeURIComponent(name)}`) });
    } catch (error) {
      notice("policy", `${name} cannot be shown. ${error.message}`);
      return;
    }
    notice("policy");
  }
  if (name !== shownPolicy()) return; // another one was chosen meanwhile
  paint("policy", [name, key, board.pending, minute], () => detail(board, wholes.get(name).whole, { onPromote: promote, onPairs: readPairs }));
}

async function readPairs(name) {
  try {
    await showPairs(find("pairs"), name, { onAgain: () => readPairs(name), onClose: () => find("pairs").replaceChildren() });
    notice("pairs");
  } catch (error) {
    notice("pairs", `The pairs cannot be had. ${error.message}`);
  }
}

function schedules() {
  if (!board.schedules.length) return el("p", { class: "hint" }, "None: a run begins only when you ask for it. Add one, e.g. every night at 3:00 or after 500 new votes.");
  return scheduleList(board, {
    onEdit: changeSchedule,
    onPause: ({ id, paused }) => act(() => call("PATCH", `/v1/schedules/${id}`, { paused: !paused }), paused ? "It is resumed." : "It is paused."),
    onRemove: (schedule) =>
      ask(`Remove the schedule ${says(schedule)}?`, "Runs that it began stay.", "Remove", () => call("DELETE", `/v1/schedules/${schedule.id}`), "It is removed."),
  });
}

function raters() {
  return raterList(board, {
    onConfirm: (rater) =>
      ask(
        `Leave out the votes of ${nameOf(rater)}?`,
        `${plural(rater.votes, "vote")} will train nothing from the next run on. They stay on disk, and you can release them.`,
        "Leave out",
        () => call("POST", `/v1/raters/${rater.key}/confirm`),
        "They are left out.",
      ),
    onRelease: (rater) => act(() => call("POST", `/v1/raters/${rater.key}/release`), "They count from the next run on."),
    onReconsider: (rater) => act(() => call("POST", `/v1/raters/${rater.key}/reconsider`), "The next run decides; until then they count."),
  });
}

function audit() {
  return el("ul", { class: "plain-list" }, board.audit.map((row) => el("li", {}, when(row.at), " ", el("strong", {}, who(row.actor, board)), ` ${did(row.action)} `, el("code", {}, row.subject))));
}

if (await openPage()) {
  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    if (!document.hidden) look();
  });
  look();
}
