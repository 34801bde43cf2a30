"""What all workers have kept of the last requests."""

from operator import itemgetter
from typing import TYPE_CHECKING, Any

from gateway.workers.health_of_all import who_answered

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

Document = dict[str, Any]
_NUMBER = itemgetter("number")


def listed_of_all(lists: "Collection[Document]", limit: int, missing: "Sequence[int] | None") -> Document:
    """Return the newest requests of several lists (`RequestCalls.listed`), and whether there are more.

    Args:
        lists: of the workers that answered.
        limit: requests, at most.
        missing: the numbers of those that did not; None: nobody knows.
    """
    found = sorted((each for answer in lists for each in answer["found"]), key=_NUMBER, reverse=True)
    more = len(found) > limit or any(answer["more"] for answer in lists)
    kept = sum(answer["kept"] for answer in lists)
    return {"found": found[:limit], "more": more, "kept": kept, "workers": who_answered(lists, missing)}


def found_of_all(answers: "Collection[Document]", missing: "Sequence[int] | None") -> Document:
    """Return what several workers found by an id (`RequestCalls.found`); the newest of all is the one explained.

    Args:
        answers: of the workers that gave one.
        missing: the numbers of the others; None: nobody knows.
    """
    explained = sorted((each for each in answers if each["request"]), key=_NUMBER, reverse=True)
    known = {"kept": sum(answer["kept"] for answer in answers), "workers": who_answered(answers, missing)}
    if not explained:
        return {"number": 0, "request": None, "others": [], **known}
    first, *rest = explained
    others = [*first["others"]]
    for each in rest:
        others += [{"request_id": each["request"]["request_id"], "trace_id": each["request"]["trace_id"]}]
        others += each["others"]
    return first | {"others": others, **known}
