// Calls to this gateway, and event streams (those of /ui/live and of a model's answer are read by the same reader).

/** Yield the events of a body: {event, data}. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", event = "message", data = [];
  try {
    for (;;) {
      const {done, value} = await reader.read();
      text += done ? "\n\n" : value;
      const lines = text.split(/\r\n|\n/);
      text = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield {event, data: data.join("\n")};
          event = "message"; data = [];
        } else if (!line.startsWith(":")) {
          const [, name, value] = /^([^:]*):? ?(.*)$/.exec(line);
          if (name === "event") event = value;
          if (name === "data") data.push(value);
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** An answer that is none of the good ones; `status` 0: there was no answer. */
class CallError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Call the gateway; return the answer if it is good. A 401 of an admin call shows the form for the key. */
async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, {cache: "no-store", ...options});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new CallError(0, "The gateway does not answer.");
  }
  if (answer.ok) return answer;
  if (answer.status === 401 && !options.callers) askForAdminKey();
  throw new CallError(answer.status, await messageOf(answer));
}

async function messageOf(answer) {
  const text = await answer.text().catch(() => "");
  try {
    const {error} = JSON.parse(text);
    return error.message || error.code;
  } catch {
    return text.slice(0, 500) || `HTTP ${answer.status}`;
  }
}

const post = (path, body) => call(path, {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body)});
