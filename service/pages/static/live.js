// A training run, watched as it goes: its stages, and the curves of its steps.

import { Chart, short } from "./chart.js";
import { button, el } from "./dom.js";
import { took, when, who } from "./words.js";

/** What the trainer's stages come down to. */
const STAGES = [
  ["Prepare", ["clearing away", "loading the model", "raters", "preparing votes", "sampling answers"]],
  ["Reward model", ["reward"]],
  ["Judge", ["judge"]],
  ["PPO", ["ppo"]],
  ["Measure", ["measuring"]],
  ["Gate", ["gate"]],
  ["Publish", ["publishing"]],
];
const CURVES = [
  { stage: "ppo", name: "score", title: "Reward", says: "reward" },
  { stage: "ppo", name: "kl", title: "KL from the base, nats an answer", says: "KL divergence in nats", from: 0 },
  { stage: "ppo", name: "length", title: "Length, tokens", says: "length of an answer in tokens" },
  { stage: "ppo", name: "entropy", title: "Entropy, nats a token", says: "entropy in nats a token" },
  { stage: "ppo", name: "episodes_per_s", title: "Episodes a second", says: "episodes a second", from: 0 },
  { stage: "reward", name: "accuracy", title: "Reward model: right on its batch", says: "share of the batch that the reward model is right about", from: 0.4, to: 1 },
];
export const ACTIVE = ["queued", "running"];

export class LiveRun {
  #source = null;
  #painting = false;

  /** `onEnd()` when the run that is watched has ended, `onBroken(text)` when it cannot be watched, null when it can. */
  constructor(container, { onEnd, onBroken }) {
    this.container = container;
    this.onEnd = onEnd;
    this.onBroken = onBroken;
    this.id = null;
    this.charts = CURVES.map(() => new Chart("small"));
    this.head = el("div", {});
    this.curves = el("div", { class: "curves" }, this.charts.map((chart) => chart.element));
  }

  /** Watch this run, one of `board.runs`, from its beginning. */
  watch(run, board) {
    this.board = board;
    if (this.id === run.id) return;
    this.close();
    this.id = run.id;
    this.run = run;
    this.figures = new Map(); // "ppo/kl" -> [[step, value], …]
    this.container.replaceChildren(this.head, this.curves);
    this.#source = new EventSource(`/v1/runs/${encodeURIComponent(run.id)}/events`);
    this.#source.addEventListener("status", ({ data }) => {
      this.onBroken(null);
      const before = this.run.status;
      this.run = JSON.parse(data);
      if (!ACTIVE.includes(this.run.status)) {
        this.#source.close();
        if (ACTIVE.includes(before)) this.onEnd();
      }
      this.paint();
    });
    this.#source.addEventListener("figures", ({ data }) => {
      const { stage, step, figures } = JSON.parse(data);
      for (const [name, value] of Object.entries(figures)) {
        const curve = this.figures.get(`${stage}/${name}`) ?? [];
        this.figures.set(`${stage}/${name}`, curve);
        if (curve.at(-1)?.[0] !== step) curve.push([step, value]);
      }
      this.paint();
    });
    this.#source.addEventListener("error", () => {
      // The browser tries again by itself, unless the service has refused.
      if (this.#source.readyState === EventSource.CLOSED) {
        this.id = null;
        this.onBroken("The run cannot be watched: the service refused. It is tried again every few seconds.");
      } else this.onBroken("The connection to the run is lost. It is tried again every few seconds.");
    });
    this.paint();
  }

  close() {
    this.#source?.close();
    this.id = null;
  }

  paint() {
    if (this.#painting) return;
    this.#painting = true;
    requestAnimationFrame(() => {
      this.#painting = false;
      this.#paint();
    });
  }

  #paint() {
    const { run } = this;
    const running = run.status === "running";
    const at = STAGES.findIndex(([, names]) => names.includes(run.stage));
    const done = (index) => run.status === "succeeded" || (at >= 0 && index < at);
    const step = this.figures.get("ppo/score")?.at(-1)?.[0];
    const says = {
      queued: "It waits for the clock to start it.",
      running: `${run.cancel_requested_at ? "It is being cancelled" : "It runs"}: ${run.stage ?? "starting"}${run.stage === "ppo" && step !== undefined ? `, step ${step + 1}` : ""}.`,
      succeeded: "It has ended well.",
      failed: `It failed. ${run.error ?? ""}`,
      cancelled: run.error ?? "It was cancelled.",
    }[run.status];
    this.head.replaceChildren(
      el(
        "p",
        { class: run.status === "failed" ? "said bad" : "said" },
        el("span", { class: `pill ${run.status}` }, run.status),
        ` ${says} `,
        el("span", { class: "hint" }, `${who(run.requested_by, this.board)} asked for it `, when(run.created_at), run.started_at ? `; ${running ? "so far" : "it took"} ${took(run.started_at, run.ended_at)}` : "", "."),
      ),
      el(
        "ol",
        { class: "stages", "aria-label": "Stages" },
        STAGES.map(([title], index) =>
          el("li", { class: done(index) ? "done" : index === at && run.status !== "succeeded" ? "at" : "", "aria-current": index === at && running ? "step" : null }, title),
        ),
      ),
    );
    CURVES.forEach(({ stage, name, title, says: what, from, to }, index) => {
      const points = this.figures.get(`${stage}/${name}`) ?? [];
      const budget = name === "kl" ? this.board.kl_budget : null;
      const chart = this.charts[index];
      chart.element.hidden = !points.length;
      if (!points.length) return;
      const [first, last] = [points[0], points.at(-1)];
      chart.show({
        title,
        says:
          `${title}, ${points.length} steps: the ${what} goes from ${short(first[1])} to ${short(last[1])}.` +
          (budget ? ` The gate lets ${short(budget)} nats through.` : ""),
        height: 130,
        series: [{ name: title, tone: "accent", points }],
        marks: budget ? [{ y: budget, label: `the gate's budget: ${short(budget)}`, tone: "bad", below: true }] : [],
        x: { label: "steps" },
        y: { from, to },
      });
    });
    this.curves.hidden = this.charts.every((chart) => chart.element.hidden);
  }
}

/** The runs, the latest first, each with what came of it. */
export function runList(board, shown, onWatch) {
  const came = new Map(board.policies.map((policy) => [policy.run, policy]));
  return el(
    "ul",
    { class: "rows" },
    board.runs.map((run) => {
      const policy = came.get(run.id);
      const result = policy ? `${policy.name} (${policy.status.replace("_", " ")})` : run.error;
      return el(
        "li",
        {},
        el("span", { class: `pill ${run.status}` }, run.status),
        el(
          "div",
          { class: "grow" },
          el("p", {}, when(run.created_at), `, by ${who(run.requested_by, board)}`, run.started_at ? `, ${took(run.started_at, run.ended_at)}` : ""),
          result && el("p", { class: run.error ? "bad" : "hint" }, result),
        ),
        run.started_at &&
          button("Curves", () => onWatch(run), {
            class: "quiet",
            "data-key": `watch ${run.id}`,
            "aria-pressed": String(run.id === shown),
            "aria-label": `Curves of the run of ${new Date(run.created_at).toLocaleString()}`,
          }),
      );
    }),
  );
}
