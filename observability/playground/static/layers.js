// SPDX-License-Identifier: Apache-2.0
// A token's layers: a bar for each, as high as the router's entropy, coloured by k.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 92;
const BASE = 68;
const TOP = 14;

/** An SVG element with these attributes and text. */
export function svg(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/**
 * Bars of the layers of one token.
 * @param {number[]} k experts that ran, by layer
 * @param {(number|null)[]} entropy in nats, by layer; null is not a number
 * @param {number} most the largest entropy that there can be
 * @param {(k: number) => number} shareOf a k's place in the colours
 */
export function drawLayers(k, entropy, most, shareOf) {
  const step = Math.max(26, Math.min(64, 520 / Math.max(1, k.length)));
  const width = step * k.length;
  const drawing = svg("svg", { class: "layers", viewBox: `0 0 ${width} ${HEIGHT}`, preserveAspectRatio: "xMinYMid meet", role: "img" });
  k.forEach((each, layer) => {
    const middle = (layer + 0.5) * step;
    const height = Math.max(1, ((entropy[layer] ?? most) / most) * (BASE - TOP));
    const bar = svg("rect", { x: middle - step * 0.3, y: BASE - height, width: step * 0.6, height, rx: 1.5 });
    bar.style.setProperty("--share", shareOf(each));
    drawing.append(
      bar,
      svg("text", { x: middle, y: BASE - height - 3, class: "nats" }, nats(entropy[layer])),
      svg("text", { x: middle, y: BASE + 11 }, `k ${rounded(each)}`),
      svg("text", { x: middle, y: BASE + 22 }, `L${layer}`),
    );
  });
  return drawing;
}

/** A k, or a mean of some, as text. */
export function rounded(k) {
  return Number.isInteger(k) ? String(k) : k.toFixed(2);
}

/** An entropy as text; null is not a number. */
export function nats(value) {
  return typeof value === "number" ? value.toFixed(2) : "NaN";
}
