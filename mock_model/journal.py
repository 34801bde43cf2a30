"""Which calls came and how they ended: the newest in memory, all of them in a file if one is named."""

import logging
import os
from collections import deque
from pathlib import Path
from time import time
from typing import IO, Literal

import msgspec

Ended = Literal["complete", "fault", "caller_left"]

CAPACITY = 10_000
MAX_TEXT = 256

_log = logging.getLogger("mock_model")


class Entry(msgspec.Struct):
    """One call.

    Attributes:
        time: when it came, seconds since the epoch.
        path: of its URL, clipped as the other texts of callers are.
        model: the name it asked for, or None.
        request_id: its `x-request-id`, or None.
        traceparent: as it came, or None.
        fingerprint: the same for calls with the same path and body; empty when the body was cut off.
        fault: the kind of the fault that was applied, or None.
        ended: `complete` (the caller got the whole answer, late ones and errors for wrong requests included), `fault`
            (a fault or the end of this process spoiled it), `caller_left`; None while it is under way.
        events_sent: server-sent events that went out whole, `[DONE]` included, or pieces of a sound.
        method: of the call.
        query: of its URL, decoded and clipped; in memory only, for a file may last, and a query may hold a key.
    """

    time: float
    path: str
    model: str | None = None
    request_id: str | None = None
    traceparent: str | None = None
    fingerprint: str = ""
    fault: str | None = None
    ended: Ended | None = None
    events_sent: int = 0
    method: str = ""
    query: str = ""


class _Started(msgspec.Struct, tag_field="event", tag="started"):
    """The first line of a process; `call` counts from 1 after it."""

    time: float
    pid: int


class _Arrived(msgspec.Struct, tag_field="event", tag="arrived"):
    """The line of a call that came."""

    call: int
    time: float
    path: str
    model: str | None
    request_id: str | None
    traceparent: str | None
    fingerprint: str
    fault: str | None


class _Ended(msgspec.Struct, tag_field="event", tag="ended"):
    """The line of a call that ended."""

    call: int
    time: float
    ended: Ended | None
    events_sent: int


def clip(text: str) -> str:
    """Return a caller's text, cut to what the journal keeps of it."""
    return text[:MAX_TEXT].encode(errors="replace").decode()


class Journal:
    """The calls, newest last; no more than `capacity` are kept.

    Each line of the file goes to the kernel in one write as the call comes and as it ends, so that it outlives a kill.
    """

    def __init__(self, file: Path | None = None, *, capacity: int = CAPACITY) -> None:
        self.total = 0
        self.calls: deque[Entry] = deque(maxlen=capacity)
        self._numbers: dict[int, int] = {}
        self._arrivals = 0
        self._file: IO[bytes] | None = file.open("ab", buffering=0) if file is not None else None
        self._encode = msgspec.json.Encoder().encode
        self._write(_Started(time=time(), pid=os.getpid()))

    @property
    def dropped(self) -> int:
        """Calls counted in `total` and no longer kept."""
        return self.total - len(self.calls)

    def arrive(self, entry: Entry) -> None:
        """Note a call once its body has been read, or could not be."""
        self.total += 1
        self.calls.append(entry)
        if self._file is not None:
            self._arrivals += 1
            self._numbers[id(entry)] = self._arrivals
            self._write(
                _Arrived(
                    call=self._arrivals,
                    time=entry.time,
                    path=entry.path,
                    model=entry.model,
                    request_id=entry.request_id,
                    traceparent=entry.traceparent,
                    fingerprint=entry.fingerprint,
                    fault=entry.fault,
                )
            )

    def end(self, entry: Entry, ended: Ended) -> None:
        """Note how a call ended; only the first report counts."""
        if entry.ended is not None:
            return
        entry.ended = ended
        number = self._numbers.pop(id(entry), None)
        if number is not None:
            self._write(_Ended(call=number, time=time(), ended=ended, events_sent=entry.events_sent))

    def clear(self) -> None:
        """Forget all calls, those under way included; the file stays."""
        self.total = 0
        self.calls.clear()

    def document(self) -> bytes:
        """Return the journal as JSON."""
        return self._encode({"total": self.total, "dropped": self.dropped, "calls": list(self.calls)})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: _Started | _Arrived | _Ended) -> None:
        if self._file is None:
            return
        try:
            os.write(self._file.fileno(), self._encode(line) + b"\n")
        except OSError as error:
            _log.error("cannot write the journal file; it ends here: %s", error)
            self.close()
