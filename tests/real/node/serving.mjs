// The loop of a program with a client library: a line of JSON with a call's name and an url in, its outcome out.
import { createInterface } from "node:readline";

export const PROMPT = "Say something.";

function described(error) {
  for (let cause = error; cause; cause = cause.lastError ?? cause.cause) {
    const status = cause.status ?? cause.statusCode;
    if (status !== undefined) return { type: error.name, status, message: String(error.message) };
  }
  return { type: error?.name ?? "unknown", status: null, message: String(error?.message ?? error) };
}

// Makes the calls that standard input asks for; each is given the url of an API, with `/v1`, and returns JSON.
export async function serve(calls) {
  for await (const line of createInterface({ input: process.stdin })) {
    const order = JSON.parse(line);
    let outcome;
    try {
      outcome = { value: await calls[order.call](order.url + "/v1") };
    } catch (error) {
      outcome = { error: described(error) };
    }
    process.stdout.write(JSON.stringify(outcome) + "\n");
  }
}
