// Charts as SVG, drawn anew to whatever width there is. What one shows is also said in words, for screen readers.

import { el } from "./dom.js";

const NS = "http://www.w3.org/2000/svg";
const MARGIN = { top: 12, right: 12, bottom: 24, left: 46 };
const MINUS = "−";

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A number as people write it: 1,284 · 12.3 · 0.042. */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const digits = size >= 100 || Number.isInteger(value) ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return value.toLocaleString("en", { maximumFractionDigits: digits }).replace("-", MINUS);
}

export const percent = (share, digits = 0) => (share === null ? "–" : `${(100 * share).toFixed(digits)}%`);

/** One chart, drawn by `show(spec)`:

    title, says   its caption, and what it shows in words
    height        in pixels
    series        [{name, tone, kind: "line" | "bars" | "dots", points: [[x, y], …]}], the first one read out on pointing
    marks         horizontal lines: [{y, label, tone, below}]
    y             {from, to, log, ticks, format, tick}; from and to widen what the points need, `tick` formats the axis
    x             {format, label}
    rests         what is read out while nobody points; without it, the last value */
export class Chart {
  #spec = null;
  #plot = el("div", { class: "plot" });
  #reading = el("span", { class: "reading" });
  #title = el("span", {});
  #legend = el("ul", { class: "legend", "aria-hidden": "true" });
  #drawn = "";

  constructor(className = "") {
    this.element = el(
      "figure",
      { class: `chart ${className}` },
      el("figcaption", {}, this.#title, this.#reading),
      this.#plot,
      this.#legend,
    );
    new ResizeObserver(() => this.#draw()).observe(this.#plot);
    this.#plot.addEventListener("pointermove", (event) => this.#point(event.clientX));
    this.#plot.addEventListener("pointerleave", () => this.#point(null));
  }

  show(spec) {
    this.#spec = spec;
    this.#draw();
  }

  #draw() {
    const { title, says, series, marks = [], height = 120, x = {}, y = {} } = this.#spec ?? { series: [] };
    const width = this.#plot.clientWidth;
    const key = JSON.stringify([this.#spec, width]);
    if (!width || key === this.#drawn) return;
    this.#drawn = key;
    this.#title.textContent = title;
    const named = series.length > 1 ? series : [];
    this.#legend.replaceChildren(...named.map(({ name, tone }) => el("li", { class: tone }, name)));

    const points = series.flatMap((one) => one.points).filter(([, value]) => Number.isFinite(value));
    if (!points.length) {
      this.#plot.replaceChildren(el("p", { class: "hint" }, "No figures yet."));
      this.#reading.textContent = "";
      this.scale = null;
      return;
    }
    const xs = points.map(([at]) => at);
    const bars = series.find((one) => one.kind === "bars");
    const pad = bars ? 0.5 : 0;
    const across = linear(Math.min(...xs) - pad, Math.max(...xs) + pad, MARGIN.left, width - MARGIN.right);
    const ys = [...points.map(([, value]) => value), ...marks.map((mark) => mark.y)];
    if (y.from !== undefined) ys.push(y.from);
    if (y.to !== undefined) ys.push(y.to);
    const [low, high] = y.log ? [Math.min(...ys), Math.max(...ys)] : roomy(Math.min(...ys), Math.max(...ys), y);
    const bend = y.log ? Math.log : (value) => value;
    const level = linear(bend(low), bend(high), height - MARGIN.bottom, MARGIN.top);
    const up = (value) => level(bend(value));
    this.scale = { across, up };

    const format = y.tick ?? y.format ?? short;
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": says });
    for (const tick of y.ticks ?? ticks(low, high)) {
      const at = up(tick);
      picture.append(
        svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at }),
        svg("text", { class: "tick", x: MARGIN.left - 6, y: at + 4, "text-anchor": "end" }, format(tick)),
      );
    }
    const ends = [...new Set([Math.min(...xs), Math.max(...xs)])];
    ends.forEach((end, index) => {
      const anchor = ends.length === 1 ? "middle" : index ? "end" : "start";
      const at = across(end) + (bars ? (index ? 1 : -1) * (across(1) - across(0)) * 0.4 : 0);
      const label = (x.format ?? short)(end) + (x.label && index === ends.length - 1 ? ` ${x.label}` : "");
      picture.append(svg("text", { class: "tick", x: at, y: height - 6, "text-anchor": anchor }, label));
    });
    for (const one of series) picture.append(...draw(one, across, up, height - MARGIN.bottom));
    for (const { y: value, label, tone, below } of marks) {
      const at = up(value);
      picture.append(
        svg("line", { class: `mark ${tone}`, x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at }),
        svg("text", { class: `mark-label ${tone}`, x: width - MARGIN.right, y: below ? at + 14 : at - 5, "text-anchor": "end" }, label),
      );
    }
    this.guide = svg("line", { class: "guide", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
    picture.append(this.guide);
    this.#plot.replaceChildren(picture);
    this.#point(null);
  }

  /** Read out the step under the pointer; without one, the last. */
  #point(clientX) {
    if (!this.scale) return;
    const { series, x = {}, y = {} } = this.#spec;
    const format = y.format ?? short;
    const read = series[0].points.filter(([, value]) => Number.isFinite(value));
    if (!read.length) return;
    const at = clientX === null ? null : clientX - this.#plot.getBoundingClientRect().left;
    const distance = (point) => Math.abs(this.scale.across(point[0]) - at);
    const point = at === null ? read.at(-1) : read.reduce((best, one) => (distance(one) < distance(best) ? one : best));
    const where = this.scale.across(point[0]);
    this.guide.setAttribute("x1", where);
    this.guide.setAttribute("x2", where);
    this.guide.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at === null && this.#spec.rests) {
      this.#reading.textContent = this.#spec.rests;
      return;
    }
    const place = at === null ? "" : `${(x.format ?? short)(point[0])}${x.label ? ` ${x.label}` : ""}: `;
    const values = series.map((one) => one.points.find(([step]) => step === point[0])?.[1]).filter(Number.isFinite);
    this.#reading.textContent = place + (at === null ? values.slice(0, 1) : values).map(format).join(" · ");
  }
}

function draw({ points, tone, kind = "line" }, across, up, floor) {
  const whole = points.filter(([, value]) => Number.isFinite(value));
  if (kind === "bars") {
    const width = Math.max(1, (across(1) - across(0)) * 0.72);
    return whole
      .filter(([, value]) => value > 0)
      .map(([at, value]) => svg("rect", { class: `bar ${tone}`, x: across(at) - width / 2, y: up(value), width, height: floor - up(value), rx: Math.min(2, width / 3) }));
  }
  const line = svg("polyline", { class: `line ${tone}`, points: whole.map(([at, value]) => `${across(at)},${up(value)}`).join(" ") });
  const dotted = kind === "dots" ? whole : whole.slice(-1);
  return [line, ...dotted.map(([at, value]) => svg("circle", { class: `dot ${tone}`, cx: across(at), cy: up(value), r: 3 }))];
}

function linear(from, to, start, end) {
  const slope = to === from ? 0 : (end - start) / (to - from);
  return (value) => (slope ? start + (value - from) * slope : (start + end) / 2);
}

/** A little air above and below, so that no curve runs along an edge; never beyond what `y` allows. */
function roomy(low, high, { from, to }) {
  const air = (high - low || Math.abs(high) || 1) * 0.08;
  return [low === from ? low : low - air, high === to ? high : high + air];
}

/** A few round numbers. */
function ticks(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough) ?? power;
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

/** A share and its interval on a line from 0 to 100 %, with a notch at the half. `says` is it in words. */
export function gauge({ share, low, high }, says) {
  const at = (value) => `${2 + 96 * value}%`;
  return svg(
    "svg",
    { class: "gauge", role: "img", "aria-label": says, height: 22, width: "100%" },
    svg("line", { class: "rail", x1: at(0), x2: at(1), y1: 11, y2: 11 }),
    svg("line", { class: "notch", x1: at(0.5), x2: at(0.5), y1: 3, y2: 19 }),
    svg("line", { class: "reach", x1: at(low), x2: at(high), y1: 11, y2: 11 }),
    svg("circle", { class: "dot accent", cx: at(share), cy: 11, r: 5 }),
  );
}
