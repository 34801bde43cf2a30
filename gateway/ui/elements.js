// Elements, made of text alone: names of models and ids of requests come from callers, and nothing here becomes HTML.

const byId = (id) => document.getElementById(id);

/** Return an element. Attributes that are false or null are left out; children are nodes and texts. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined).map((child) =>
    child instanceof Node ? child : String(child)));
  return element;
}

function shape(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** Set an element's text, if it is another one: what has not changed is not read aloud again. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const isNothing = (value) => value === null || value === undefined || value === "";

/**
 * Return a table. A column is {head, label, cell, kind, always}: `cell` gives a row's node or text, `label` stands before
 * it where there is no room for a head, `kind` is a class. A column that is empty in all rows is left out, unless `always`.
 */
function table(columns, rows, caption) {
  const filled = columns.map((column) => ({...column, cells: rows.map(column.cell)}))
    .filter(({cells, always}) => always || !cells.every(isNothing));
  return make("div", {class: "table"}, make("table", {},
    make("caption", {class: "unseen"}, caption),
    make("thead", {}, make("tr", {}, filled.map(({head, kind}) => make("th", {scope: "col", class: kind}, head)))),
    make("tbody", {}, rows.map((_row, place) => make("tr", {}, filled.map(({cells, kind, label}) =>
      make("td", {class: kind, "data-label": label}, cells[place] ?? "")))))));
}

const NONE = "–";

/** Return a duration, in seconds, as people read it. */
function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 0.0095) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

const ago = (seconds) => {
  if (seconds === null || seconds === undefined) return NONE;
  return `${seconds < 119.5 ? `${Math.round(Math.max(0, seconds))} s` : duration(seconds)} ago`;
};

const amount = (number) => (number === null || number === undefined ? NONE : number.toLocaleString("en"));

/** Return a rate: two digits are enough. */
function rate(number) {
  if (number >= 10) return amount(Math.round(number));
  return number === 0 ? "0" : number.toFixed(number >= 1 ? 1 : 2).replace(/\.?0+$/, "") || "0";
}

const ofDay = new Intl.DateTimeFormat(undefined, {hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23"});
const ofYear = new Intl.DateTimeFormat(undefined, {dateStyle: "medium", timeStyle: "medium"});

/** Return an instant in the reader's own zone; the whole of it when pointed at. */
function instant(date) {
  return make("time", {datetime: date.toISOString(), title: ofYear.format(date)}, ofDay.format(date));
}

/** Return the pairs of a description list; those without a value are left out. */
function facts(pairs) {
  return pairs.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) =>
    make("div", {class: String(value).length > 80 ? "whole" : null}, make("dt", {}, name), make("dd", {}, value)));
}

/** The outcomes that are the caller's own doing: it left, is beyond its limits, or its request is wrong. */
const CALLERS_OWN = new Set(["client_closed_request", "headers_too_large", "invalid_api_key", "invalid_json", "invalid_request",
  "method_not_allowed", "model_not_allowed", "model_not_found", "not_found", "rate_limit_exceeded", "request_timeout",
  "request_too_large", "unsupported_media_type"]);

/** Return good, backend, gateway, caller or waiting: whose doing an outcome is. The words are those of the gateway's metrics. */
function doing(outcome) {
  if (outcome === "ok") return "good";
  if (outcome === "in_flight") return "waiting";
  if (CALLERS_OWN.has(outcome)) return "caller";
  return outcome.startsWith("backend_") && outcome !== "backend_unavailable" ? "backend" : "gateway";
}

const DOINGS = {good: "good", backend: "backend's error", gateway: "gateway's error", caller: "caller's own"};
