// SPDX-License-Identifier: Apache-2.0
// What a model writes, made visible: only ever put into text nodes, and with signs for what cannot be seen or would
// reorder the text around it.

// Control and format characters (invisible ones, and those that turn the direction of text), line and paragraph
// separators; not the tab.
const HIDDEN = /(?!\t)[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/u;

/** Append `text` to `parent`: as it is, but for control characters, which become small signs. */
export function appendText(parent, text) {
  let plain = "";
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  for (const character of text) {
    if (!HIDDEN.test(character)) {
      plain += character;
      continue;
    }
    flush();
    const sign = document.createElement("span");
    sign.className = "control";
    sign.textContent = signOf(character);
    parent.append(sign);
    if (character === "\n") parent.append("\n");
  }
  flush();
}

/** The sign that stands for a control character. */
export function signOf(character) {
  const code = character.codePointAt(0);
  if (character === "\n") return "↵";
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "␡";
  return `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

/** `text` on one line, for labels. */
export function spoken(text) {
  return Array.from(text, (character) => (HIDDEN.test(character) ? signOf(character) : character)).join("");
}
