// Votes on their way: kept in this browser until the service has them on disk.

import { call } from "./api.js";

const RETRY_MS = 10_000;

export class Outbox {
  #name;
  #sending = false;
  #timer = null;

  /**
   * `onSent(vote, answer)`; `onKept(error)` while votes wait; `onRefused(vote, error)` when one can never be cast;
   * `onEmpty()` when none waits any more, whichever window sent the last.
   */
  constructor(keyId, { onSent, onKept, onRefused, onEmpty }) {
    this.#name = `nightshift.votes.${keyId}`; // another user of this browser must not cast them
    Object.assign(this, { onSent, onKept, onRefused, onEmpty });
    addEventListener("online", () => this.send());
    // Another window sends its own votes; all that matters here is that none waits any more.
    addEventListener("storage", () => this.waiting.length || this.send());
    this.send();
  }

  /** `vote`: {comparison, choice, comment}. A later vote on the same comparison takes the place of an earlier one. */
  add(vote) {
    this.#keep([...this.waiting.filter((one) => one.comparison !== vote.comparison), vote]);
    return this.send();
  }

  get waiting() {
    return JSON.parse(localStorage.getItem(this.#name) ?? "[]");
  }

  async send() {
    clearTimeout(this.#timer);
    if (this.#sending) return;
    this.#sending = true;
    try {
      for (let vote; (vote = this.waiting[0]); ) {
        const { comparison, choice, comment } = vote;
        try {
          const answer = await call("POST", `/v1/comparisons/${comparison}/vote`, { choice, comment });
          this.#forget(vote);
          this.onSent(vote, answer);
        } catch (error) {
          if (error.passing) {
            this.#timer = setTimeout(() => this.send(), RETRY_MS);
            this.onKept(error);
            return;
          }
          this.#forget(vote);
          this.onRefused(vote, error);
        }
      }
    } finally {
      this.#sending = false;
    }
    this.onEmpty();
  }

  #forget(vote) {
    const same = JSON.stringify(vote);
    this.#keep(this.waiting.filter((one) => JSON.stringify(one) !== same));
  }

  #keep(votes) {
    localStorage.setItem(this.#name, JSON.stringify(votes));
  }
}
