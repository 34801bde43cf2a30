"""Which call a path stands for: with or without `/v1`, and the right path for one that is nearly right."""

from difflib import get_close_matches

from gateway.dialects.dialect import Dialect
from gateway.dialects.model_list import MODELS
from gateway.dialects.openai.responses import RESPONSES
from gateway.dialects.openai.stored_responses import template_of
from gateway.dialects.table import BY_PATH, DIALECTS

MODEL = MODELS + "/{id}"
SERVICE = frozenset({"/health", "/livez", "/readyz", "/metrics"})
"""The calls that ask how the gateway is."""


def forms_of(path: str) -> tuple[str, ...]:
    """Return a path below `/v1` as it is and without `/v1`: some clients are given a base url without it."""
    return tuple(dict.fromkeys((path, path.removeprefix("/v1"))))


CANONICAL = {form: path for path in (*BY_PATH, MODELS) for form in forms_of(path)} | {"/": "/"}
"""The path that records know, for each form of it."""
MAX_PARTS = max(path.count("/") for path in BY_PATH)
"""Of the path of a call."""
LONGEST_NEAR = 100
"""Characters of a path that is compared with those that are known, which takes the longer the longer it is."""
NEAR = 0.85
"""How alike two paths are, from 0 to 1, of which one may be meant by the other."""
_BELOW_RESPONSES = tuple(f"{form}/" for form in forms_of(RESPONSES))
_BELOW_MODELS = tuple(f"{form}/" for form in forms_of(MODELS))


def known_path(path: str) -> str | None:
    """Return the path or template that records know a path by, None for an unknown one."""
    known = CANONICAL.get(path)
    if known is None and path.startswith(_BELOW_MODELS) and path not in _BELOW_MODELS:
        return MODEL
    if known is None and path.startswith(_BELOW_RESPONSES):
        return template_of(path.partition("/responses/")[2])
    return known


def needs_key(path: str, known: str | None) -> bool:
    """Return whether a path asks for a key: every call that is forwarded or lists models, and all of `/v1`."""
    return known not in {None, "/"} or path.startswith(("/v1", *_BELOW_RESPONSES))


def right_path(path: str) -> str | None:
    """Return the path that was meant where slashes, letter case or a second `/v1` are wrong, or None."""
    straight = "/" + "/".join(_parts(path))
    return straight if straight in SERVICE else known_path(straight)


def near_path(path: str) -> str | None:
    """Return the path that may have been meant by one at which there is nothing: the most alike, or None."""
    if len(path) > LONGEST_NEAR:
        return None
    found = get_close_matches(path.lower(), (CANONICAL.keys() | SERVICE) - {"/"}, n=1, cutoff=NEAR)
    return CANONICAL.get(found[0], found[0]) if found else None


def call_at_the_end(base: str) -> str | None:
    """Return the path of the call with which a backend's url ends, without `/v1`; None for a base url."""
    calls = (path.removeprefix("/v1") for path in (*BY_PATH, MODELS))
    return max((call for call in calls if base.rstrip("/").endswith(call)), key=len, default=None)


def worded_by(path: str) -> Dialect:
    """Return the dialect that words the errors of a path: that of the call that it is, nearly is, or is below."""
    parts = _parts(path)[:MAX_PARTS]
    while parts:
        dialect = BY_PATH.get(CANONICAL.get("/" + "/".join(parts), ""))
        if dialect is not None:
            return dialect
        del parts[-1]
    return DIALECTS[0]


def _parts(path: str) -> list[str]:
    """Return the parts of a path in lower case, without empty ones and a second `/v1`."""
    parts = [part for part in path.lower().split("/") if part]
    first = 0
    while parts[first : first + 2] == ["v1", "v1"]:
        first += 1
    return parts[first:]
