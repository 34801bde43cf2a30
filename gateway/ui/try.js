// Try it: a prompt, its answer as it comes, and what happened to it beside it.

const MAX_SHOWN = 200000; // characters of an answer
const PACE = 500, MOST_AT_ONCE = 3; // of "keep sending": fewer than a browser's connections to one host, so that Heal still gets through
const HEADERS = ["x-gateway-backend", "x-gateway-attempts", "server-timing", "x-request-id", "x-trace-id", "x-backend-request-id", "retry-after", "x-should-retry"];
const steady = {timer: null, underWay: 0, good: 0, failed: 0};
let sending = null; // what stops the prompt that is under way

const keyHeader = () => (byId("gateway-key").value ? {authorization: `Bearer ${byId("gateway-key").value}`} : {});

/** Fill the list of models; where callers need a key, once there is one. */
async function loadModels() {
  const needsKey = snapshots.at(-1).callers_in_all > 0;
  byId("key-row").hidden = !needsKey;
  if (needsKey && !byId("gateway-key").value) return;
  try {
    const {data} = await (await call("/v1/models", {callers: true, headers: keyHeader()})).json();
    byId("models").replaceChildren(...data.map(({id}) => make("option", {value: id})));
  } catch (error) {
    if (error.status !== 401) return;
    byId("key-row").hidden = false;
  }
}

/** Return what the form asks for: the headers, without a key, and the body. */
function promptOf() {
  const body = {messages: [{role: "user", content: byId("prompt").value}], stream: byId("stream").checked, max_tokens: Number(byId("max-tokens").value)};
  if (byId("model").value.trim()) body.model = byId("model").value.trim();
  const headers = {"content-type": "application/json", "x-request-timeout": byId("timeout").value};
  if (byId("commit").value) headers["x-gateway-commit"] = byId("commit").value;
  return {headers, body: JSON.stringify(body)};
}

function promptRequest(signal) {
  const {headers, body} = promptOf();
  return fetch("/v1/chat/completions", {method: "POST", headers: {...headers, ...keyHeader()}, body, signal, cache: "no-store"});
}

/** Show the command that sends the same; the key stays out of it. */
function showCommand() {
  if (!byId("command").open) return;
  const {headers, body} = promptOf(), quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [`curl -iN ${location.origin}/v1/chat/completions`, ...Object.entries(headers).map(([name, value]) => `-H ${quoted(`${name}: ${value}`)}`)];
  if (!byId("key-row").hidden) lines.push('-H "authorization: Bearer $GATEWAY_KEY"');
  say(byId("command-text"), [...lines, `-d ${quoted(body)}`].join(" \\\n  "));
}

async function send() {
  sending?.abort();
  const own = sending = new AbortController();
  const text = document.createTextNode(""), began = performance.now();
  const status = (words, bad = false) => {
    byId("answer-status").className = bad ? "fail" : "small";
    say(byId("answer-status"), words);
  };
  byId("answer").replaceChildren(text);
  byId("answer-headers").replaceChildren();
  byId("why").replaceChildren(make("p", {class: "small"}, "It is still under way."));
  byId("stop").disabled = false;
  status("Waiting for the answer.");
  let id = null, first = null;
  const took = () => duration((performance.now() - began) / 1000) + (first === null ? "" : `, the first text after ${duration(first)}`);
  try {
    const answer = await promptRequest(own.signal);
    id = answer.headers.get("x-request-id");
    byId("answer-headers").replaceChildren(...facts(HEADERS.map((name) => [name, answer.headers.get(name)])));
    if (!answer.ok) {
      if (answer.status === 401) byId("key-row").hidden = false;
      status(`${answer.status} after ${took()}: ${await messageOf(answer)}`, true);
    } else {
      for await (const piece of pieces(answer)) {
        if (piece.error) throw new CallError(answer.status, `The answer ended with an error: ${piece.error}`);
        first ??= (performance.now() - began) / 1000;
        if (text.length < MAX_SHOWN) text.appendData(piece.text);
      }
      status(`${answer.status}, complete after ${took()}`);
    }
  } catch (error) {
    if (own.signal.aborted) status(`Stopped after ${took()}`);
    else if (error instanceof CallError) status(`After ${took()}: ${error.message}`, true);
    else status(id ? `After ${took()}: the connection ended before the answer was complete.` : "The gateway does not answer.", true);
  }
  if (sending !== own) return;
  sending = null;
  byId("stop").disabled = true;
  if (id) await showWhy(id);
}

/** Yield the texts of an answer, {text}, and the error that it holds, {error}. */
async function* pieces(answer) {
  if (!(answer.headers.get("content-type") ?? "").startsWith("text/event-stream")) {
    const {choices} = await answer.json();
    yield {text: choices?.[0]?.message?.content ?? ""};
    return;
  }
  for await (const {data} of events(answer.body)) {
    if (data === "[DONE]") continue;
    const {error, choices} = JSON.parse(data);
    if (error) yield {error: error.message ?? String(error)};
    const delta = choices?.[0]?.delta, text = delta?.content ?? delta?.reasoning_content ?? delta?.reasoning;
    if (typeof text === "string" && text) yield {text};
  }
}

/** Show the explanation of a request; a moment after the last byte of a stream it may still be under way. */
async function showWhy(id) {
  for (let tries = 0; tries < 10; tries += 1) {
    try {
      const request = await (await call(`/requests/${encodeURIComponent(id)}`)).json();
      if (sending) return;
      byId("why").replaceChildren(...explain(request), make("p", {}, make("a", {href: requestLink(id)}, "This request alone")));
      if (request.outcome !== "in_flight") return;
    } catch (error) {
      byId("why").replaceChildren(make("p", {class: "small"}, error.message));
      if (error.status !== 404) return;
    }
    await new Promise((done) => { setTimeout(done, 200); });
  }
}

/** Send one prompt of many: only how it ended is told. */
async function sendOneMore() {
  if (document.hidden || steady.underWay >= MOST_AT_ONCE || !byId("prompt-form").checkValidity()) return;
  steady.underWay += 1;
  try {
    const answer = await promptRequest();
    let good = answer.ok;
    if (good) for await (const piece of pieces(answer)) good = good && !piece.error;
    steady[good ? "good" : "failed"] += 1;
  } catch {
    steady.failed += 1;
  }
  steady.underWay -= 1;
  if (steady.timer) say(byId("answer-status"), `Sending two a second: ${steady.good} good, ${steady.failed} failed.`);
}

function keepSending(wanted) {
  clearInterval(steady.timer);
  steady.timer = wanted ? setInterval(sendOneMore, PACE) : null;
  if (wanted) Object.assign(steady, {good: 0, failed: 0});
}

byId("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("prompt-form").requestSubmit();
});
byId("prompt-form").addEventListener("input", showCommand);
byId("command").addEventListener("toggle", showCommand);
byId("stop").addEventListener("click", () => sending?.abort());
byId("keep-sending").addEventListener("change", ({target}) => keepSending(target.checked));
byId("gateway-key").addEventListener("change", loadModels);
