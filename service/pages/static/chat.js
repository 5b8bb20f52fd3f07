// The chat page. A conversation is a list of turns, kept on the service as it is here:
//   {role: "user", content}
//   {role: "assistant", content, policy, stopped, cut}
//   {role: "assistant", content, policy, cut, pair: {id, expires_at, answers, cut, choice, policies}}
//     content, and cut beside it: of the chosen answer

import { call, streamChat } from "./api.js";
import { GrowingText, showAll } from "./answer.js";
import { announce, button, confirmed, copy, el, find, notice } from "./dom.js";
import { Outbox } from "./outbox.js";
import { Pair, SAID } from "./pair.js";
import { openPage } from "./shell.js";

const STARTERS = ["What is the capital of France?", "Tell me three fruits.", "Give me a tip for better sleep."];
const PURPOSE = "Your vote trains the model that answers you. Who wrote which is shown after it.";
const CUT = "This answer reached the longest length and was cut off.";
const SAVE_AGAIN_MS = 10_000;

const log = find("log");
const message = find("message");
let session, outbox;
let talk = newTalk();
let begun = false; // the page knows who asks, and in which conversation
let early = ""; // what was sent before
const address = location.hash;
let asking = null; // the AbortController of the answer that is being written
let asked = Promise.resolve(); // done when nothing of it is left to do
let openPair = null; // the pair that can be voted on
let changing = null; // the turn whose vote is given a second thought; until then the first one holds
const deleted = new Set(); // ids of conversations that the user deleted here
const unsaved = new Set(); // conversations that the service does not have as they are here

function newTalk() {
  return { id: null, title: "", turns: [] };
}

// What is on the page

async function drawTalk() {
  openPair?.close();
  openPair = null;
  const bodies = []; // [text, element] of all that is Markdown
  log.replaceChildren(...talk.turns.map((turn, index) => drawTurn(turn, index, bodies)));
  if (!talk.turns.length) log.append(drawWelcome());
  find("title").textContent = document.title = talk.title ? `${talk.title} · Nightshift` : "Nightshift";
  focusVote();
  await showAll(bodies);
}

/** The keyboard is for the vote, unless somebody writes: what is meant for a text would vote. */
function focusVote() {
  const { activeElement } = document;
  const writes = message.value || (activeElement !== message && activeElement?.matches("textarea, input"));
  if (!writes) openPair?.vote.focus({ preventScroll: true });
}

function drawWelcome() {
  return el(
    "div",
    { class: "welcome" },
    el("h2", {}, "What shall we talk about?"),
    el("p", {}, "Write a message below. Now and then you see two answers and say which is better: that is what the model learns from."),
    el("div", { class: "starters" }, STARTERS.map((text) => button(text, () => say(text)))),
  );
}

function drawTurn(turn, index, bodies) {
  if (turn.role === "user") return drawUser(turn, index);
  const last = index === talk.turns.length - 1;
  if (turn.pair && (turn.pair.choice === null || turn === changing)) return drawPair(turn, bodies);
  const body = el("div", { class: "prose", dir: "auto" });
  bodies.push([turn.content, body]);
  const copyIt = button("Copy", () => copy(turn.content, copyIt), { "aria-label": "Copy this answer" });
  return el(
    "article",
    { class: "turn assistant", "aria-label": "Answer" },
    body,
    turn.stopped && el("p", { class: "note" }, "You stopped this answer."),
    turn.cut && el("p", { class: "note" }, CUT),
    turn.pair && drawVerdict(turn, last, bodies),
    el(
      "div",
      { class: "actions" },
      copyIt,
      last && !asking && button("Ask again", () => askAgain(), { "aria-label": "Ask for another answer" }),
      turn.policy && !turn.pair && el("span", { class: "policy" }, turn.policy),
    ),
  );
}

function drawUser(turn, index) {
  const copyIt = button("Copy", () => copy(turn.content, copyIt), { "aria-label": "Copy this message" });
  const text = el("p", { class: "bubble", dir: "auto" }, turn.content);
  const edit = button("Edit", () => editTurn(article, turn, index), { "aria-label": "Edit this message and send it again" });
  const article = el("article", { class: "turn user", "aria-label": "Your message" }, text, el("div", { class: "actions" }, edit, copyIt));
  return article;
}

function drawPair(turn, bodies) {
  const elements = turn.pair.answers.map((text) => {
    const element = el("div", { class: "prose", dir: "auto" });
    bodies.push([text, element]);
    return element;
  });
  const pair = votingPair(elements, turn);
  openVote(pair, turn);
  return pair.element;
}

function votingPair(elements, turn) {
  return new Pair(elements, (choice, comment) => choose(turn, choice, comment), { purpose: PURPOSE });
}

function openVote(pair, turn) {
  turn.pair.cut?.forEach((cut, index) => cut && pair.note(index, CUT));
  pair.open();
  openPair = pair;
}

/** What was voted, and who wrote which. */
function drawVerdict(turn, last, bodies) {
  const { answers, cut, choice, policies } = turn.pair;
  const other = el("div", { class: "prose", dir: "auto" });
  const shown = choice === "b" ? 1 : 0;
  bodies.push([answers[1 - shown], other]);
  const goesOn = ["a", "b"].includes(choice) ? "" : "; the first goes on";
  let wrote = "Who wrote which is shown when the vote has arrived.";
  if (choice === "skip") wrote = "";
  else if (policies && policies.a === policies.b) wrote = `Both were written by ${policies.a}.`;
  else if (policies) wrote = `The first was written by ${policies.a}, the second by ${policies.b}.`;
  const change = button("Change", () => changeVote(turn), { "aria-label": "Change your vote" });
  return el(
    "div",
    { class: "verdict" },
    el("p", {}, `${SAID[choice]}${goesOn}. ${wrote} `, last && !asking && canChange(turn.pair) && change),
    el("details", {}, el("summary", {}, "The other answer"), other, cut?.[1 - shown] && el("p", { class: "note" }, CUT)),
  );
}

function canChange({ voted_at, expires_at }) {
  return Date.now() < (voted_at ? Date.parse(voted_at) + session.vote_window_s * 1000 : Date.parse(expires_at));
}

function scrolledToEnd() {
  return innerHeight + scrollY > document.documentElement.scrollHeight - 80;
}

function scrollToEnd() {
  scrollTo({ top: document.documentElement.scrollHeight });
}

function showBusy() {
  find("send").hidden = asking !== null;
  find("stop").hidden = asking === null;
}

// Asking

function say(text) {
  const last = talk.turns.at(-1);
  if (last?.pair?.choice === null) settle(last, "skip");
  changing = null;
  if (!talk.turns.length) talk.title = [...text].slice(0, 80).join(""); // no half of an emoji
  // Where the last one has no answer they become one: many models take no two messages of one side in a row.
  if (last?.role === "user") last.content += `\n\n${text}`;
  else talk.turns.push({ role: "user", content: text });
  ask();
}

function ask() {
  asking = new AbortController();
  asked = writeAnswer(asking.signal);
}

async function writeAnswer(signal) {
  const own = talk;
  showBusy();
  drawTalk();
  save(own);
  announce("The answer is being written.");
  let follow = true;
  const onPaint = () => follow && scrollToEnd();
  const noteScroll = () => (follow = scrolledToEnd());
  addEventListener("scroll", noteScroll, { passive: true });
  const texts = [new GrowingText(onPaint)];
  const live = el("article", { class: "turn assistant live", "aria-label": "Answer", "aria-busy": "true" }, texts[0].element);
  log.append(live);
  scrollToEnd();
  let pair, turn, policy, comparison;
  const cut = [false, false];
  const request = {
    model: session.model,
    messages: own.turns.map(({ role, content }) => ({ role, content })),
    feedback: session.feedback === "always" ? "always" : "auto",
  };
  try {
    for await (const chunk of streamChat(request, signal)) {
      policy = chunk.system_fingerprint ?? policy;
      comparison = chunk.comparison ?? comparison;
      for (const { index, delta, finish_reason } of chunk.choices) {
        if (index === 1 && !pair) {
          texts.push(new GrowingText(onPaint));
          turn = { role: "assistant", content: "", policy: null, stopped: false, pair: null };
          pair = votingPair(texts.map((text) => text.element), turn);
          live.replaceWith(pair.element);
        }
        if (delta.content) texts[index].add(delta.content);
        if (finish_reason === "length") cut[index] = true;
      }
    }
    if (comparison && pair) {
      turn.pair = { ...comparison, answers: texts.map((text) => text.text), cut, choice: null, policies: null };
    } else {
      turn = { role: "assistant", content: texts[0].text, policy: policy ?? null, stopped: false, cut: cut[0], pair: null };
    }
  } catch (error) {
    if (!signal.aborted) {
      endAsking(noteScroll);
      showFailure(error, pair?.element ?? live);
      return;
    }
    // Stopped: what was written so far stays, as it does on the service's side.
    const text = texts.map((one) => one.text).find(Boolean) ?? ""; // of an active pair, the second side may begin
    turn = text && { role: "assistant", content: text, policy: policy ?? null, stopped: true, pair: null };
  }
  if (turn) own.turns.push(turn);
  await Promise.all(texts.map((text) => text.finish()));
  endAsking(noteScroll);
  save(own);
  if (comparison && pair) {
    openVote(pair, turn);
    announce("Both answers have ended. Which is better?");
    focusVote();
    if (follow) scrollToEnd();
  } else {
    if (turn) await drawAgain(own.turns.length - 1);
    else (pair?.element ?? live).remove();
    if (follow) scrollToEnd();
    announce(signal.aborted ? "Stopped." : turn.cut ? "The answer was cut off at the longest length." : "The answer is complete.");
    if (!turn) showFailure(new Error("You stopped before the answer began."));
  }
}

// Who goes on writing after two answers has the vote in focus, and means the message.
document.addEventListener("keydown", (event) => {
  const writes = event.key.length === 1 && event.key !== " " && !event.ctrlKey && !event.metaKey && !event.altKey;
  if (writes && openPair?.vote === event.target) message.focus();
});

function endAsking(noteScroll) {
  removeEventListener("scroll", noteScroll);
  asking = null;
  showBusy();
}

function showFailure(error, live) {
  live?.classList.add("broken");
  const opens = error.status === 401 ? "Sign in" : error.code === "bad_csrf_token" && "Reload";
  const again = opens ? button(opens, openAnew) : button("Try again", ask);
  log.append(el("div", { class: "failure", role: "alert" }, el("p", {}, error.message), again));
  scrollToEnd();
}

const unanswered = () => `nightshift.unanswered.${session.key}`; // another user of this browser must not say it

/** Where the session is over, the service does not keep what was asked last. */
function openAnew() {
  const last = talk.turns.at(-1);
  if (last?.role === "user") sessionStorage.setItem(unanswered(), last.content);
  location.reload();
}

function restoreUnanswered() {
  const text = sessionStorage.getItem(unanswered());
  if (!text || message.value) return;
  sessionStorage.removeItem(unanswered());
  const last = talk.turns.at(-1);
  if (last?.role === "user" && last.content === text) return;
  message.value = text;
  message.focus();
}

function askAgain() {
  talk.turns.pop();
  ask();
}

function editTurn(article, turn, index) {
  const text = el("textarea", { rows: "3", dir: "auto", "aria-label": "Your message" });
  text.value = turn.content;
  const form = el(
    "form",
    { class: "edit" },
    text,
    el("p", { class: "hint" }, "What came after this message is asked anew."),
    el("div", { class: "row" }, button("Cancel", () => stopEditing()), el("button", { class: "strong", type: "submit" }, "Send")),
  );
  const before = [...article.children];
  const stopEditing = () => {
    article.replaceChildren(...before);
    article.querySelector("button").focus();
  };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!text.value.trim()) return;
    await stop();
    if (talk.turns[index] !== turn) return; // another conversation was opened meanwhile
    talk.turns.splice(index);
    say(text.value.trim());
    message.focus();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stopEditing();
    sendOnEnter(event, form);
  });
  article.replaceChildren(form);
  text.focus();
}

function sendOnEnter(event, form) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.target.tagName !== "TEXTAREA") return;
  event.preventDefault();
  form.requestSubmit();
}

/** Stop what is being written, and wait until it has been put down; and what was asked meanwhile. */
async function stop() {
  do {
    asking?.abort();
    await asked;
  } while (asking);
}

// Voting

function settle(turn, choice) {
  const shown = choice === "b" ? 1 : 0;
  turn.pair.choice = choice;
  turn.content = turn.pair.answers[shown];
  turn.cut = turn.pair.cut?.[shown] ?? false;
}

function choose(turn, choice, comment) {
  const earlier = turn.pair.choice;
  if (turn === changing && choice === "skip") choice = earlier;
  openPair = changing = null;
  settle(turn, choice);
  turn.pair.policies = turn.policy = null;
  announce(`${SAID[choice]}.`);
  notice("vote");
  if (choice !== "skip") outbox.add({ comparison: turn.pair.id, choice, comment, earlier });
  save(talk);
  drawAgain(talk.turns.indexOf(turn));
  message.focus({ preventScroll: true });
}

function changeVote(turn) {
  if (canChange(turn.pair)) changing = turn;
  else notice("vote", "It is too late to change this vote.");
  drawAgain(talk.turns.indexOf(turn));
  focusVote();
}

function onVoteSent(vote, answer) {
  const index = talk.turns.findIndex((one) => one.pair?.id === vote.comparison);
  const turn = talk.turns[index];
  if (!turn) return;
  turn.pair.cast = { choice: vote.choice, policies: answer.policies };
  turn.pair.voted_at = answer.created_at;
  if (turn.pair.choice === vote.choice) showCast(turn);
  save(talk);
  if (turn !== changing && turn.pair.choice === vote.choice) drawAgain(index);
}

/** This turn alone: elsewhere on the page an answer may be growing, or a message be edited. */
function drawAgain(index) {
  const bodies = [];
  log.children[index].replaceWith(drawTurn(talk.turns[index], index, bodies));
  return showAll(bodies);
}

/** Who wrote which is told of the vote that is on record. */
function showCast(turn) {
  const { choice, policies } = turn.pair.cast;
  turn.pair.policies = policies;
  turn.policy = policies[choice === "b" ? "b" : "a"];
}

/** What can never be cast was not said: the vote on record stands, or none. */
function onVoteRefused(vote, error) {
  notice("vote", `A vote could not be cast. ${error.message}`);
  const index = talk.turns.findIndex((one) => one.pair?.id === vote.comparison);
  const turn = talk.turns[index];
  if (!turn || turn.pair.choice !== vote.choice) return;
  const unseen = error.code === "vote_is_final" ? vote.earlier : null; // it arrived, and no answer said so
  settle(turn, turn.pair.cast?.choice ?? unseen ?? "skip");
  if (turn.pair.cast) showCast(turn);
  confirmVotes();
  save(talk);
  if (turn !== changing) drawAgain(index);
}

/** Votes may have arrived unseen: the same vote again changes nothing, and its answer says who wrote which. */
function confirmVotes() {
  for (const { pair } of talk.turns) {
    if (!pair || [null, "skip", pair.cast?.choice].includes(pair.choice)) continue;
    if (outbox.waiting.some((vote) => vote.comparison === pair.id)) continue; // with its comment
    outbox.add({ comparison: pair.id, choice: pair.choice, comment: null });
  }
}

// Keeping

/** Put the conversation on the service; what cannot be sent is sent again later. */
async function save(own) {
  own.changed = true;
  unsaved.add(own);
  if (own.saving) return;
  own.saving = true;
  try {
    while (own.changed) {
      own.changed = false;
      await put(own);
    }
    unsaved.delete(own);
    notice("save");
  } catch (error) {
    notice("save", `This conversation is not kept yet. ${error.message}`);
    // If it has been kept since then, another copy of it may be open.
    if (error.passing) setTimeout(() => unsaved.has(own) && save(own), SAVE_AGAIN_MS);
  } finally {
    own.saving = false;
  }
  drawList();
}

/** A conversation that is not kept yet: a second copy of it, as the service has it, would lack what came last. */
function findUnsaved(id) {
  return [...unsaved].find((one) => one.id === id);
}

async function put(own) {
  const body = { title: own.title, messages: own.turns };
  if (own.id) {
    try {
      return await call("PUT", `/v1/conversations/${own.id}`, body);
    } catch (error) {
      if (error.status !== 404) throw error;
      if (deleted.has(own.id)) return; // what was still on its way must not bring it back
      // Deleted in another window: it goes on as a new one.
    }
  }
  const before = own.id ?? ""; // while it is open and no other one is on its way, the address says so
  own.id = (await call("POST", "/v1/conversations", body)).id;
  if (own === talk && location.hash.slice(1) === before) history.replaceState(null, "", `#${own.id}`);
}

async function drawList() {
  let kept;
  try {
    kept = (await call("GET", "/v1/conversations")).data;
    notice("list");
  } catch (error) {
    return notice("list", `Your conversations could not be listed. ${error.message}`);
  }
  const rows = kept.map(({ id, title }) =>
    el(
      "li",
      {},
      el("a", { href: `#${id}`, dir: "auto", "aria-current": id === talk.id ? "page" : null, onclick: closeDrawer }, title),
      button("Delete", () => remove(id, title), { class: "quiet", "aria-label": `Delete the conversation “${title}”` }),
    ),
  );
  find("talks").replaceChildren(...rows);
  if (!rows.length) find("talks").append(el("li", { class: "hint" }, "What you talk about is listed here."));
}

async function remove(id, title) {
  const consequence =
    "It leaves your list. Answers and votes stay in the service's record until an operator has you forgotten.";
  if (!(await confirmed(`Delete “${title}”?`, consequence, "Delete"))) return;
  deleted.add(id);
  try {
    await call("DELETE", `/v1/conversations/${id}`);
  } catch (error) {
    if (error.status !== 404) {
      deleted.delete(id);
      return notice("list", `It is still there. ${error.message}`);
    }
  }
  unsaved.delete(findUnsaved(id));
  announce("Deleted.");
  if (id === talk.id) await begin();
  await drawList();
}

async function openFromAddress() {
  const id = location.hash.slice(1);
  if (id === (talk.id ?? "")) return;
  if (!id) return begin();
  const here = findUnsaved(id);
  const { title, messages, error } =
    here ?? (await call("GET", `/v1/conversations/${encodeURIComponent(id)}`).catch((error) => ({ error })));
  const isPast = () => location.hash.slice(1) !== id || talk.id === id; // another one was opened, or this one was
  if (isPast()) return;
  await stop();
  if (isPast()) return;
  if (error) {
    await begin();
    return notice("open", `This conversation could not be opened. ${error.message}`);
  }
  talk = here ?? { id, title, turns: messages };
  const last = talk.turns.at(-1);
  if (last?.pair?.choice === null && Date.now() > Date.parse(last.pair.expires_at)) settle(last, "skip");
  confirmVotes();
  const drawn = drawTalk();
  if (last?.role === "user") showFailure(new Error("This message has no answer yet."));
  startTalking();
  await drawn;
  scrollToEnd();
  drawList();
}

async function begin() {
  await stop();
  talk = newTalk();
  history.replaceState(null, "", location.pathname);
  const drawn = drawTalk();
  startTalking();
  await drawn;
  drawList();
  message.focus();
}

/** What was sent too early is said now, unless it was changed since or was meant for another conversation. */
function startTalking() {
  const meant = early && message.value.trim() === early && location.hash === address;
  begun = true;
  early = "";
  if (meant) find("composer").requestSubmit();
}

function closeDrawer() {
  document.body.classList.remove("drawer-open");
  find("drawer").setAttribute("aria-expanded", "false");
}

// The start

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = message.value.trim();
  if (!begun) early = text;
  if (!text || asking || !begun) return;
  message.value = "";
  say(text);
});
find("composer").addEventListener("keydown", (event) => sendOnEnter(event, find("composer")));
find("send").disabled = false; // before, it would load the page anew
document.querySelector(".skip-link").addEventListener("click", (event) => {
  event.preventDefault(); // the address says which conversation is open
  message.focus();
});

session = await openPage();
if (session) {
  outbox = new Outbox(session.key, {
    onSent: onVoteSent,
    onKept: (error) => notice("kept", `Your vote is kept in this browser and will be sent again. ${error.message}`),
    onRefused: onVoteRefused,
    onEmpty: () => {
      notice("kept");
      confirmVotes(); // another window may have sent what this one cast
    },
  });
  find("stop").addEventListener("click", async () => {
    await stop();
    message.focus();
  });
  find("new").addEventListener("click", () => {
    closeDrawer();
    begin();
  });
  find("drawer").addEventListener("click", () => {
    const open = document.body.classList.toggle("drawer-open");
    find("drawer").setAttribute("aria-expanded", String(open));
    if (open) find("new").focus();
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !document.body.classList.contains("drawer-open")) return;
    closeDrawer();
    find("drawer").focus();
  });
  addEventListener("hashchange", openFromAddress);
  await (location.hash.length > 1 ? openFromAddress() : begin());
  restoreUnanswered();
}
