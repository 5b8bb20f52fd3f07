// Two answers side by side and the question which is better; the chat and the rating desk share it.

import { button, el } from "./dom.js";

const KEYS = { ArrowLeft: "a", ArrowRight: "b", ArrowDown: "tie", ArrowUp: "both_bad", Escape: "skip" };
const SCROLLING = ["ArrowUp", "ArrowDown"];
const BUTTONS = [
  { choice: "a", label: "First is better", key: "←", says: "left arrow" },
  { choice: "tie", label: "Equally good", key: "↓", says: "down arrow where the page does not scroll", letter: "T" },
  { choice: "both_bad", label: "Both bad", key: "↑", says: "up arrow where the page does not scroll", letter: "B" },
  { choice: "b", label: "Second is better", key: "→", says: "right arrow" },
];

const LETTERS = Object.fromEntries(BUTTONS.filter(({ letter }) => letter).map(({ letter, choice }) => [letter.toLowerCase(), choice]));

/** How a vote reads: "You preferred the first answer". */
export const SAID = {
  a: "You preferred the first answer",
  b: "You preferred the second answer",
  tie: "You found both equally good",
  both_bad: "You found both bad",
  skip: "You skipped this one",
};

/** `bodies`: the two elements that show the answers. `onChoose(choice, comment)` is called once, after `open()`.
 * `letters`: T and B vote too; not where people write, since who goes on writing would vote. */
export class Pair {
  #open = false;

  constructor(bodies, onChoose, { waiting = "Voting opens when both answers have ended.", purpose, letters = false }) {
    this.onChoose = onChoose;
    this.keys = letters ? { ...KEYS, ...LETTERS } : KEYS;
    this.comment = el("input", { type: "text", maxlength: "2000", autocomplete: "off", placeholder: "Why? (if you like)" });
    this.buttons = BUTTONS.map(({ choice, label, key, says, letter }) => {
      const also = letters && letter;
      return button([el("span", {}, label), el("kbd", { "aria-hidden": "true" }, also ? `${key} ${letter}` : key)], () => this.#choose(choice), {
        class: `choice ${choice}`,
        "aria-description": `Key: ${says}${also ? `, or ${letter}` : ""}`,
        disabled: true,
      });
    });
    this.skip = button(["Skip ", el("kbd", { "aria-hidden": "true" }, "Esc")], () => this.#choose("skip"), {
      class: "quiet",
      "aria-description": "Key: escape",
      disabled: true,
    });
    this.hint = el("p", { class: "hint" }, waiting);
    this.purpose = purpose;
    this.vote = el(
      "section",
      { class: "vote", tabindex: "-1", "aria-label": "Which answer is better?" },
      el("h2", {}, "Which answer is better?"),
      this.hint,
      el("div", { class: "choices" }, this.buttons),
      el("div", { class: "row" }, el("label", { class: "comment" }, el("span", { class: "unseen" }, "Comment"), this.comment), this.skip),
    );
    const names = ["First answer", "Second answer"];
    this.cards = bodies.map((body, index) => el("article", { class: "card", "aria-label": names[index] }, body));
    this.element = el(
      "section",
      { class: "pair", "aria-label": "Two answers" },
      el("div", { class: "answers" }, this.cards),
      this.vote,
    );
  }

  /** Say something of one answer, below it. */
  note(index, text) {
    this.cards[index].append(el("p", { class: "note" }, text));
  }

  /** Take votes from now on, by button and by key. */
  open() {
    this.#open = true;
    this.hint.textContent = this.purpose;
    for (const one of [...this.buttons, this.skip]) one.disabled = false;
    document.addEventListener("keydown", this.#onKey);
  }

  close() {
    this.#open = false;
    document.removeEventListener("keydown", this.#onKey);
    for (const one of [...this.buttons, this.skip]) one.disabled = true;
  }

  get isOpen() {
    return this.#open;
  }

  #onKey = (event) => {
    const choice = this.keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!choice || event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    if (document.querySelector("dialog[open], body.drawer-open")) return;
    if (event.target.closest("textarea, input")) {
      // There the arrows move in the text; Esc leaves it, and the next key votes.
      if (choice === "skip" && event.target === this.comment) this.vote.focus();
      return;
    }
    // Whoever reads must not vote by that: wide code scrolls sideways, and up and down scroll what is not all in view.
    if (event.target.closest("pre, .wide") || (SCROLLING.includes(event.key) && !this.#isInView())) return;
    event.preventDefault();
    this.#choose(choice);
  };

  #isInView() {
    const { top, bottom } = this.element.getBoundingClientRect();
    return top >= 0 && bottom <= innerHeight;
  }

  #choose(choice) {
    if (!this.#open) return;
    this.close();
    this.onChoose(choice, this.comment.value.trim() || null);
  }
}
