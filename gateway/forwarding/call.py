"""One request on its way to a backend, and the place where its answer goes."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from gateway.errors import NoSuchPath, NoSuchResponse, drop_frames
from gateway.policy.fingerprints import fingerprint

if TYPE_CHECKING:
    from gateway.dialects.dialect import Prompt, StreamState
    from gateway.errors import BackendError
    from gateway.forwarding.charge import Charge
    from gateway.policy.byte_budget import Share
    from gateway.policy.deadline import Deadline
    from gateway.policy.outage import Outage
    from gateway.policy.pool import Target
    from gateway.policy.replica import Replica
    from gateway.record import AttemptRecord, Record
    from gateway.settings import Commit


Remember = Callable[[str | None, str, str], None]
"""Takes the id of an answer, the name of the replica that gave it, and the model that was asked for."""
HeldUp = Callable[[int], AbstractContextManager[None]]
"""Surrounds a wait for a caller who has yet to take so many bytes."""

NOWHERE = (NoSuchResponse, NoSuchPath)
"""What a replica answers that does not know a stored response, or has none at all."""


class StreamSink(Protocol):
    """The caller's side of an answer that is sent as it comes.

    Attributes:
        committed: the first byte of a backend's answer has gone out: nothing is retried any more.
    """

    committed: bool

    async def commit(
        self,
        headers: Mapping[str, str],
        events: bytes,
        state: "StreamState | None",
        held_up: "HeldUp",
        *,
        status: int = 200,
        length: int | None = None,
    ) -> None:
        """Send the status, the headers and the first events; waits while the caller does not read.

        Args:
            headers: of the answer.
            events: bytes.
            state: how far the stream has come, now and later; None where nobody reads it.
            held_up: surrounds each wait for a caller who does not read.
            status: of HTTP.
            length: of the whole body in bytes, None where that is not known.

        Raises:
            CallerLeft: nobody is there any more.
        """

    async def write(self, events: bytes) -> None:
        """Send further bytes, of a stream whole events; waits while the caller does not read. Raises: CallerLeft."""

    async def end(self) -> None:
        """End a complete answer; waits while the caller does not read. Raises: CallerLeft."""


class WholeAnswer(Struct, eq=False):
    """An unstreamed answer: status, the headers that pass, body."""

    status: int
    headers: dict[str, str]
    body: bytes


class Call(Struct, eq=False):
    """What is asked, how long it may take, and where the answer goes.

    Attributes:
        prompt: the checked request.
        model: the one it is for: the caller's, or the default.
        deadline: of the whole request.
        record: what happens is noted in it.
        sink: where an answer goes that is sent as it comes: a stream, or what is passed through; None for others.
        caller: who asks: the key, else the address.
        charge: what counts for the limits of its key; None where it has none.
        share: holds its bytes.
        query: of the caller's url, encoded, where it goes on; empty for none.
        headers: the caller's that go to the backend, names in lower case.
        commit: when it begins to go out: with its first content, with its first answer, or when it is complete.
        remember: called with the id of a good answer, the id of its replica and the model sent; None: nobody asks.
        body: the bytes for the target at hand, once there is one.
        answer: an unstreamed answer, once it is there.
        targets: where it may go, in order; target: the one at hand, at first the first one.
        failed_before: the names of the replicas that failed the same request before; None when it is no repeat.
        given_up: the replicas that are not asked again for it.
        counted: those whose breaker has counted a failure of it.
        outages: those that it failed in, by number.
        failures: where it needs a stored response the latest failure of each replica, with its attempt; the latest one
            is the last.
        bridged: the attempts made to bridge an outage, which do not count towards the most of a target.
    """

    prompt: "Prompt"
    deadline: "Deadline"
    record: "Record"
    sink: StreamSink | None
    model: str
    targets: "tuple[Target, ...]"
    target: "Target"
    caller: str
    share: "Share"
    headers: list[tuple[str, str]]
    commit: "Commit"
    body: bytes = b""
    query: str = ""
    charge: "Charge | None" = None
    remember: "Remember | None" = None
    answer: WholeAnswer | None = None
    failed_before: frozenset[str] | None = None
    given_up: "set[Replica]" = set()
    counted: "set[Replica]" = set()
    bridged: int = 0
    outages: "dict[Outage, int]" = {}
    failures: "dict[Replica, tuple[BackendError, AttemptRecord]]" = {}
    _fingerprint: bytes | None = None

    def fingerprint(self) -> bytes:
        """Return what stands for its path and body."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.prompt.path, self.prompt.content())
        return self._fingerprint

    def note_failure(self, replica: "Replica", failure: "BackendError") -> None:
        """Note the failure of the latest attempt."""
        if self.prompt.needs_response:
            self.failures.pop(replica, None)
            self.failures[replica] = failure, self.record.attempt

    def narrow(self, failure: "BackendError | None") -> "BackendError | None":
        """Return what its attempts have come to: their last `failure`, unless it is that somebody does not know.

        Replicas that do not know the stored response that it needs are no longer among its targets, while others may:
        then the failure of one of those stands. None: none of them was asked.
        """
        nowhere = {replica for replica, (why, _) in self.failures.items() if isinstance(why, NOWHERE)}
        if not nowhere or self.committed:
            return failure
        pairs = ((target, replica) for target in self.targets for replica in target.replicas)
        left = [target.only(replica) for target, replica in pairs if replica not in nowhere]
        if not left:
            not_here = (why for why, _ in reversed(self.failures.values()) if isinstance(why, NoSuchResponse))
            return next(not_here, failure)
        self.targets = tuple(left)
        failed = [replica for replica in self.failures if replica not in nowhere]
        if not failed:
            return None
        self.target = next(target for target in left if failed[-1] in target.replicas)
        return self.failures[failed[-1]][0]

    def forget_failures(self) -> None:
        """Let go of what was noted: the frames of the failures hold the call."""
        for failure, _ in self.failures.values():
            drop_frames(failure)
        self.failures.clear()

    def attempts_at(self, target: "Target") -> int:
        """Return the number of its attempts at a target that count towards the most of a target."""
        names = {replica.name for replica in target.replicas}
        made = sum(attempt.backend in names and not attempt.resend for attempt in self.record.attempts)
        return made - self.bridged

    def may_go_elsewhere(self, replica: "Replica") -> bool:
        """Return whether another replica could be asked in place of this one."""
        return any(
            other is not replica and other not in self.given_up and other.admits(target.model or self.model)
            for target in self.targets[self.targets.index(self.target) :]
            for other in target.replicas
        )

    @property
    def committed(self) -> bool:
        """Whether the first byte of a backend's answer has gone out."""
        return self.sink is not None and self.sink.committed
