// The page: its views, the stream of snapshots, and the form for the admin key.

const VIEWS = ["now", "requests", "callers", "try"];
const RETRY = 2000, SILENCE = 6000; // milliseconds
const backendLists = [new Backends(byId("backends"), {brief: false}), new Backends(byId("backends-try"), {brief: true})];
const tabs = VIEWS.map((name) => byId(`tab-${name}`)), sections = VIEWS.map((name) => byId(`view-${name}`));
let view = null, looking = null, admitted = null;

byId("panels").append(...Object.values(PANELS).map(({element}) => element));

/** Show the view that the address names: #now, #requests, #requests/ID, #callers, #try. */
function route({focus}) {
  const name = location.hash.slice(1).split("/")[0], id = idInAddress();
  const wanted = VIEWS.includes(name) ? name : "now", changed = wanted !== view;
  view = wanted;
  for (const [place, tab] of tabs.entries()) {
    const selected = VIEWS[place] === view;
    tab.setAttribute("aria-selected", selected);
    tab.tabIndex = selected ? 0 : -1;
    sections[place].hidden = !selected;
  }
  if (view === "requests") {
    if (id) showRequest(id);
    else showList();
  }
  if (view === "try" && changed && snapshots.length) loadModels();
  if (snapshots.length) draw(snapshots.at(-1));
  if (focus && changed && !id) sections[VIEWS.indexOf(view)].focus({preventScroll: true});
}

/** Go to a view by its tab, which keeps the focus. */
function go(name) {
  if (location.hash !== `#${name}`) history.pushState(null, "", `#${name}`);
  route({focus: false});
}

function draw(snapshot) {
  const {health} = snapshot, status = byId("status");
  status.className = `pill ${health.draining ? "degraded" : health.status}`;
  say(status, health.draining ? "stopping" : health.status);
  say(byId("about"), `version ${health.version} · up for ${duration(health.uptime_seconds)} · configuration`);
  say(byId("generation"), `generation ${health.config.generation}`);
  byId("generation").hidden = false;
  drawNotices(health);
  document.title = `${health.status === "ok" ? "" : `${health.status} · `}LLM gateway`;
  if (view === "now") {
    drawNow();
    backendLists[0].draw(health.downstream.backends);
    drawGuards(health.downstream.guards);
  }
  if (view === "try") backendLists[1].draw(health.downstream.backends);
  if (view === "callers" && snapshot.callers) drawCallers(snapshot);
  if (view === "requests" && snapshot.callers) refreshRequests(snapshot);
  const names = health.downstream.backends.map(({name}) => name).slice(0, 100), list = byId("backend-names");
  if (list.children.length !== names.length) list.replaceChildren(...names.map((value) => make("option", {value})));
  const outcomes = ["in_flight", ...Object.keys(snapshot.requests).sort()], known = byId("outcomes");
  if (known.children.length !== outcomes.length) known.replaceChildren(...outcomes.map((value) => make("option", {value})));
}

function showBanner(text) {
  byId("banner").hidden = text === null;
  say(byId("banner"), text ?? "");
  document.body.classList.toggle("stale", text !== null);
}

/** Follow the snapshots for as long as somebody looks; a page in the background asks for nothing. */
async function follow() {
  for (;;) {
    if (document.hidden) await once(document, "visibilitychange");
    if (admitted) await admitted.promise;
    looking = new AbortController();
    try {
      await read(looking);
    } catch (error) {
      if (document.hidden || error.status === 401) continue;
      showBanner(`${error instanceof CallError ? error.message : "The gateway does not answer."} This page shows what was last known, and tries again.`);
      if (!snapshots.length) say(byId("status"), "unknown");
      await new Promise((done) => { setTimeout(done, RETRY); });
    }
  }
}

const once = (target, event) => new Promise((done) => { target.addEventListener(event, done, {once: true}); });

async function read(controller) {
  let watch = null;
  const heard = () => {
    clearTimeout(watch);
    watch = setTimeout(() => controller.abort(), SILENCE);
  };
  try {
    heard();
    const answer = await call("/ui/live", {signal: controller.signal});
    for await (const {event, data} of events(answer.body)) {
      heard();
      const document_ = JSON.parse(data);
      if (event === "hello") showMock(document_.mock);
      if (event === "bye") throw new CallError(503, "The gateway is stopping.");
      if (event === "now") {
        showBanner(null);
        takeSnapshot(document_);
        draw(document_);
        if (view === "try" && snapshots.length === 1) loadModels();
        lookAtMock();
      }
    }
    throw new CallError(0, "The gateway does not answer.");
  } finally {
    clearTimeout(watch);
  }
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) looking?.abort();
});

/** Show the form for the key in place of everything else, until it was the right one. */
function askForAdminKey() {
  if (admitted) return;
  let done;
  admitted = {promise: new Promise((resolve) => { done = resolve; })};
  admitted.done = done;
  byId("login").hidden = false;
  byId("views").hidden = true;
  byId("tabs").hidden = true;
  showBanner(null);
  say(byId("status"), "locked");
  byId("admin-key").focus();
}

byId("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = byId("admin-key");
  try {
    await post("/ui/login", {key: field.value});
  } catch (error) {
    say(byId("login-error"), error.status === 401 ? "This is not the admin key." : error.message);
    field.select();
    return;
  }
  field.value = "";
  say(byId("login-error"), "");
  byId("login").hidden = true;
  byId("views").hidden = false;
  byId("tabs").hidden = false;
  const {done} = admitted;
  admitted = null;
  done();
  route({focus: false});
  sections[VIEWS.indexOf(view)].focus({preventScroll: true});
});

for (const [place, tab] of tabs.entries()) {
  tab.addEventListener("click", () => go(VIEWS[place]));
  tab.addEventListener("keydown", (event) => {
    const moves = {ArrowRight: place + 1, ArrowLeft: place - 1 + tabs.length, Home: 0, End: tabs.length - 1};
    if (!(event.key in moves)) return;
    event.preventDefault();
    const next = moves[event.key] % tabs.length;
    tabs[next].focus();
    go(VIEWS[next]);
  });
}
byId("filter").addEventListener("submit", (event) => {
  event.preventDefault();
  older = null;
  listRequests();
});
byId("filter").addEventListener("reset", () => {
  older = null;
  setTimeout(listRequests);
});
byId("newest").addEventListener("click", () => {
  older = null;
  listRequests();
});
byId("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names a view, and stays
  byId("main").focus();
});
window.addEventListener("hashchange", () => route({focus: true})); // by a link, or by going back
route({focus: false});
follow();
