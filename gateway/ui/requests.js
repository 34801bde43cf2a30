// Requests: the last ones, and why each of them went as it did.

const requestLink = (id) => `#requests/${encodeURIComponent(id)}`;
const PAGE = 50;
let older = null; // the cursor of what is shown, null for the newest
let shownTotal = null;

/** Return the id by which a request is asked for: `.` and `..`, which a caller may choose, cannot stand in a path. */
const idOf = (request) => (/^\.{1,2}$/.test(request.request_id) ? request.trace_id : request.request_id);

function outcomeOf(request) {
  const kind = doing(request.outcome);
  const mark = make("i", {class: "dot"});
  mark.style.color = `var(--${kind})`;
  return make("span", {}, mark, `${request.status || ""} ${request.outcome}`.trim());
}

const COLUMNS = [
  {head: "Time", cell: (request) => make("a", {href: requestLink(idOf(request)), "data-id": request.request_id}, instant(new Date(request.started)))},
  {head: "Outcome", cell: outcomeOf},
  {head: "Model", cell: ({model}) => model},
  {head: "Backend", cell: ({backend}) => backend},
  {head: "Caller", cell: ({caller}) => caller},
  {head: "Attempts", label: "attempts", number: true, cell: ({attempts}) => attempts},
  {head: "First token", label: "first token", number: true, cell: (request) => (request.first_token_seconds === null ? "" : duration(request.first_token_seconds))},
  {head: "Took", label: "took", number: true, cell: ({seconds}) => duration(seconds)},
  {head: "Why", why: true, cell: ({why}) => why},
];

async function listRequests() {
  const query = new URLSearchParams({limit: PAGE});
  for (const [name, value] of new FormData(byId("filter"))) if (value) query.set(name, value.trim());
  if (older) query.set("before", older);
  let page;
  try {
    page = await (await call(`/requests?${query}`)).json();
  } catch (error) {
    if (error.status !== 401) say(byId("list-error"), error.message);
    return;
  }
  say(byId("list-error"), "");
  const focused = document.activeElement?.dataset?.id, place = byId("list-table");
  const nothing = [...query.keys()].length > 1 ? "No request that is kept is like this." : "No requests yet: ";
  place.replaceChildren(page.requests.length ? table(COLUMNS, page.requests, "The last requests, the newest first")
    : make("p", {}, nothing, nothing.endsWith(": ") ? make("a", {href: "#try"}, "try one") : ""));
  if (focused) [...place.querySelectorAll("a")].find(({dataset}) => dataset.id === focused)?.focus({preventScroll: true});
  byId("older").hidden = page.next === null;
  byId("older").onclick = () => {
    older = page.next;
    listRequests().then(() => byId("list-table").querySelector("a")?.focus());
  };
  byId("newest").hidden = older === null;
  say(byId("kept"), `${amount(page.kept)} requests are kept in memory; prompts and answers are not.`);
}

/** Ask again if there was a request since; what is older does not change. */
function refreshRequests(snapshot) {
  const total = sum(snapshot.requests);
  if (total === shownTotal || older !== null || !byId("one").hidden) return;
  shownTotal = total;
  listRequests();
}

/** Return the id in the address, `#requests/ID`, or an empty text. */
function idInAddress() {
  const text = /^#requests\/(.*)$/.exec(location.hash)?.[1] ?? "";
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // somebody wrote it by hand
  }
}

async function showRequest(id) {
  const place = byId("one");
  byId("list").hidden = true;
  place.hidden = false;
  const heading = make("h2", {tabindex: -1}, "Request ", make("code", {}, id));
  const back = make("p", {}, make("a", {href: "#requests"}, "All requests"));
  place.replaceChildren(back, heading);
  try {
    const request = await (await call(`/requests/${encodeURIComponent(id)}`)).json();
    if (idInAddress() !== id) return;
    place.append(...explain(request));
  } catch (error) {
    if (error.status === 401) return;
    place.append(make("p", {class: "fail"}, error.message));
  }
  heading.focus();
}

function showList() {
  byId("one").hidden = true;
  byId("list").hidden = false;
  shownTotal = null;
  listRequests();
}

const BARS = {
  queue: () => "wait", wait: () => "wait", limit: () => "wait", backoff: () => "unknown",
  attempt: (step) => (!step.outcome || step.outcome === "ok" ? "good" : step.outcome === "client_closed_request" ? "left" : "gateway"),
};

/** Return what explains a request: the document of GET /requests/{id}. */
function explain(request) {
  const {timeline = [], targets = [], attempts_made: attempts = [], events: notes = []} = request;
  const parts = [
    make("p", {}, outcomeOf(request), ". ", request.why),
    make("h3", {}, "Step by step"),
    waterfall(timeline, request.seconds),
    make("dl", {class: "facts"}, facts([
      ["Started", instant(new Date(request.started))], ["Took", duration(request.seconds)],
      ["First token", request.first_token_seconds === null ? null : duration(request.first_token_seconds)],
      ["Call", `${request.path ?? ""}${request.stream ? ", streamed" : ""}`], ["Model", request.model], ["Route", request.route],
      ["Caller", request.caller], ["Tokens in / out", request.input_tokens === null && request.output_tokens === null ? null : `${amount(request.input_tokens)} / ${amount(request.output_tokens)}`],
      ["Configuration", request.generation && `generation ${request.generation}`],
      ["Request id", make("code", {}, request.request_id)], ["Trace id", make("code", {}, request.trace_id)],
    ])),
  ];
  if (targets.length) {
    parts.push(make("h3", {}, "Where it could go"), table([
      {head: "Backend", cell: ({backend}) => backend}, {head: "Model", cell: ({model}) => model},
      {head: "Weight", label: "weight", number: true, cell: ({weight}) => weight},
      {head: "", cell: (target) => [target.drawn && "drawn", target.tried && "asked"].filter(Boolean).join(", ")},
      {head: "Why not", why: true, cell: ({why_not: why}) => why},
    ], targets, "Targets of the route, in their order"));
  }
  if (attempts.length) parts.push(make("h3", {}, "Attempts"), details(attempts, "Attempts, in their order"));
  if (notes.length) parts.push(make("h3", {}, "Events"), details(notes, "Events, in their order"));
  return parts;
}

/** Draw steps below each other, each where it lies in the whole. */
function waterfall(timeline, seconds) {
  const whole = Math.max(seconds ?? 0, ...timeline.map(({end}) => end ?? 0), 0.001);
  return make("ol", {class: "waterfall"}, timeline.map((step) => {
    const end = step.end ?? whole, bar = make("i");
    bar.style.left = `${Math.min(99, (step.start / whole) * 100)}%`;
    bar.style.width = `${Math.max(0, ((end - step.start) / whole) * 100)}%`;
    bar.style.background = `var(--${(BARS[step.kind] ?? BARS.wait)(step)})`;
    const text = [step.label, step.outcome && step.outcome !== "ok" && !String(step.label).includes(step.outcome) ? step.outcome : null].filter(Boolean).join(": ");
    return make("li", {}, make("span", {class: "label"}, text), make("span", {class: "track", "aria-hidden": "true"}, bar), make("span", {class: "number"}, duration(end - step.start)));
  }));
}

/** Return a table of whatever the rows hold: those columns that say something. */
function details(rows, caption) {
  const names = [...new Set(rows.flatMap(Object.keys))].filter((name) => rows.some((row) => row[name] !== null && row[name] !== undefined && row[name] !== ""));
  return table(names.map((name) => ({head: words(name), label: words(name), cell: (row) => plain(row[name], name)})), rows, caption);
}

const words = (name) => name.replaceAll("_", " ");

function plain(value, name) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number" && /seconds|^(at|start|end|started|ended|backoff)$/.test(name)) return duration(value);
  if (typeof value === "object") return Object.entries(value).map(([key, each]) => `${words(key)} ${plain(each, key)}`).join(", ");
  return String(value);
}
