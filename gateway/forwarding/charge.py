"""What a request counts for the token limits of its key: reserved before it is forwarded, settled when it has ended."""

from typing import TYPE_CHECKING, Any

from gateway.dialects.prompt_tokens import BYTES_OF_A_TOKEN
from gateway.dialects.reported_usage import ReportedUsage, may_report
from gateway.executor import LARGE
from gateway.phase_timer import PhaseTimer
from gateway.policy.limits import Reservation
from gateway.record import COUNTED, REPORTED

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Coroutine

    from gateway.dialects.dialect import Prompt
    from gateway.executor import Executor
    from gateway.forwarding.call import Call
    from gateway.policy.deadline import Deadline
    from gateway.policy.limits import Limits

    Write = Callable[[bytes], Coroutine[Any, Any, None]]

UNKNOWN = -1
"""Tokens of a prompt that nobody has looked into."""
FIRST_GUESS = 256
"""Tokens of an answer to a request that gives no most, before any has been seen."""
LONGEST = 1 << 17
"""Tokens of an answer of which something is learned: a backend that tells of more would have the next requests reserve
all that their key may use."""
MEMORY = 16
"""Answers to such requests over which the mean of a route is taken, about."""
MOST = 10**12
"""Tokens that a request may ask for or use, as far as anybody reckons with them: more than any limit. A backend may say
anything, and neither SQLite nor the shared ledger has numbers of any size."""


class Charges:
    """Makes charges, and learns how long the answers of each route are.

    Args:
        executor: looks into large bodies.
        clock: seconds, monotonic.
    """

    def __init__(self, executor: "Executor", clock: "Callable[[], float]") -> None:
        self._executor = executor
        self._clock = clock
        self._lengths: dict[str, AnswerLength] = {}

    def begin(
        self, limits: "Limits", prompt: "Prompt", route: str, operation: str | None, tokens: int | None = UNKNOWN
    ) -> "Charge | None":
        """Return what a request is charged, yet to be taken; None: it is large, and `prompt_tokens` have to be known.

        Args:
            limits: of its key.
            prompt: the checked request; it is looked into only where tokens are limited.
            route: its model, as configured; empty for one about a stored response: its tokens counted when it was made.
            operation: what it asks for.
            tokens: of the prompt, where they are known.
        """
        if not route or not limits.tokens.windows:
            return Charge(limits, 0)
        if tokens == UNKNOWN:
            if len(prompt.body) > LARGE:
                return None
            tokens = prompt.dialect.prompt_tokens(prompt.body)
        if tokens is None or operation == "embeddings":  # nothing of the answer is reserved
            return Charge(limits, tokens or 0, prompt=prompt, prompt_tokens=tokens)
        most = prompt.max_tokens
        if most is not None and most > 0:
            most = int(min(most, MOST)) * prompt.choices
            return Charge(limits, tokens + most, prompt=prompt, prompt_tokens=tokens)
        length = self._lengths.get(route)
        if length is None:
            length = self._lengths[route] = AnswerLength()
        most = length.mean * prompt.choices
        return Charge(limits, tokens + most, prompt=prompt, prompt_tokens=tokens, length=length)

    async def prompt_tokens(self, prompt: "Prompt", deadline: "Deadline") -> int | None:
        """Look into a large body, beside other requests. Raises: DeadlineExceeded."""
        with PhaseTimer(self._clock, deadline.end, "The deadline passed before the body could be looked into."):
            return await self._executor.run(len(prompt.body), prompt.dialect.prompt_tokens, prompt.body)

    def follow(self, routes: "Container[str]") -> None:
        """Forget how long the answers of all other routes were."""
        self._lengths = {route: length for route, length in self._lengths.items() if route in routes}


class AnswerLength:
    """How many tokens the answers of a route have, where no most is given.

    Attributes:
        mean: of each choice, about.
    """

    __slots__ = ("_sum", "mean")

    def __init__(self) -> None:
        self.mean = FIRST_GUESS
        self._sum = 0  # about, of as many choices as are remembered

    def learn(self, tokens: int, choices: int) -> None:
        """Take in how many a whole answer had, and how many choices."""
        each = (tokens if tokens < LONGEST else LONGEST) // choices  # noqa: FURB136 - at each request
        self._sum += each - self.mean if self._sum else each * MEMORY
        self.mean = self._sum // MEMORY


class Charge(Reservation, eq=False):
    """What one request is charged: its reservation, and what it is settled by.

    Attributes:
        prompt: the request; None where its tokens are not limited.
        prompt_tokens: of the prompt; None where only what is reported counts.
        length: learns from the answer; None where nothing was expected of it.
    """

    prompt: "Prompt | None" = None
    prompt_tokens: int | None = None
    length: AnswerLength | None = None
    _relayed: "EventCount | None" = None
    _usage: ReportedUsage | None = None

    def counting(self, write: "Write", first: bytes) -> "Write":
        """Return a function that writes events of a stream and counts them; `first`: those written already."""
        if self.prompt_tokens is None:
            return write
        self._relayed = EventCount(write, first)
        return self._relayed.write

    def reading(self, write: "Write", content_type: str, first: bytes) -> "Write":
        """Return a function that writes what is passed through and looks for its usage; `first`: written already."""
        if self.prompt is None or not may_report(content_type):
            return write
        usage = self._usage = ReportedUsage(content_type)
        usage.feed(first)

        async def write_and_read(data: bytes) -> None:
            await write(data)
            usage.feed(data)

        return write_and_read

    def end(self, call: "Call") -> None:
        """Charge what a request that has ended has used, and note it where tokens are limited."""
        prompt = self.prompt
        if prompt is None:
            self.settle(0)
            return
        record = call.record
        given, answered = record.input_tokens, record.output_tokens
        if given is not None and answered is not None and record.attempts[-1].outcome == "ok":
            record.charged_by = REPORTED
            if self.length is not None:
                self.length.learn(answered, prompt.choices)
            used = given + answered
        else:
            used, record.charged_by = self._used(call, prompt)
        record.charged = used = used if used < MOST else MOST  # noqa: FURB136 - at each request
        self.settle(used)

    def _used(self, call: "Call", prompt: "Prompt") -> tuple[int, str]:
        """Return the tokens that a request has used where not all is reported, and where the number comes from.

        What failed before its answer costs nothing. The prompt counts once a caller left, or its deadline passed, while
        the backend was at it; the answer as far as it was relayed.
        """
        record = call.record
        outcome = record.attempts[-1].outcome if record.attempts else None
        if outcome == "ok" and self._usage is not None and (reported := self._usage.tokens) is not None:
            return reported, REPORTED
        if outcome != "ok" and not call.committed:
            return (self.prompt_tokens or 0) if outcome in {"cancelled", "deadline_exceeded"} else 0, COUNTED
        given, answered = record.input_tokens, record.output_tokens
        is_reported = outcome == "ok" and (given is not None or answered is not None)
        output = answered or 0
        if not is_reported:
            output = max(output, self._relayed_tokens(call, prompt))
        if outcome == "ok" and self.length is not None:
            self.length.learn(output, prompt.choices)
        return (given if given is not None else self.prompt_tokens or 0) + output, REPORTED if is_reported else COUNTED

    def _relayed_tokens(self, call: "Call", prompt: "Prompt") -> int:
        """Return about how many tokens of the answer went to the caller."""
        if self.prompt_tokens is None or prompt.operation == "embeddings":
            return 0
        if call.answer is not None:
            return len(call.answer.body) // BYTES_OF_A_TOKEN
        return self._relayed.tokens if self._relayed is not None else 0


class EventCount:
    """Counts the events of a stream on their way to the caller.

    Args:
        write: writes them.
        first: those written already.
    """

    __slots__ = ("_events", "_excess", "_least", "_write")

    def __init__(self, write: "Write", first: bytes) -> None:
        self._write = write
        self._events = _events_in(first)
        self._excess = 0
        self._least = 0

    def write(self, events: bytes) -> "Coroutine[Any, Any, None]":
        """Count events, and write them."""
        size = len(events)
        if self._least <= size < 2 * self._least:
            number = 1  # two would be longer
        else:
            number = _events_in(events) or 1
            self._least = min(self._least or size, size // number)
        self._events += number
        self._excess += size - number * self._least
        return self._write(events)

    @property
    def tokens(self) -> int:
        """About how many tokens they are: an event is one, or more where it is longer than the shortest."""
        return max(self._events, self._excess // BYTES_OF_A_TOKEN)


def _events_in(events: bytes) -> int:
    return events.count(b"\ndata:") + events.startswith(b"data:")
