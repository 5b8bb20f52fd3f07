// How an answer is shown: Markdown that the service renders and makes safe, and text as it streams in.

import { call } from "./api.js";
import { button, copy, el } from "./dom.js";

const RENDER_EVERY_MS = 1000;
const RENDERED_AT_ONCE = 200_000; // characters; the service refuses more
const policy = globalThis.trustedTypes?.createPolicy("rendered-by-the-service", { createHTML: (html) => html });

const rendered = new Map(); // text -> its HTML: a page that is drawn again must not flicker

/** The safe HTML of each text. Throws ApiError. */
async function render(texts) {
  return (await call("POST", "/v1/markdown", { texts })).html;
}

/** Show HTML that `render` gave; nothing else may ever come here. */
function show(element, html) {
  element.innerHTML = policy ? policy.createHTML(html) : html;
  for (const block of element.querySelectorAll("pre")) {
    const text = block.textContent;
    const copyIt = button("Copy code", () => copy(text, copyIt), { class: "quiet copy-code" });
    block.tabIndex = 0; // long lines scroll, so the keyboard must get there
    const frame = el("div", { class: "code" });
    block.replaceWith(frame);
    frame.append(block, copyIt);
  }
  for (const table of element.querySelectorAll("table")) {
    const frame = el("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
}

/** Show each of [text, element]: as it is at once, rendered as soon as the service has answered. */
export async function showAll(bodies) {
  const unknown = [];
  for (const [text, element] of bodies) {
    if (rendered.has(text)) show(element, rendered.get(text));
    else {
      unknown.push([text, element]);
      if (!element.childElementCount) element.append(el("div", { class: "plain" }, text));
    }
  }
  for (const part of parts(unknown)) {
    const html = await render(part.map(([text]) => text)).catch(() => null);
    if (html === null) continue; // plain text says the same
    part.forEach(([text, element], index) => {
      rendered.set(text, html[index]);
      show(element, html[index]);
    });
  }
}

/** Those that the service renders in one request, time after time. */
function* parts(bodies) {
  let part = [];
  let length = 0;
  for (const body of bodies) {
    length += body[0].length;
    if (part.length && length > RENDERED_AT_ONCE) {
      yield part;
      part = [];
      length = body[0].length;
    }
    part.push(body);
  }
  if (part.length) yield part;
}

/** A text that grows: plain where it is new, rendered up to a second ago. */
export class GrowingText {
  #waiting = "";
  #tail = document.createTextNode("");
  #painting = false;
  #rendering = false;
  #renderedAt = performance.now();

  constructor(onPaint) {
    this.text = "";
    this.element = el("div", { class: "prose", dir: "auto" }, el("span", { class: "plain" }, this.#tail));
    this.onPaint = onPaint;
  }

  add(piece) {
    this.text += piece;
    this.#waiting += piece;
    if (this.#painting) return;
    this.#painting = true;
    requestAnimationFrame(() => this.#paint());
  }

  /** Nothing more comes: show all of it, rendered. */
  async finish() {
    this.finished = true;
    this.#paint();
    await showAll([[this.text, this.element]]);
    this.onPaint();
  }

  #paint() {
    this.#painting = false;
    this.#tail.appendData(this.#waiting);
    this.#waiting = "";
    this.onPaint();
    if (!this.finished && !this.#rendering && performance.now() - this.#renderedAt > RENDER_EVERY_MS) this.#render();
  }

  async #render() {
    this.#rendering = true;
    const text = this.text;
    const html = await render([text]).catch(() => null);
    this.#rendering = false;
    this.#renderedAt = performance.now();
    if (html === null || this.finished) return;
    show(this.element, html[0]);
    this.#waiting = "";
    this.#tail = document.createTextNode(this.text.slice(text.length));
    lastBlock(this.element).append(el("span", { class: "plain" }, this.#tail));
    this.onPaint();
  }
}

const INNER = ["P", "LI", "UL", "OL", "BLOCKQUOTE", "PRE", "CODE", "H1", "H2", "H3", "H4", "H5", "H6"];

/** Where the next word belongs: the deepest block at the end. */
function lastBlock(element) {
  const frame = element.lastElementChild;
  let block = frame?.classList.contains("code") ? frame.firstElementChild : element;
  while (block.lastElementChild && INNER.includes(block.lastElementChild.tagName)) block = block.lastElementChild;
  return block;
}
