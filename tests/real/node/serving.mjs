// The loop of a program with a client library: a line of JSON in with a call's name, an url and a prompt, its outcome out.
import { createInterface } from "node:readline";

function described(error) {
  for (let cause = error; cause; cause = cause.lastError ?? cause.cause) {
    const status = cause.status ?? cause.statusCode;
    if (status !== undefined) return { type: error.name, status, message: String(error.message) };
  }
  return { type: error?.name ?? "unknown", status: null, message: String(error?.message ?? error) };
}

// Makes the calls that standard input asks for; each is given the url of an API, with `/v1`, and a prompt, and returns JSON.
export async function serve(calls) {
  for await (const line of createInterface({ input: process.stdin })) {
    const order = JSON.parse(line);
    let outcome;
    try {
      outcome = { value: await calls[order.call](order.url + "/v1", order.prompt) };
    } catch (error) {
      outcome = { error: described(error) };
    }
    process.stdout.write(JSON.stringify(outcome) + "\n");
  }
}
