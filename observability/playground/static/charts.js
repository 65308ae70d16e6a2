// SPDX-License-Identifier: Apache-2.0
// Live charts of the server's metrics: what was read now and then, drawn over the last two minutes.

import { getJson } from "./events.js";
import { svg } from "./layers.js";
import { spoken } from "./text.js";

const SECONDS = 120;
const EVERY = 1000;
const WIDTH = 240;
const HEIGHT = 74;
const LINES = 8; // kinds of lines in style.css

function tokensText(rates) {
  const most = Math.max(0, ...rates.map(({ value }) => value));
  return `${(rates.at(-1)?.value ?? 0).toFixed(0)}, at most ${most.toFixed(0)}`;
}

class Chart {
  constructor(title, parent) {
    this.title = title;
    this.value = document.createElement("output");
    this.drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.keys = document.createElement("div");
    this.keys.className = "keys";
    const figure = document.createElement("figure");
    figure.className = "chart";
    const caption = document.createElement("figcaption");
    caption.append(title, this.value);
    figure.append(caption, this.drawing, this.keys);
    parent.append(figure);
  }

  /**
   * @param {Map<string, {at: number, value: number}[]>} lines points of each line, by its name
   * @param {number} now seconds
   * @param {number} least what the top of the chart stands for at least
   * @param {string} text the newest value
   */
  draw(lines, now, least, text) {
    const values = [...lines.values()].flat().map((point) => point.value);
    const top = Math.max(least, ...values) * 1.08;
    this.value.textContent = text;
    const newest = [...lines].map(([name, points]) => `${spoken(name)} ${points.length ? round(points.at(-1).value) : "none"}`).join(", ");
    this.drawing.setAttribute("aria-label", `${this.title}, two minutes up to now: ${newest}`);
    const x = (at) => (WIDTH * (1 - (now - at) / SECONDS)).toFixed(1);
    const y = (value) => (HEIGHT - (value / top) * HEIGHT).toFixed(1);
    const drawn = [...lines.values()].map((points, index) =>
      svg("polyline", { class: `line-${index % LINES}`, points: points.map(({ at, value }) => `${x(at)},${y(value)}`).join(" ") }),
    );
    const [only] = lines.values();
    if (lines.size === 1 && only.length > 1) {
      const corners = `${x(only.at(-1).at)},${HEIGHT} ${x(only[0].at)},${HEIGHT}`;
      drawn.unshift(svg("polygon", { class: "area", points: `${drawn[0].getAttribute("points")} ${corners}` }));
    }
    this.drawing.replaceChildren(...drawn);
    const keys = [...lines].map(([name, points], index) => {
      const key = document.createElement("span");
      key.className = `line-${index % LINES}`;
      key.textContent = `${spoken(name)} ${points.length ? round(points.at(-1).value) : "–"}`;
      return key;
    });
    this.keys.replaceChildren(...(lines.size > 1 ? keys : []));
  }
}

function round(value) {
  return Number.isInteger(value) ? String(value) : value.toFixed(2);
}

/** Reads the metrics again and again and draws them. */
export class Charts {
  constructor(parent, note) {
    this.note = note;
    this.parent = parent;
    this.history = [];
    this.charts = Object.fromEntries(
      ["Tokens a second", "Sequences", "KV cache in use", "Average k since the start"].map((title) => [title, new Chart(title, parent)]),
    );
  }

  async watch() {
    for (;;) {
      if (!document.hidden) await this.look();
      await new Promise((resolve) => setTimeout(resolve, EVERY));
    }
  }

  async look() {
    const now = performance.now() / 1000;
    let numbers;
    try {
      numbers = await getJson("/api/metrics");
    } catch (error) {
      this.note.textContent = error.message;
      return;
    }
    this.note.textContent = "";
    const last = this.history.at(-1);
    // A server that was started again counts from 0.
    if (last && numbers.generation_tokens < last.numbers.generation_tokens) this.history = [];
    this.history.push({ at: now, numbers });
    this.history = this.history.filter(({ at }) => now - at <= SECONDS);
    this.draw(now);
  }

  draw(now) {
    const newest = this.history.at(-1).numbers;
    const lineOf = (read) => this.history.map(({ at, numbers }) => ({ at, value: read(numbers) }));
    const rates = this.history.slice(1).map(({ at, numbers }, index) => {
      const before = this.history[index];
      return { at, value: (numbers.generation_tokens - before.numbers.generation_tokens) / (at - before.at) };
    });
    this.charts["Tokens a second"].draw(new Map([["tokens", rates]]), now, 1, tokensText(rates));
    this.charts.Sequences.draw(
      new Map([["running", lineOf((each) => each.running)], ["waiting", lineOf((each) => each.waiting)]]),
      now, 4, "",
    );
    const used = (each) => (each.kv_blocks ? (100 * each.kv_used) / each.kv_blocks : 0);
    this.charts["KV cache in use"].draw(new Map([["used", lineOf(used)]]), now, 10, `${used(newest).toFixed(0)} % of ${newest.kv_blocks} blocks`);
    const policies = Object.keys(newest.avg_k).sort();
    const lines = new Map(
      policies.map((policy) => [policy, lineOf((each) => each.avg_k[policy] ?? NaN).filter(({ value }) => Number.isFinite(value))]),
    );
    const [first] = policies;
    this.charts["Average k since the start"].draw(lines, now, 1, policies.length === 1 ? `${spoken(first)} ${round(newest.avg_k[first])}` : "");
  }
}
