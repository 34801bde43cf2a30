// Now: rates, of the totals of two snapshots; the state of each backend; what changed while somebody looked.

const RECENT = 10; // seconds, of percentiles
const MAX_CHANGES = 50;
const snapshots = [];

const PANELS = {
  outcomes: new Panel("Requests/s", Object.entries(DOINGS).map(([colour, name]) => ({name, colour})), {bars: true, unit: rate, least: 1}),
  latency: new Panel("Latency", [{name: "99th percentile", colour: "p99"}, {name: "median", colour: "p50"}], {unit: duration, least: 0.01}),
  load: new Panel("Attempts/s", [{name: "attempts at backends", colour: "attempts"}, {name: "requests", colour: "asked"}], {unit: rate, least: 1}),
  first: new Panel("First token", [{name: "99th percentile", colour: "p99"}, {name: "median", colour: "p50"}], {unit: duration, least: 0.01}),
};

/** Take a snapshot: keep it with those of the last two minutes, and say what is different. */
function takeSnapshot(snapshot) {
  const before = snapshots.at(-1);
  const isOfOne = ({health}) => health.workers?.missing === null; // whose totals are not those of all workers
  const startedAnew = before && snapshot.health.uptime_seconds < before.health.uptime_seconds;
  if (startedAnew || (before && isOfOne(snapshot) !== isOfOne(before))) snapshots.length = 0;
  else if (before) noteChanges(before.health, snapshot.health);
  snapshots.push({...snapshot, callers: null});
  while (snapshots[0].at < snapshot.at - SPAN - 1) snapshots.shift();
}

const sum = (counts) => Object.values(counts).reduce((all, number) => all + number, 0);

function byDoing(outcomes) {
  const counts = {good: 0, backend: 0, gateway: 0, caller: 0};
  for (const [outcome, number] of Object.entries(outcomes)) counts[doing(outcome)] += number;
  return Object.values(counts);
}

/** Return a column for each snapshot but the first: `values` of the one and of an earlier one, and the seconds between them. */
function columnsOf(values, seconds = 1) {
  const latest = snapshots.at(-1).at;
  let from = 0;
  return snapshots.slice(1).map((snapshot, place) => {
    while (from < place && snapshots[from + 1].at <= snapshot.at - seconds + 0.5) from += 1;
    const age = latest - snapshot.at;
    return {age, values: values(snapshots[from], snapshot, snapshot.at - snapshots[from].at)};
  }).filter(({age}) => age < SPAN);
}

const percentiles = (name) => (before, after) => {
  const buckets = after[name].map((number, place) => number - before[name][place]);
  return [quantile(after.seconds, buckets, 0.99), quantile(after.seconds, buckets, 0.5)];
};

function drawNow() {
  const latest = snapshots.at(-1);
  const recent = snapshots.find(({at}) => at >= latest.at - 5.5);
  const seconds = Math.max(1, latest.at - recent.at);
  const earlier = byDoing(recent.requests), lately = (now, then) => (now - then) / seconds;
  const each = (values) => (before, after, span) => values(after).map((number, place) => (number - values(before)[place]) / span);
  const doings = ({requests}) => byDoing(requests), loads = ({attempts, requests}) => [sum(attempts), sum(requests)];

  PANELS.outcomes.draw(columnsOf(each(doings)), doings(latest).map((number, place) => lately(number, earlier[place])));
  PANELS.load.draw(columnsOf(each(loads)), loads(latest).map((number, place) => lately(number, loads(recent)[place])));
  for (const [panel, name] of [[PANELS.latency, "latency"], [PANELS.first, "first_token"]]) {
    const columns = columnsOf(percentiles(name), RECENT);
    panel.draw(columns, columns.at(-1)?.values ?? [null, null]);
  }
  PANELS.outcomes.empty.replaceChildren(...(sum(latest.requests) ? [] : ["No requests yet: ", make("a", {href: "#try"}, "try one"), "."]));
  drawFigures(latest, lately(latest.tokens.output, recent.tokens.output));
}

function drawFigures(latest, tokens) {
  const {health, requests} = latest;
  const pairs = [
    ["In flight", amount(health.in_flight)],
    ["Queued", amount(health.queued)],
    ["Waiting", amount(latest.waiting)],
    ["Tokens per second", rate(tokens)],
    ["Since the start", amount(sum(requests))],
    ["Not answered well", amount(sum(requests) - (requests.ok ?? 0))],
  ];
  const list = byId("figures");
  if (!list.children.length) list.append(...facts(pairs));
  pairs.forEach(([, value], place) => say(list.children[place].lastChild, value));
}

/** The backends, one below the other; `brief`: without what only a reader with time wants to know. */
class Backends {
  constructor(element, {brief}) {
    this.element = element;
    this.brief = brief;
    this.rows = new Map();
  }

  draw(backends) {
    for (const backend of backends) {
      if (!this.rows.has(backend.name)) this.rows.set(backend.name, this.row(backend.name));
      this.fill(this.rows.get(backend.name), backend);
    }
    const names = new Set(backends.map(({name}) => name));
    for (const [name, row] of this.rows) {
      if (!names.has(name)) {
        row.element.remove();
        this.rows.delete(name);
      }
    }
  }

  row(name) {
    const row = {status: make("span"), breaker: make("span"), next: make("span", {class: "next"}), facts: make("div", {class: "backend-facts"})};
    row.strip = shape("svg", {viewBox: `0 0 ${WIDE} 14`, preserveAspectRatio: "none", class: "strip", role: "img"});
    row.element = make("div", {class: "backend", "data-backend": name},
      make("div", {class: "backend-head"}, make("strong", {}, name), row.status, row.breaker, row.next), row.strip, row.facts);
    this.element.append(row.element);
    return row;
  }

  fill(row, backend) {
    const states = snapshots.map(({at, health}) => ({
      age: Math.min(SPAN, snapshots.at(-1).at - at),
      state: health.downstream.backends.find(({name}) => name === backend.name)?.breaker ?? "unknown",
    }));
    strip(row.strip, states);
    row.strip.setAttribute("aria-label", `Breaker in the last two minutes: ${changesIn(states)}`);
    row.status.className = backend.status;
    row.status.replaceChildren(make("i", {class: "dot"}), backend.status);
    row.breaker.className = `breaker-${backend.breaker}`;
    say(row.breaker, `breaker ${backend.breaker.replace("_", " ")}`);
    say(row.next, nextTry(backend));
    row.facts.replaceChildren(...this.facts(backend));
  }

  facts(backend) {
    const error = backend.last_error, probe = backend.probe;
    const parts = [
      ["in flight", amount(backend.in_flight)],
      ["last good answer", ago(backend.last_success_seconds_ago)],
      ["failures in a row", amount(backend.consecutive_failures)],
      ["probe", probe.ok === null ? "none" : `${probe.ok ? "good" : "failed"}, ${duration(probe.latency_ms / 1000)}, ${ago(probe.seconds_ago)}`],
    ];
    const shown = (this.brief ? [parts[0], parts[3]] : [...parts, ["at", backend.url]]).map(([name, value]) => make("span", {}, `${name} `, make("b", {}, value)));
    if (error) {
      const link = error.trace_id ? make("a", {href: requestLink(error.trace_id)}, "which request") : null;
      shown.push(make("span", {}, "last error ", make("b", {}, `${error.code}`), this.brief ? "" : `: ${error.message}`, ` ${ago(error.seconds_ago)} `, link));
    }
    return shown;
  }
}

/** What is wrong with the gateway itself, for as long as it is; a backend's trouble is in its own row. */
function noticesOf({config, downstream, limits, telemetry, workers}) {
  const notices = downstream.guards.filter(({tripped}) => tripped).map((guard) =>
    `The guard of route ${guard.route} took the traffic of ${targetOf(guard)} ${ago(guard.tripped_seconds_ago)}: ${failuresOf(guard)}. It gets traffic again with the next configuration.`);
  if (config.error) notices.unshift(`The new configuration is wrong, and generation ${config.generation} stays in force: ${config.error}`);
  if (limits.status === "degraded") notices.push("The limits of keys cannot be kept beyond this process now; its log says why.");
  if (workers?.missing?.length) notices.push(`Nothing is heard of ${workers.missing.length} of its workers.`);
  if (workers?.missing === null) notices.push("These are the figures of one of its workers only: the others could not be asked.");
  if (telemetry.status === "degraded") notices.push(`Spans cannot be exported now; ${amount(telemetry.spans_dropped)} have been dropped since the start.`);
  return notices;
}

const targetOf = ({backend, model}) => (model ? `${backend} (${model})` : backend);
const failuresOf = (guard) => `${(guard.error_rate * 100).toFixed(1)} % of ${amount(guard.requests)} requests had failed`;

function drawNotices(health) {
  const place = byId("notices"), notices = noticesOf(health);
  while (place.children.length > notices.length) place.lastChild.remove();
  while (place.children.length < notices.length) place.append(make("li"));
  notices.forEach((text, number) => say(place.children[number], text));
}

/** The targets that a guard watches; where none does there is no table. */
function drawGuards(guards) {
  byId("guards").replaceChildren(...(guards.length ? [make("h2", {}, "Guards"), table([
    {head: "Route", cell: ({route}) => route},
    {head: "Target", cell: (guard) => make("strong", {}, targetOf(guard))},
    {head: "Requests", label: "requests", kind: "number", cell: ({requests}) => amount(requests)},
    {head: "Failed", label: "failed", kind: "number", cell: (guard) => `${(guard.error_rate * 100).toFixed(1)} %`},
    {head: "", always: true, cell: (guard) => (guard.tripped
      ? make("span", {class: "down"}, `lost its traffic ${ago(guard.tripped_seconds_ago)}`) : make("span", {class: "ok"}, "has its traffic"))},
  ], guards, "Targets with a weight, as the guards of their routes see them")] : []));
}

function nextTry(backend) {
  if (backend.breaker === "half_open") return "one request tries it";
  if (backend.retry_in_seconds !== null) return `is tried again in ${backend.retry_in_seconds.toFixed(1)} s`;
  return backend.cooling_seconds === null ? "" : `asked to be left alone, for ${backend.cooling_seconds.toFixed(1)} s more`;
}

function changesIn(states) {
  const words = states.filter(({state}, place) => place === 0 || states[place - 1].state !== state).map(({state}) => state.replace("_", " "));
  return words.slice(-8).join(", then ");
}

/** Write down what differs between two documents of /health, and have it read aloud. */
function noteChanges(before, after) {
  const earlier = new Map(before.downstream.backends.map((backend) => [backend.name, backend]));
  for (const backend of after.downstream.backends) {
    const was = earlier.get(backend.name);
    if (!was) continue;
    if (was.breaker !== backend.breaker) {
      note(`${backend.name}: the breaker is ${backend.breaker.replace("_", " ")}, it was ${was.breaker.replace("_", " ")}`, `breaker-${backend.breaker}`);
    }
    if (was.cooling_seconds === null && backend.cooling_seconds !== null) note(`${backend.name} asked to be left alone for ${duration(backend.cooling_seconds)}`);
    if (was.probe.ok !== false && backend.probe.ok === false) note(`${backend.name}: a probe failed`);
    if (was.probe.ok === false && backend.probe.ok) note(`${backend.name}: probes are good again`);
  }
  const {generation, error} = after.config;
  if (before.config.generation !== generation) note(`the configuration is generation ${generation}`);
  else for (const [place, guard] of after.downstream.guards.entries()) {
    if (guard.tripped && !before.downstream.guards[place]?.tripped) note(`${targetOf(guard)} lost its traffic to its guard: ${failuresOf(guard)}`, "down");
  }
  if (error && before.config.error !== error) note(`a configuration was not taken: ${error}`, "down");
  if (before.limits.status !== after.limits.status) note(`limits of keys: ${after.limits.status}`, after.limits.status);
  if (before.telemetry.status !== after.telemetry.status) note(`telemetry: ${after.telemetry.status}`, after.telemetry.status);
  if (after.draining && !before.draining) note("the gateway is stopping");
}

function note(text, kind = null) {
  const changes = byId("changes");
  changes.prepend(make("li", {class: kind}, instant(new Date()), text));
  while (changes.children.length > MAX_CHANGES) changes.lastChild.remove();
  byId("no-changes").hidden = true;
  byId("said").replaceChildren(make("span", {}, text));
}

/** The buttons that break a mock model, in each place that wants them. */
const mockBars = [];
const LOOK = 3; // snapshots between two looks at what is in force: a fault can be used up
let inForce = false;

function showMock(actions) {
  for (const {element} of mockBars) element.remove();
  mockBars.length = 0;
  if (!actions.length) return;
  for (const place of ["mock-now", "mock-try"]) {
    const state = make("span", {class: "small", role: "status"});
    const element = make("section", {class: "mock", "aria-label": "Break the mock model"}, make("h2", {}, "Break the mock model"),
      make("p", {class: "row"}, actions.map(({name, label, about}) => {
        const button = make("button", {type: "button", title: about, "data-action": name, class: name === "heal" ? "primary" : null}, label);
        button.addEventListener("click", () => pressMock(post(`/ui/mock/${name}`, {}), `you pressed “${label}”: ${about[0].toLowerCase()}${about.slice(1)}`));
        return button;
      })), state);
    byId(place).append(element);
    mockBars.push({element, state});
  }
  pressMock(call("/ui/mock"), null);
}

function lookAtMock() {
  if (mockBars.length && inForce && snapshots.length % LOOK === 0) pressMock(call("/ui/mock"), null);
}

async function pressMock(asked, text) {
  let shown;
  try {
    const {faults} = await (await asked).json();
    inForce = faults.length > 0;
    shown = faults.length ? `In force: ${faults.join(", ")}` : "It is well: no faults.";
    if (text) note(text);
  } catch (error) {
    shown = error.message;
  }
  for (const {state} of mockBars) say(state, shown);
}
