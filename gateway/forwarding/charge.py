"""What a request counts for the token limits of its key: reserved before it is forwarded, settled when it has ended."""

from typing import TYPE_CHECKING, Any

from gateway.dialects.prompt_tokens import BYTES_OF_A_TOKEN
from gateway.executor import LARGE
from gateway.phase_timer import PhaseTimer

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Coroutine

    from gateway.dialects.dialect import Prompt
    from gateway.executor import Executor
    from gateway.forwarding.call import Call
    from gateway.policy.deadline import Deadline
    from gateway.policy.limits import Limits, Reservation

    Write = Callable[[bytes], Coroutine[Any, Any, None]]

REPORTED, COUNTED = "reported", "counted"
"""Where a number of tokens comes from: the backend's usage, or what was sent and relayed."""
FIRST_GUESS = 256
"""Tokens of an answer to a request that gives no most, before any has been seen."""
MEMORY = 16
"""Answers to such requests over which the mean of a route is taken, about."""
MOST = 10**15
"""Tokens that a request may ask for, as far as anybody reckons with them."""


class Charges:
    """Makes charges, and learns how long the answers of each route are.

    Args:
        executor: looks into large bodies.
        clock: seconds, monotonic.
    """

    def __init__(self, executor: "Executor", clock: "Callable[[], float]") -> None:
        self._executor = executor
        self._clock = clock
        self._means: dict[tuple[str, str | None], float] = {}

    async def begin(self, limits: "Limits", prompt: "Prompt", route: str, deadline: "Deadline") -> "Charge":
        """Return what a request is charged, yet to be taken.

        Args:
            limits: of its key.
            prompt: the checked request; it is looked into only where tokens are limited.
            route: its model, as configured.
            deadline: of the request.

        Raises:
            DeadlineExceeded: it passed before the body could be looked into.
        """
        if not limits.tokens or prompt.is_about_response:  # its tokens counted when it was made
            return Charge(None, limits.reserve(0), prompt, route, None)
        read = prompt.dialect.prompt_tokens
        if len(prompt.body) <= LARGE:
            tokens = read(prompt)
        else:
            with PhaseTimer(self._clock, deadline.end, "The deadline passed before the body could be looked into."):
                tokens = await self._executor.run(len(prompt.body), read, prompt)
        expected = self._expected(prompt, route) if tokens is not None else 0
        return Charge(self, limits.reserve((tokens or 0) + expected), prompt, route, tokens)

    def follow(self, routes: "Container[str]") -> None:
        """Forget how long the answers of all other routes were."""
        self._means = {key: mean for key, mean in self._means.items() if key[0] in routes}

    def learn(self, prompt: "Prompt", route: str, tokens: int) -> None:
        """Take in how many tokens a whole answer had to a request that gave no most."""
        key, each = (route, prompt.operation), tokens / prompt.choices
        mean = self._means.get(key)
        self._means[key] = each if mean is None else mean + (each - mean) / MEMORY

    def _expected(self, prompt: "Prompt", route: str) -> int:
        """Return the most tokens that an answer may have, or as many as those of its route have on average."""
        if prompt.operation == "embeddings":
            return 0
        each = prompt.max_tokens
        if each is None or each <= 0:
            each = self._means.get((route, prompt.operation), FIRST_GUESS)
        return int(min(each, MOST)) * prompt.choices


class Charge:
    """What one request is charged.

    Attributes:
        reservation: what is taken of the key's limits, together with a slot.
    """

    __slots__ = ("_charges", "_events", "_excess", "_least", "_prompt", "_route", "_tokens", "reservation")

    def __init__(
        self, charges: Charges | None, reservation: "Reservation", prompt: "Prompt", route: str, tokens: int | None
    ) -> None:
        self._charges = charges  # None where tokens are not limited
        self._prompt = prompt
        self._route = route
        self._tokens = tokens  # of the prompt; None where only what is reported counts
        self._events = 0
        self._excess = 0
        self._least = 0
        self.reservation = reservation

    def counting(self, write: "Write", first: bytes) -> "Write":
        """Return a function that writes events of a stream and counts them; `first`: those written already."""
        if self._tokens is None:
            return write
        self._events = _events_in(first)

        def write_and_count(events: bytes) -> "Coroutine[Any, Any, None]":
            size = len(events)
            if self._least <= size < 2 * self._least:
                number = 1  # two would be longer
            else:
                number = _events_in(events) or 1
                self._least = min(self._least or size, size // number)
            self._events += number
            self._excess += size - number * self._least
            return write(events)

        return write_and_count

    def settle(self, call: "Call") -> None:
        """Charge what a request that has ended has used, and note it where tokens are limited."""
        if self._charges is None:
            self.reservation.settle(0)
            return
        tokens, source = self._used(call, self._charges)
        self.reservation.settle(tokens)
        call.record.charged, call.record.charged_by = tokens, source

    def _used(self, call: "Call", charges: Charges) -> tuple[int, str]:
        """Return the tokens that a request has used, and where the number comes from.

        What failed before its answer costs nothing. The prompt counts once a caller left, or its deadline passed, while
        the backend was at it; the answer as far as it was relayed.
        """
        record = call.record
        outcome = record.attempts[-1].outcome if record.attempts else None
        given, answered = record.input_tokens, record.output_tokens
        sent = given if given is not None else self._tokens or 0
        if outcome == "ok" and (given is not None or answered is not None):
            if self._prompt.max_tokens is None:
                charges.learn(self._prompt, self._route, answered or 0)
            return sent + (answered or 0), REPORTED
        if outcome == "ok" or call.committed:
            relayed = max(answered or 0, self._relayed(call))
            if outcome == "ok" and self._prompt.max_tokens is None:
                charges.learn(self._prompt, self._route, relayed)
            return sent + relayed, COUNTED
        return (self._tokens or 0) if outcome in {"cancelled", "deadline_exceeded"} else 0, COUNTED

    def _relayed(self, call: "Call") -> int:
        """Return about how many tokens of the answer went to the caller.

        An event is a token, or more where it is longer than the shortest.
        """
        if self._tokens is None or self._prompt.operation == "embeddings":
            return 0
        if call.answer is not None:
            return len(call.answer.body) // BYTES_OF_A_TOKEN
        return max(self._events, self._excess // BYTES_OF_A_TOKEN)


def _events_in(events: bytes) -> int:
    return events.count(b"\ndata:") + events.startswith(b"data:")
