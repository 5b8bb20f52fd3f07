// The rating desk: one pair after another, by button or by key, each vote open to a second thought.

import { showAll } from "./answer.js";
import { call } from "./api.js";
import { announce, button, el, find, notice } from "./dom.js";
import { Outbox } from "./outbox.js";
import { Pair, SAID } from "./pair.js";
import { openPage } from "./shell.js";

const PURPOSE = "Your votes train the model. Judge the last answer alone, whatever you think of the question.";
const LOOK_AGAIN_MS = 15_000;
const OPENS_AFTER_MS = 400; // the second of two quick presses or clicks is not meant for a pair that nobody has seen

const desk = find("desk");
let session, outbox;
let rated = []; // what was voted on here, the latest last: {task, choice, at}, `at` of the first vote
let current = null; // the Pair on the desk
let waits = false; // whether "Your vote waits" is on the desk
let timer = null;
let shown = 0; // pairs so far: what was awaited for an earlier one must not take a later one away

async function next() {
  clearTimeout(timer);
  current?.close();
  current = null;
  // The queue gives the same pair again until the vote has arrived.
  waits = outbox.waiting.length > 0;
  if (waits) return showWaiting();
  const before = shown;
  let task;
  try {
    task = await call("GET", "/v1/comparisons/next");
    notice("next");
    if (before !== shown) return;
  } catch (error) {
    if (before !== shown) return;
    if (error.code === "insufficient_role") return showNoRater();
    notice("next", `The next pair could not be had. ${error.message}`, button("Try again", next, { class: "strong" }));
    return;
  }
  if (task === null) return showEmpty();
  showTask(task);
}

function showTask(task, before = null) {
  shown += 1;
  const bodies = [];
  const prose = (text) => {
    const element = el("div", { class: "prose", dir: "auto" });
    bodies.push([text, element]);
    return element;
  };
  const talk = task.messages.map(({ role, content }) => {
    const text = typeof content === "string" ? content : (content ?? []).map((part) => part.text).join("");
    if (role === "assistant") return el("article", { class: "turn assistant", "aria-label": "Answer" }, prose(text));
    const label = role === "user" ? "Message" : `Message of the ${role}`;
    return el("article", { class: `turn ${role === "user" ? "user" : "system"}`, "aria-label": label }, el("p", { class: "bubble", dir: "auto" }, text));
  });
  const purpose = before ? `${SAID[before.choice]}. Choose again, or keep it with Skip. ${PURPOSE}` : PURPOSE;
  current?.close();
  waits = false;
  const pair = new Pair([prose(task.answers.a), prose(task.answers.b)], (choice, comment) => choose(task, choice, comment, before), {
    waiting: purpose,
    purpose,
    letters: true,
  });
  current = pair;
  desk.replaceChildren(el("section", { class: "log", "aria-label": "The conversation" }, talk), pair.element);
  setTimeout(() => pair === current && pair.open(), OPENS_AFTER_MS);
  showAll(bodies);
  pair.vote.focus({ preventScroll: true });
  scrollTo({ top: 0 });
  announce(before ? "The pair before is back." : "A new pair.");
}

async function choose(task, choice, comment, before) {
  const mine = shown;
  if (choice !== "skip") {
    rated.push({ task, choice, at: before?.at ?? Date.now() });
    showUndo();
    announce(`${SAID[choice]}.`);
    await outbox.add({ comparison: task.id, choice, comment });
  } else if (before) {
    rated.push(before);
  } else {
    try {
      await call("POST", `/v1/comparisons/${task.id}/pass`);
    } catch (error) {
      notice("next", `This pair could not be skipped. ${error.message}`);
    }
  }
  showUndo();
  if (mine === shown) next();
}

function undo() {
  showUndo();
  const last = rated.pop();
  if (!last) return;
  clearTimeout(timer);
  showTask(last.task, last);
  showUndo();
}

/** Votes older than the window cannot be changed any more. */
function showUndo() {
  rated = rated.filter(({ at }) => Date.now() - at < session.vote_window_s * 1000);
  find("undo").hidden = !rated.length;
}

/** What the service counts, so that neither a refused vote nor a second thought is. */
async function showCount() {
  const midnight = new Date(new Date().setHours(0, 0, 0, 0)).toISOString();
  try {
    const { count } = await call("GET", `/v1/votes/count?since=${midnight}`);
    find("count").textContent = `${count} rated today`;
  } catch {
    // No rater, or not now: the desk itself says which.
  }
}

function showEmpty() {
  timer = setTimeout(next, LOOK_AGAIN_MS);
  desk.replaceChildren(
    el(
      "div",
      { class: "welcome" },
      el("h2", {}, "Nothing waits for a vote"),
      el("p", {}, "Pairs come from chats in which the service asked and nobody voted. This page looks again every few seconds; leave it open, or chat meanwhile."),
      el("div", { class: "row" }, button("Look again", next), el("a", { class: "button", href: "/" }, "To the chat")),
    ),
  );
  announce("Nothing waits for a vote.");
}

function showWaiting() {
  desk.replaceChildren(
    el(
      "div",
      { class: "welcome" },
      el("h2", {}, "Your vote waits"),
      el("p", {}, "It is kept in this browser and sent as soon as the service can be reached; then the next pair comes."),
      el("div", { class: "row" }, button("Send now", () => outbox.send(), { class: "strong" })),
    ),
  );
}

function showNoRater() {
  desk.replaceChildren(
    el(
      "div",
      { class: "welcome" },
      el("h2", {}, "This desk is for raters"),
      el("p", {}, "Your key is of role ", session.role, ". An operator makes one for you with ", el("code", {}, "nightshift keys create --role rater"), "; sign in with that."),
      el("div", { class: "row" }, el("a", { class: "button", href: "/" }, "To the chat")),
    ),
  );
}

session = await openPage();
if (session) {
  outbox = new Outbox(session.key, {
    onSent: () => {
      notice("vote");
      showCount();
    },
    onKept: (error) => notice("kept", `Your vote is kept in this browser and will be sent again. ${error.message}`),
    onRefused: (vote, error) => {
      notice("vote", `A vote could not be cast. ${error.message}`);
      rated = rated.filter(({ task }) => task.id !== vote.comparison);
      showUndo();
    },
    onEmpty: () => {
      notice("kept");
      if (waits) next();
    },
  });
  find("undo").addEventListener("click", undo);
  addEventListener("keydown", (event) => {
    const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
    if (event.key.toLowerCase() !== "z" || !plain || find("undo").hidden || event.target.closest("textarea, input")) return;
    event.preventDefault();
    undo();
  });
  showCount();
  next();
}
