"""A span as plain data, between a request's record and its encoding."""

from msgspec import Struct

Value = str | int | float | bool | list[str]
SERVER, CLIENT = 2, 3
"""Span kinds, as in OTLP."""
UNSET, ERROR = 0, 2
"""Status codes, as in OTLP."""


class Shared:
    """What many spans have in common: name, kind and attributes; `encoded` keeps its bytes once it was encoded."""

    __slots__ = ("attributes", "encoded", "kind", "name")

    def __init__(self, name: str, kind: int, attributes: list[tuple[str, Value]]) -> None:
        self.name = name
        self.kind = kind
        self.attributes = attributes
        self.encoded: bytes | None = None


class SpanData(Struct, eq=False):
    """One span. Instants are nanoseconds since the epoch; ids are integers; `parent_id` 0 = none.

    Attributes:
        shared: what recurs in many spans.
        own: the attributes that do not.
        events: (instant, name, attributes) in order.
        error: the description of an ERROR status, or None.
        trace_state: the caller's `tracestate`, or None.
    """

    shared: Shared
    trace_id: int
    span_id: int
    parent_id: int
    own: list[tuple[str, Value]] = []
    start: int = 0
    end: int = 0
    events: list[tuple[int, str, list[tuple[str, Value]]]] = []
    status: int = UNSET
    error: str | None = None
    trace_state: str | None = None

    @property
    def parent_is_remote(self) -> bool:
        """Whether the parent belongs to another process: a SERVER span's is the caller's."""
        return self.shared.kind == SERVER

    @property
    def attributes(self) -> list[tuple[str, Value]]:
        """All attributes."""
        return [*self.shared.attributes, *self.own]
