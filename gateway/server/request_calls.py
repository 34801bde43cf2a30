"""`GET /requests`: what became of the last requests, and why."""

import math
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from gateway.errors import InvalidRequest, NotFound
from gateway.explanation import explanation, summary
from gateway.kept_requests import has_id
from gateway.server.responses import json_response
from gateway.summary import IN_FLIGHT

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from gateway.kept_requests import KeptRequests
    from gateway.record import Record
    from gateway.server.in_flight import InFlight
    from gateway.workers.worker import Worker

    Fits = Callable[[Record], bool]

FILTERS = frozenset({"outcome", "route", "model", "backend", "caller", "slower_than", "since", "limit", "before"})
LIMIT, MAX_LIMIT = 50, 500
"""Requests of one answer: where none are asked for, and at most."""


class RequestCalls:
    """The handlers.

    Args:
        kept: the requests that have ended.
        in_flight: those under way.
        clock: of records.
        siblings: the other workers, or None.
    """

    def __init__(
        self,
        kept: "KeptRequests",
        in_flight: "InFlight",
        clock: "Callable[[], float]",
        siblings: "Worker | None" = None,
    ) -> None:
        self._siblings = siblings
        self._kept = kept
        self._in_flight = in_flight
        self._clock = clock

    async def requests(self, request: "web.Request") -> "web.Response":
        """Answer `GET /requests`: those that fit the filters, the newest first. Raises: InvalidRequest."""
        asked = _filters(request)
        listed = self.listed(asked)
        if self._siblings is not None:
            listed = await self._siblings.listed(asked, listed)
        found = listed["found"]
        after = str(found[-1]["number"]) if listed["more"] else None
        documents = [each["request"] for each in found]
        return json_response({"requests": documents, "next": after, "kept": listed["kept"], **_workers_of(listed)})

    def listed(self, asked: dict[str, str]) -> dict[str, Any]:
        """Return those that fit the filters, each with its number, and whether there are more, and how many are kept.

        Raises:
            InvalidRequest: a filter is wrong.
        """
        limit = limit_of(asked)
        before = _number(asked, "before", 0, most=1 << 62) or None
        fits, now = _fitting(asked), self._clock()
        if asked.get("outcome") == IN_FLIGHT:
            under_way = islice(filter(fits, reversed(list(self._in_flight))), limit)
            found = [(record.started_ns, record) for record in under_way]
        else:
            kept = (each for each in self._kept.newest(before) if fits(each.record))
            found = [(each.number, each.record) for each in islice(kept, limit + 1)]
        listed = [{"number": number, "request": summary(record, now)} for number, record in found[:limit]]
        return {"found": listed, "more": len(found) > limit, "kept": len(self._kept)}

    async def request(self, request: "web.Request") -> "web.Response":
        """Answer `GET /requests/{id}`: by request id or trace id, the newest that has it. Raises: NotFound."""
        id_ = request.match_info["id"]
        own = partial(self.found, id_)
        found = await self._siblings.found(id_, own) if self._siblings is not None else own()
        if found["request"] is None:
            whole = "workers" not in found or found["workers"]["missing"] == []
            hint = "" if whole else " Not all workers answered: ask again."
            raise NotFound(f"No request with this id is under way or among the {found['kept']} that are kept.{hint}")
        others = {"others_with_this_id": found["others"][:MAX_LIMIT]}
        return json_response(found["request"] | others | _workers_of(found))

    def found(self, id_: str) -> dict[str, Any]:
        """Return what is known of the newest request with this id, or None; the ids of others; how many are kept."""
        found = [record for record in self._in_flight if has_id(record, id_)][::-1] + self._kept.find(id_)
        others = [{"request_id": each.request_id, "trace_id": each.trace} for each in found[1:MAX_LIMIT]]
        request = explanation(found[0], self._clock()) if found else None
        number = found[0].started_ns if found else 0
        return {"number": number, "request": request, "others": others, "kept": len(self._kept)}


def limit_of(asked: dict[str, str]) -> int:
    """Return how many requests are asked for. Raises: InvalidRequest."""
    return _number(asked, "limit", LIMIT, most=MAX_LIMIT)


def _workers_of(document: dict[str, Any]) -> dict[str, Any]:
    """Return which workers have their part in a document, where there are several."""
    return {"workers": document["workers"]} if "workers" in document else {}


def _filters(request: "web.Request") -> dict[str, str]:
    """Return the filters that are set. Raises: InvalidRequest."""
    query = request.query
    for name in query:
        if name not in FILTERS:
            known = ", ".join(sorted(FILTERS))
            raise InvalidRequest(f"There is no such filter; there are {known}.", param=name[:64])
        if len(query.getall(name)) > 1:
            raise InvalidRequest(f"{name} is there more than once.", param=name)
    return {name: value for name, value in query.items() if value}


def _fitting(asked: dict[str, str]) -> "Fits":
    """Return a function that says whether a request fits the filters. Raises: InvalidRequest."""
    tests: list[Fits] = []
    if (outcome := asked.get("outcome")) is not None and outcome != IN_FLIGHT:
        tests.append(lambda record: record.outcome == outcome)
    if (route := asked.get("route")) is not None:
        tests.append(lambda record: record.route == route)
    if (model := asked.get("model")) is not None:
        tests.append(lambda record: model in {record.model, *(attempt.model for attempt in record.attempts)})
    if (backend := asked.get("backend")) is not None:
        tests.append(lambda record: _was_asked(record, backend))
    if (caller := asked.get("caller")) is not None:
        tests.append(lambda record: record.caller.name == caller)
    if "slower_than" in asked:
        least = _seconds(asked["slower_than"], "slower_than")
        tests.append(lambda record: record.seconds(math.inf) > least)
    if "since" in asked:
        since = _instant(asked["since"])
        tests.append(lambda record: record.started_ns >= since)
    return lambda record: all(test(record) for test in tests)


def _was_asked(record: "Record", backend: str) -> bool:
    """Return whether an attempt went to a replica, or to a backend, of this name."""
    names = {backend}
    for candidate in record.candidates:
        if candidate.backend == backend:
            names.update(candidate.replicas)
    return any(attempt.backend in names for attempt in record.attempts)


def _number(asked: dict[str, str], name: str, default: int, *, most: int) -> int:
    value = asked.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit() and len(value) < 20 and 1 <= int(value) <= most):  # noqa: PLR2004
        raise InvalidRequest(f"{name} must be a whole number from 1 to {most}.", param=name)
    return int(value)


def _seconds(value: str, name: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise InvalidRequest(f"{name} must be a number of seconds, 0 or more.", param=name)
    return seconds


def _instant(value: str) -> int:
    """Return an instant in nanoseconds since the epoch; in UTC, unless it says another zone."""
    try:
        instant = datetime.fromisoformat(value.replace(" ", "+") if "T" in value else value)
        nanoseconds = int((instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp() * 1e9)
    except (ValueError, OverflowError):
        raise InvalidRequest("since must be a time such as 2026-11-29T20:00:00Z.", param="since") from None
    return nanoseconds
