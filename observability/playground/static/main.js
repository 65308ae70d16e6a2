// SPDX-License-Identifier: Apache-2.0
// The page: asks the server what it serves, runs questions on one side or two, and keeps an eye on the server.

import { Charts } from "./charts.js";
import { getJson } from "./events.js";
import { Side } from "./side.js";

const LOOK_EVERY = 2000;

const element = (id) => document.getElementById(id);
const template = element("side-template");
// The second side starts with what all experts would have said.
const sides = [new Side("Answer", template), new Side("Second answer", template, "full")];
let running = null;
let engine = null;

function showSides() {
  const count = element("compare").checked ? 2 : 1;
  element("sides").replaceChildren(...sides.slice(0, count).map((side) => side.root));
  element("sides").dataset.count = String(count);
  element("together-label").hidden = count < 2;
  element("pairs-label").hidden = count < 2;
  element("pairs").disabled = count < 2; // what is not seen must not keep the form from being sent
}

function setBusy() {
  element("run").disabled = running !== null || engine === null;
  element("stop").disabled = running === null;
}

async function run() {
  if (running !== null || engine === null) return;
  const question = {
    prompt: element("prompt").value,
    max_tokens: element("max-tokens").valueAsNumber,
    temperature: element("temperature").valueAsNumber,
    seed: element("seed").valueAsNumber,
    chat: element("chat").checked,
  };
  running = new AbortController();
  setBusy();
  try {
    if (element("compare").checked) await runPairs(question, running.signal);
    else await sides[0].run(question, running.signal);
  } finally {
    running = null;
    setBusy();
  }
}

/** Both sides, as many times as asked, and how they compare in time. */
async function runPairs(question, signal) {
  const [first, second] = sides;
  const together = element("together").checked;
  const ratios = [];
  for (const side of sides) side.clear();
  for (let pair = 0; pair < element("pairs").valueAsNumber; pair += 1) {
    if (together) {
      await Promise.all(sides.map((side) => side.run(question, signal)));
    } else {
      // Whoever comes second finds the machine as the first one left it, so they take turns.
      for (const side of pair % 2 ? [second, first] : sides) {
        await side.run(question, signal);
        if (signal.aborted || side.failed) return;
      }
    }
    if (signal.aborted || first.failed || second.failed) return;
    ratios.push(first.speed / second.speed);
    first.compare(second, ratios, together);
  }
}

function stop() {
  running?.abort();
}

async function watchServer() {
  for (;;) {
    try {
      const found = await getJson("/api/engine");
      if (JSON.stringify(found) !== JSON.stringify(engine)) {
        engine = found;
        for (const side of sides) side.setEngine(engine);
      }
      tell("up", `${found.url} · ${found.num_moe_layers} MoE layers of ${found.num_experts} experts, top-${found.num_experts_per_tok}`);
    } catch (error) {
      tell("down", error.message);
    }
    setBusy();
    await new Promise((resolve) => setTimeout(resolve, LOOK_EVERY));
  }
}

function tell(state, text) {
  const server = element("server");
  if (server.dataset.state !== state) server.dataset.state = state;
  if (element("server-text").textContent !== text) element("server-text").textContent = text;
}

element("question").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
element("stop").addEventListener("click", stop);
element("compare").addEventListener("change", showSides);
// A browser that goes back puts into the form what was there, and tells nobody.
addEventListener("pageshow", showSides);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && element("question").reportValidity()) run();
});

showSides();
watchServer();
new Charts(element("charts"), element("metrics-note")).watch();
