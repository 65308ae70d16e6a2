// SPDX-License-Identifier: Apache-2.0
// Answers of the page's own server.

/** JSON of a GET, or an Error with the server's sentence. */
export async function getJson(path) {
  return read(await reach(path, {}));
}

/** Events of a POST, as {name, data}, until the stream ends or `signal` aborts it. */
export async function* postEvents(path, body, signal) {
  const response = await reach(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) await read(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The playground's own server broke off: is `adaptive-k playground` still running?");
    }
    if (part.done) return;
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const [name, data] = event.split("\n");
      yield { name: name.slice("event: ".length), data: JSON.parse(data.slice("data: ".length)) };
    }
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The playground's own server does not answer: is `adaptive-k playground` still running?");
  }
}

async function read(response) {
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}
