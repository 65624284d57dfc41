// The stream of changes, read with fetch so that a token can go with it. It comes back by itself.

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 8000;
const SILENCE_MS = 10000;

/**
 * Follow the stream for ever. `told(part, value)` hears each part, `changed(state)` hears of the
 * connection: "connecting", "live", "lost" or "locked" (a token is needed).
 */
export async function follow(url, headers, told, changed) {
  let wait = FIRST_WAIT_MS;
  for (;;) {
    try {
      await listen(url, headers(), (part, value) => {
        wait = FIRST_WAIT_MS;
        changed("live");
        told(part, value);
      });
      changed("lost");
    } catch (error) {
      changed(error instanceof Locked ? "locked" : "lost");
    }
    await new Promise((resume) => setTimeout(resume, wait));
    wait = Math.min(2 * wait, LONGEST_WAIT_MS);
  }
}

class Locked extends Error {}

async function listen(url, headers, told) {
  const giveUp = new AbortController();
  let silence = setTimeout(() => giveUp.abort(), SILENCE_MS);
  try {
    const answer = await fetch(url, { headers, signal: giveUp.signal, cache: "no-store" });
    if (answer.status === 401) throw new Locked();
    if (!answer.ok) throw new Error(`${url} answered ${answer.status}`);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(silence);
      silence = setTimeout(() => giveUp.abort(), SILENCE_MS);
      const messages = (buffer + value).split("\n\n");
      buffer = messages.pop();
      for (const message of messages) deliver(message, told);
    }
  } finally {
    clearTimeout(silence);
  }
}

function deliver(message, told) {
  const fields = message.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]);
  const { event, data } = Object.fromEntries(fields);
  told(event, JSON.parse(data));
}
