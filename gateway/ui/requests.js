// Requests: the last ones, and why each of them went as it did.

const requestLink = (id) => `#requests/${encodeURIComponent(id)}`;
const PAGE = 50;
let older = null; // the cursor of what is shown, null for the newest
let shownTotal = null;

/** Return the id by which a request is asked for: `.` and `..`, which a caller may choose, cannot stand in a path. */
const idOf = (request) => (/^\.{1,2}$/.test(request.request_id) ? request.trace_id : request.request_id);

function markOf({outcome}) {
  const mark = make("i", {class: "dot"});
  mark.style.color = `var(--${doing(outcome)})`;
  return mark;
}

const outcomeOf = (request) => make("span", {}, markOf(request), `${request.status || ""} ${request.outcome}`.trim());

const COLUMNS = [
  {head: "Time", kind: "brief", cell: (request) => make("a", {href: requestLink(idOf(request)), "data-id": idOf(request)}, instant(new Date(request.started)))},
  {head: "Outcome", kind: "brief", cell: outcomeOf},
  {head: "Model", cell: ({model}) => model},
  {head: "Backend", kind: "brief", cell: ({backend}) => backend},
  {head: "Caller", cell: ({caller}) => caller},
  {head: "Attempts", label: "attempts", kind: "number", cell: ({attempts}) => attempts},
  {head: "First token", label: "first token", kind: "number", cell: (request) => (request.first_token_seconds === null ? "" : duration(request.first_token_seconds))},
  {head: "Took", label: "took", kind: "number", cell: ({seconds}) => duration(seconds)},
  {head: "Why", always: true, kind: "why", cell: ({why}) => why},
];

/** Say why there is none. */
function noRequests(query, kept) {
  if ([...query.keys()].length > 1) return make("p", {}, "No request that is kept is like this.");
  if (!kept && snapshots.length && sum(snapshots.at(-1).requests)) return make("p", {}, "This gateway keeps no requests: ", make("code", {}, "GATEWAY_KEPT_REQUESTS"), " is 0.");
  return make("p", {}, "No requests yet: ", make("a", {href: "#try"}, "try one"), ".");
}

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
  place.replaceChildren(page.requests.length ? table(COLUMNS, page.requests, "The last requests, the newest first") : noRequests(query, page.kept));
  if (focused) [...place.querySelectorAll("a")].find(({dataset}) => dataset.id === focused)?.focus({preventScroll: true});
  byId("older").hidden = page.next === null;
  byId("older").onclick = () => {
    older = page.next;
    listRequests().then(() => byId("list-table").querySelector("a")?.focus());
  };
  byId("newest").hidden = older === null;
  const whole = !page.workers || page.workers.missing?.length === 0;
  say(byId("kept"), `${amount(page.kept)} requests are kept in memory; prompts and answers are not.${whole ? "" : " Not all workers answered."}`);
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
  const heading = make("h2", {tabindex: -1, class: "first"}, "Request ", make("code", {}, id));
  const back = make("p", {class: "back"}, make("a", {href: "#requests"}, "All requests"));
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

/** Return the colour of a step of the timeline. */
function colourOf({kind, end, outcome}) {
  if (kind === "backoff") return "unknown";
  if (kind !== "attempt" || end === null) return "waiting";
  if (!outcome || outcome === "ok") return "good";
  return outcome === "cancelled" ? "caller" : "gateway";
}

const TARGETS = [
  {head: "Backend", cell: ({backend}) => backend},
  {head: "Model", cell: ({model}) => model},
  {head: "Weight", label: "weight", kind: "number", cell: ({weight}) => weight},
  {head: "", cell: (target) => [target.drawn && "drawn", target.tried && "asked"].filter(Boolean).join(", ")},
  {head: "Why not", label: "why not:", cell: ({why_not: why}) => why},
  {head: "Replicas", label: "replicas:", kind: "wide", cell: ({replicas = []}) =>
    replicas.map(({name, tried, why_not: why}) => `${name} ${tried ? "asked" : why ?? "not asked"}`).join(", ")},
];
const ATTEMPTS = [
  {head: "", label: "attempt", kind: "number", cell: ({number}) => number},
  {head: "Backend", cell: ({backend}) => backend},
  {head: "Model", cell: ({model}) => model},
  {head: "Outcome", cell: ({status, outcome}) => `${status ?? ""} ${outcome ?? "under way"}`.trim()},
  {head: "Then", label: "then:", cell: ({decision}) => decision},
  {head: "Breaker", label: "breaker", cell: ({breaker}) => breaker.replace("_", " ")},
  {head: "Retries left", label: "retries left", kind: "number", cell: (attempt) => attempt.budget_left},
  {head: "Time left", label: "time left", kind: "number", cell: (attempt) => duration(attempt.deadline_left)},
  {head: "What it said", kind: "wide", cell: (attempt) => [
    attempt.message, attempt.timer && `The timer ${attempt.timer} ended it.`,
    attempt.resend && "Sent again, since a kept-alive connection was dead.",
    attempt.retry_after !== null && `Asked to be left alone for ${duration(attempt.retry_after)}.`,
    ...(attempt.passed_over ?? []).map(({backend, why}) => `${backend} was passed over: ${why}.`),
    attempt.known_as && `It calls the request ${attempt.known_as}.`].filter(Boolean).join(" ")},
];
const EVENTS = [
  {head: "After", label: "after", cell: ({at}) => duration(at)},
  {head: "Event", cell: ({name}) => words(name.replace(/^gateway\./, ""))},
  {head: "", kind: "wide", cell: ({at: _at, name: _name, ...rest}) =>
    Object.entries(rest).map(([name, value]) => `${words(name)} ${/seconds/.test(name) ? duration(value) : value}`).join(", ")},
];
const words = (name) => name.replaceAll("_", " ");

/** Return what explains a request: the document of GET /requests/{id}. */
function explain(request) {
  const {timeline = [], targets = [], attempts_made: attempts = [], events: notes = [], tokens = {}} = request;
  const counted = tokens.input === null && tokens.output === null ? null : `${amount(tokens.input)} / ${amount(tokens.output)}`;
  const parts = [
    make("p", {}, markOf(request), request.why),
    make("h3", {}, "Step by step"),
    timeline.length ? waterfall(timeline, request.seconds) : make("p", {class: "small"}, "Nothing was asked and nothing waited for."),
    make("dl", {class: "facts"}, facts([
      ["Started", instant(new Date(request.started))], ["Took", duration(request.seconds)],
      ["First token", request.first_token_seconds === null ? null : duration(request.first_token_seconds)],
      ["Call", `${request.path ?? ""}${request.stream ? ", streamed" : ""}`], ["Model", request.model], ["Route", request.route],
      ["Caller", request.caller], ["Tokens in / out", counted],
      ["Counted for its limits", tokens.charged === null || tokens.charged === undefined ? null : `${amount(tokens.charged)}, ${tokens.source}`],
      ["No further attempt", request.stop_reason], ["Limit", request.limit], ["Error", request.error],
      ["Configuration", request.generation && `generation ${request.generation}`],
      ["Request id", make("code", {}, request.request_id)], ["Trace id", make("code", {}, request.trace_id)],
    ])),
  ];
  if (targets.length) parts.push(make("h3", {}, "Where it could go"), table(TARGETS, targets, "Targets of the route, in their order"));
  if (attempts.length) parts.push(make("h3", {}, "Attempts"), table(ATTEMPTS, attempts.map((attempt) => ({...attempt, known_as: attempt.backend_request_id === request.request_id ? null : attempt.backend_request_id})), "Attempts, in their order"));
  if (notes.length) parts.push(make("h3", {}, "Events"), table(EVENTS, notes, "Events, in their order"));
  const others = (request.others_with_this_id ?? []).filter((other) => other.request_id !== request.request_id);
  if (others.length) {
    parts.push(make("h3", {}, "Others with this id"),
      make("ul", {}, others.map((other) => make("li", {}, make("a", {href: requestLink(idOf(other))}, make("code", {}, other.request_id))))));
  }
  return parts;
}

/** Draw steps below each other, each where it lies in the whole. */
function waterfall(timeline, seconds) {
  const whole = Math.max(seconds ?? 0, ...timeline.map(({end}) => end ?? 0), 0.001);
  return make("ol", {class: "waterfall"}, timeline.map((step) => {
    const end = step.end ?? whole, bar = make("i");
    bar.style.left = `${Math.min(99, (step.start / whole) * 100)}%`;
    bar.style.width = `${Math.max(0, ((end - step.start) / whole) * 100)}%`;
    bar.style.background = `var(--${colourOf(step)})`;
    const text = [step.label, step.outcome && step.outcome !== "ok" && !String(step.label).includes(step.outcome) ? step.outcome : null].filter(Boolean).join(": ");
    return make("li", {}, make("span", {class: "label"}, text), make("span", {class: "track", "aria-hidden": "true"}, bar), make("span", {class: "number"}, duration(end - step.start)));
  }));
}
