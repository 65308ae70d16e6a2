// SPDX-License-Identifier: Apache-2.0
// One side: a policy, its answer token by token, and what it took.

import { postEvents } from "./events.js";
import { appendText, spoken } from "./text.js";
import { drawLayers, nats, rounded } from "./layers.js";

// No policy's name: those have a character at least.
const SERVERS_CHOICE = "";

export class Side {
  /**
   * @param {string} name its title
   * @param {HTMLTemplateElement} template
   * @param {string|undefined} preferred the policy that it starts with, where the server has it
   */
  constructor(name, template, preferred) {
    this.name = name;
    this.preferred = preferred;
    this.root = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => this.root.querySelector(selector);
    this.title = find("h2");
    this.policy = find(".policy");
    this.policy.setAttribute("aria-label", `Policy, ${name}`);
    this.answer = find(".answer");
    this.answer.setAttribute("aria-label", `${name}: tokens, coloured by their average k`);
    this.failure = find(".failure");
    this.against = find(".against");
    this.followed = find(".followed");
    this.token = find(".token");
    this.figures = Object.fromEntries(
      ["avg-k", "saved", "reads", "speed", "first"].map((figure) => [figure, find(`.${figure}`)]),
    );
    this.legend = { from: find(".legend .from"), to: find(".legend .to") };
    this.engine = null;
    this.coming = null; // the picture that is asked for
    this.end = null; // where the end of the answer was, if it is to show the end
    this.followPointerAndKeys();
    this.clear();
  }

  /** Take over what the server serves: policies to choose from, and the trained top-k. */
  setEngine(engine) {
    const chosen = this.engine === null ? this.preferred : this.policy.value;
    this.engine = engine;
    this.policy.replaceChildren(
      ...engine.policies.map((name) => new Option(spoken(name) + (name === engine.default_policy ? " (default)" : ""), name)),
      // A request that names none takes part in the server's A/B test, where one is running.
      new Option("the server’s choice", SERVERS_CHOICE),
    );
    this.policy.value = [...engine.policies, SERVERS_CHOICE].includes(chosen) ? chosen : engine.default_policy;
    this.legend.from.textContent = "1 expert a layer";
    this.legend.to.textContent = `${engine.num_experts_per_tok} experts`;
  }

  clear() {
    this.title.textContent = this.name;
    this.pieces = [];
    this.held = { k: [], entropy: [] };
    this.sums = [];
    this.tokens = 0;
    this.seconds = 0;
    this.first = null;
    this.last = null;
    this.whole = false;
    this.answer.replaceChildren();
    this.failure.hidden = true;
    this.against.textContent = "";
    for (const figure of Object.values(this.figures)) figure.textContent = "–";
    this.figures.reads.parentElement.hidden = this.followed.hidden = true;
    this.tellAboutTokens();
  }

  /** Ask and show the answer as it comes; resolves when it has ended, was stopped or has failed. */
  async run(question, signal) {
    this.clear();
    const asked = document.createElement("span");
    asked.className = "asked";
    asked.setAttribute("role", "presentation");
    appendText(asked, question.prompt);
    this.answer.append(asked);
    this.answer.scrollTop = this.answer.scrollHeight;
    this.answer.classList.add("running");
    this.answer.setAttribute("aria-busy", "true");
    try {
      const policy = this.policy.value === SERVERS_CHOICE ? null : this.policy.value;
      for await (const { name, data } of postEvents("/api/answer", { ...question, policy }, signal)) {
        if (name === "piece") this.add(data);
        else if (name === "failure") this.fail(data.message);
        else if (name === "end") this.finish(data.seconds);
      }
      if (!this.whole && !this.failed) this.fail("The answer broke off.");
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error.message);
    } finally {
      this.answer.classList.remove("running");
      this.answer.setAttribute("aria-busy", "false");
      this.draw();
    }
  }

  /** Whether the last run ended with a sentence of what went wrong. */
  get failed() {
    return !this.failure.hidden;
  }

  fail(sentence) {
    this.failure.textContent = sentence;
    this.failure.hidden = false;
  }

  finish(seconds) {
    this.seconds = seconds;
    this.whole = true;
  }

  /** A chunk of the answer. One without text belongs to the next that has some: half a character, say. */
  add(chunk) {
    this.held.k.push(...chunk.k);
    this.held.entropy.push(...chunk.entropy);
    this.tokens += chunk.tokens;
    this.seconds = chunk.seconds;
    this.last = chunk;
    this.first ??= { seconds: chunk.seconds, tokens: chunk.tokens };
    if (chunk.variant) this.title.textContent = `${this.name}: variant ${chunk.variant}`;
    chunk.k.forEach((row, token) => this.count(row, chunk.entropy[token]));
    this.drawSoon();
    if (chunk.text) this.show(chunk.text);
  }

  /** Add a token's layers to the sums of all. */
  count(k, entropy) {
    k.forEach((each, layer) => {
      const sum = (this.sums[layer] ??= { k: 0, entropy: 0, tokens: 0 });
      sum.k += each;
      sum.entropy += entropy[layer] ?? NaN;
      sum.tokens += 1;
    });
  }

  show(text) {
    const { k, entropy } = this.held;
    this.held = { k: [], entropy: [] };
    const element = document.createElement("span");
    element.className = "piece";
    element.setAttribute("role", "option");
    element.setAttribute("aria-selected", "false");
    element.id = `${this.name.replace(/\W/g, "-")}-${this.pieces.length}`;
    const piece = { text, k, entropy, average: mean(k), element };
    element.style.setProperty("--share", this.shareOf(piece.average));
    element.setAttribute("aria-label", `${spoken(text)}, average k ${format(piece.average)}`);
    element.dataset.index = String(this.pieces.length);
    appendText(element, text);
    this.pieces.push(piece);
    this.answer.append(element);
  }

  /** How far a k is from 1 towards the trained top-k: 0 to 1. */
  shareOf(k) {
    const most = this.engine.num_experts_per_tok;
    return most > 1 && Number.isFinite(k) ? Math.min(1, Math.max(0, (k - 1) / (most - 1))) : 1;
  }

  /** Tokens a second after the first one, whose time is the prompt's. */
  get speed() {
    return this.first ? (this.tokens - this.first.tokens) / (this.seconds - this.first.seconds) : NaN;
  }

  /**
   * Draw with the next picture of the browser: tokens may come faster. Whoever has scrolled to the end stays there; to
   * ask where that is costs a layout of all the text, so it is asked once a picture.
   */
  drawSoon() {
    if (this.coming !== null) return;
    const { scrollHeight, scrollTop, clientHeight } = this.answer;
    this.end = scrollHeight - scrollTop - clientHeight < 40 ? scrollTop : null;
    this.coming = requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.coming);
    this.coming = null;
    if (this.first === null) return;
    if (this.answer.scrollTop === this.end) this.answer.scrollTop = this.answer.scrollHeight; // or its reader scrolled
    this.end = null;
    this.showFigures();
  }

  showFigures() {
    // The server's figures, over prompt and answer.
    const { avg_k: averageK, compute_saved_ratio: saved } = this.last;
    write(this.figures["avg-k"], format(averageK), `of ${this.engine.num_experts_per_tok}`);
    write(this.figures.saved, Number.isFinite(saved) ? `${(100 * saved).toFixed(1)} %` : "–", "of prompt and answer");
    const { avg_reads: reads, reads_per_token: share, followed } = this.last;
    this.figures.reads.parentElement.hidden = !Number.isFinite(share); // not every engine counts
    write(this.figures.reads, format(share), `${format(reads)} a step and layer`);
    this.followed.hidden = !followed;
    const policies = Object.entries(followed ?? {}).map(([name, tokens]) => `${spoken(name)} (${tokens} tokens)`);
    this.followed.textContent = `By the load it followed ${policies.join(", ")}.`;
    const speed = Number.isFinite(this.speed) ? this.speed.toFixed(1) : "–";
    write(this.figures.speed, speed, "after the first one");
    if (this.shown === null) this.showAllTokens();
    write(this.figures.first, `${(1000 * this.first.seconds).toFixed(0)} ms`, `${this.tokens} in ${this.seconds.toFixed(2)} s`);
  }

  /**
   * Say how this side's time compares with another's.
   * @param {Side} other
   * @param {number[]} ratios tokens a second against the other's, for each pair of runs
   * @param {boolean} together whether the two of a pair ran at once
   */
  compare(other, ratios, together) {
    if (!ratios.every(Number.isFinite)) return;
    const name = other.policy.selectedOptions[0].text;
    const sorted = [...ratios].sort((a, b) => a - b);
    const half = sorted.length >> 1;
    const median = sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
    const how = together ? "run at once" : "run one after the other";
    this.against.textContent =
      ratios.length === 1
        ? `Against ${name}: ${median.toFixed(2)} × its tokens a second in one pair, ${how}. More pairs would be a measurement.`
        : `Against ${name}: ${median.toFixed(2)} × its tokens a second, the median of ${ratios.length} pairs (${sorted[0].toFixed(2)} to ${sorted.at(-1).toFixed(2)}), ${how}.`;
  }

  followPointerAndKeys() {
    this.answer.addEventListener("pointerover", (event) => {
      const element = event.target.closest(".piece");
      if (element) this.showToken(Number(element.dataset.index));
    });
    this.answer.addEventListener("click", (event) => {
      const element = event.target.closest(".piece");
      if (element) this.select(Number(element.dataset.index));
    });
    this.answer.addEventListener("focus", () => {
      if (this.pieces.length && this.selected === null) this.select(0);
    });
    this.answer.addEventListener("keydown", (event) => {
      const from = this.selected ?? -1;
      const last = this.pieces.length - 1;
      const to = { ArrowRight: from + 1, ArrowLeft: from - 1, ArrowDown: from + 10, ArrowUp: from - 10, Home: 0, End: last };
      if (!(event.key in to) || last < 0) return;
      event.preventDefault();
      this.select(Math.min(last, Math.max(0, to[event.key])));
    });
  }

  select(index) {
    if (this.selected !== null) this.pieces[this.selected].element.setAttribute("aria-selected", "false");
    this.selected = index;
    const { element } = this.pieces[index];
    element.setAttribute("aria-selected", "true");
    element.setAttribute("aria-description", spokenLayers(lastOf(this.pieces[index].k), lastOf(this.pieces[index].entropy)));
    element.scrollIntoView({ block: "nearest" });
    this.answer.setAttribute("aria-activedescendant", element.id);
    this.showToken(index);
  }

  tellAboutTokens() {
    this.selected = null;
    this.shown = null;
    this.answer.removeAttribute("aria-activedescendant");
    this.token.replaceChildren(note("Point at a token, or step to one with the arrow keys, to see its layers."));
  }

  /** The layers over all tokens so far, while no single token is asked for. */
  showAllTokens() {
    const k = this.sums.map((sum) => sum.k / sum.tokens);
    const entropy = this.sums.map((sum) => numberOrNull(sum.entropy / sum.tokens));
    this.showLayers(note("All tokens · mean entropy of each layer’s router, in nats, and mean k. Point at a token to see its own."), k, entropy);
  }

  showToken(index) {
    this.shown = index;
    const piece = this.pieces[index];
    const word = document.createElement("b");
    appendText(word, piece.text);
    const tokens = piece.k.length > 1 ? ` (${piece.k.length} tokens; the last one’s layers)` : "";
    const rest = ` · token ${index + 1}${tokens} · average k ${format(piece.average)} · entropy of each layer’s router, in nats, and its k:`;
    this.showLayers(note(word, rest), lastOf(piece.k), lastOf(piece.entropy));
  }

  showLayers(line, k, entropy) {
    const layers = drawLayers(k, entropy, Math.log(this.engine.num_experts), (each) => this.shareOf(each));
    layers.setAttribute("aria-label", spokenLayers(k, entropy));
    this.token.replaceChildren(line, layers);
  }
}

function mean(rows) {
  const all = rows.flat();
  return all.reduce((sum, k) => sum + k, 0) / all.length;
}

function lastOf(rows) {
  return rows.at(-1) ?? [];
}

function spokenLayers(k, entropy) {
  return k.map((each, layer) => `layer ${layer}: ${nats(entropy[layer])} nats, k ${rounded(each)}`).join("; ");
}

function numberOrNull(value) {
  return Number.isFinite(value) ? value : null;
}

function note(...content) {
  const line = document.createElement("p");
  line.className = "note";
  line.append(...content);
  return line;
}

function format(k) {
  return Number.isFinite(k) ? k.toFixed(2) : "–";
}

function write(element, value, unit) {
  const small = document.createElement("small");
  small.textContent = unit;
  element.replaceChildren(value, small);
}
