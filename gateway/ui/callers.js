// Callers: who has a key, what it may use, and what of it is used.

function drawCallers({callers, callers_in_all: all}) {
  const place = byId("callers-table");
  if (!all) {
    place.replaceChildren(make("p", {}, "This gateway has no keys: it is open to everybody who reaches it, and limits nobody. ",
      "Keys with models and limits stand in ", make("code", {}, "GATEWAY_CONFIG"), "."));
    return;
  }
  place.replaceChildren(table([
    {head: "Caller", cell: ({name}) => make("strong", {}, name)},
    {head: "Requests", label: "requests", kind: "number", cell: (caller) => (caller.named ? amount(caller.requests) : "")},
    {head: "Failed", label: "failed", kind: "number", cell: (caller) => (caller.named ? amount(caller.failed) : "")},
    {head: "Refused", label: "refused by a limit", kind: "number", cell: (caller) => (caller.named ? amount(caller.refused) : "")},
    {head: "Tokens", label: "tokens", kind: "number", cell: (caller) => (caller.named ? amount(caller.tokens) : "")},
    {head: "Limits", label: "limits:", kind: "wide", cell: ({limits}) => (limits.length ? make("div", {}, limits.map(limitBar)) : "none")},
    {head: "Models", label: "models:", kind: "wide", cell: (caller) => (caller.models ? caller.models.join(", ") + (caller.more_models ? ` and ${caller.more_models} more` : "") : "all")},
  ], callers, "Callers, those with most requests first"),
  make("p", {class: "small"}, all > callers.length ? `The ${callers.length} with most requests, of ${amount(all)}. ` : "",
    callers.some(({named}) => !named) ? "Requests are counted for keys with a name: those of GATEWAY_CONFIG." : ""));
}

function limitBar({name, limit, used}) {
  const share = limit ? Math.min(1, used / limit) : 1, bar = make("i");
  bar.style.width = `${share * 100}%`;
  return make("div", {class: "limit"}, make("span", {}, name.replaceAll("_", " ")),
    make("span", {class: `meter${share >= 1 ? " full" : share >= 0.8 ? " high" : ""}`, "aria-hidden": "true"}, bar),
    make("span", {class: "number"}, `${amount(used)} of ${amount(limit)}`));
}
