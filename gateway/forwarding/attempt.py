"""One attempt at one replica: the HTTP call under its timers, the report to the breaker, the notes in the record."""

from asyncio import CancelledError
from functools import partial
from time import time
from typing import TYPE_CHECKING

from gateway.dialects.answer_fields import describe, is_json, raise_error_inside
from gateway.dialects.captured_text import output_messages, texts_of
from gateway.dialects.error_answers import read_error, read_error_inside
from gateway.dialects.json_text import BYTE_ORDER_MARK, NO_JSON, check
from gateway.dialects.server_sent_events import begins_as_stream
from gateway.errors import (
    AnswerTooLarge,
    BackendError,
    CallerLeft,
    CutOff,
    DeadlineExceeded,
    ErrorAnswer,
    ErrorInside,
    GatewayError,
    InternalError,
    InvalidResponse,
    NoConnection,
    NoSuchResponse,
    Silent,
    StaleConnection,
    Verdict,
    WrongForm,
    drop_frames,
)
from gateway.executor import LARGE
from gateway.forwarding.body_relay import BodyRelay
from gateway.forwarding.call import WholeAnswer
from gateway.forwarding.stream_relay import StreamRelay, held_up, no_first_token, stalled
from gateway.headers import retry_after
from gateway.phase_timer import PhaseTimer
from gateway.record import MAX_MESSAGE, AttemptRecord

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from gateway.backend.client import Exchange, HttpClient
    from gateway.config import Timeouts
    from gateway.dialects.dialect import Answer
    from gateway.executor import Executor
    from gateway.forwarding.call import Call, StreamSink
    from gateway.policy.lease import Lease
    from gateway.policy.pool import Target
    from gateway.policy.replica import Replica
    from gateway.record import Record
    from gateway.settings import Settings


PASSED_STATUSES = frozenset(range(200, 300))
GOOD_STATUSES = PASSED_STATUSES - {204, 205}
"""Those of answers to prompts; 204 and 205 have none (RFC 9110, 15.3), and clients would not read it."""
NO_CONTENT = 204
"""The status with which something may be deleted."""
RESET_CONTENT = 205
"""The status whose answer is empty, although HTTP frames a body for it (RFC 9110, 15.3.6)."""

NOT_HERE = frozenset({404, 405})
"""Statuses with which a replica says that it does not know a stored response, or stores none at all."""
MAX_ERROR = 262_144
"""Bytes of an error answer, not counted as held while a caller takes them; of a larger one only the status is told."""


class Attempts:
    """Makes attempts.

    Args:
        settings: the largest answer, whether text is captured.
        client: sends the calls.
        executor: looks into large answers.
        clock: seconds, monotonic.
        rng: draws the ids of spans.
        wall_clock: seconds since the epoch, for dates in `Retry-After`.
    """

    def __init__(
        self,
        settings: "Settings",
        *,
        client: "HttpClient",
        executor: "Executor",
        clock: "Callable[[], float]",
        rng: "Random",
        wall_clock: "Callable[[], float]" = time,
    ) -> None:
        self._client = client
        self._executor = executor
        self._clock = clock
        self._wall_clock = wall_clock
        self._rng = rng
        self._max_answer = settings.gateway_max_answer_bytes
        self._max_error = min(self._max_answer, MAX_ERROR)
        self._keep_text = settings.gateway_capture_content

    async def make(self, call: "Call", target: "Target", lease: "Lease", *, backoff: float) -> None:
        """Make one HTTP call, or two when a kept-alive connection was dead; the lease ends with it.

        Args:
            call: its `answer` is set, or its sink receives the stream.
            target: names the model.
            lease: of the replica that is asked.
            backoff: seconds slept before, for the record.

        Raises:
            BackendError: the attempt failed.
            DeadlineExceeded, GatewayOverloaded, CallerLeft: the request ends.
            NoConnection: as well; nothing was sent, and it was no attempt.
        """
        replica = lease.replica
        attempt = self._begin(call, target, lease)
        attempt.backoff = backoff
        try:
            try:
                # A connection kept from before the outage may be dead without a sign, and spoil the trial.
                await self._exchange(call, lease, attempt, fresh=lease.trial)
            except StaleConnection as stale:
                self._end(attempt, stale)
                attempt.decision = "resend"
                attempt = self._begin(call, target, lease)
                attempt.resend = True
                await self._exchange(call, lease, attempt, fresh=True)
        except BackendError as failure:
            self._end(attempt, failure)
            if len(call.prompt.body) > LARGE:
                await self._executor.run(len(call.prompt.body), call.fingerprint)
            before = replica.breaker.state
            trace_id, counted = call.record.trace, replica in call.counted
            if call.prompt.is_about_response and _is_only_about_it(failure):
                lease.release()
            elif lease.fail(failure, trace_id, counted=counted, body=call.fingerprint, outages=call.outages):
                call.counted.add(replica)
            self._note_breaker(call.record, replica, before)
            if failure.cools:
                left = (replica.cooldown.due(lease.model) or self._clock()) - self._clock()
                call.record.note_cooldown(self._clock(), replica.name, left)
            drop_frames(failure)
            raise
        except NoConnection as shortage:
            call.record.drop_attempt(shortage.reason, self._clock())
            raise
        except BaseException as error:
            self._end(attempt, error)
            raise
        else:
            self._end(attempt, None)
            self._report(call.record, lease, lease.succeed)
        finally:
            lease.release()

    async def _exchange(self, call: "Call", lease: "Lease", attempt: AttemptRecord, *, fresh: bool) -> None:
        """Make one HTTP call, each phase under its own timer, all of them under the deadline."""
        headers = [
            *call.headers,
            ("x-request-timeout", f"{attempt.deadline_left:.3f}"),
            ("traceparent", call.record.traceparent(attempt.span_id)),
        ]
        timer = PhaseTimer(self._clock, call.deadline.commit_by)
        endpoint = call.target.endpoints[lease.replica]
        timeouts = endpoint.timeouts
        passes_through = call.prompt.dialect.passes_through
        if call.sink is not None and not passes_through:
            timer.limit(timeouts.first_token, lambda: no_first_token(timeouts.first_token))
        else:
            timer.limit(timeouts.answer, lambda: _no_answer(timeouts.answer))
        with timer:
            path_and_query = endpoint.target_of(call.prompt.path, call.query)
            exchange = await self._client.send(
                endpoint, call.prompt.method, path_and_query, call.body, headers, fresh=fresh
            )
            attempt.status = exchange.status
            attempt.request_id = exchange.request_id
            try:
                if exchange.status == NO_CONTENT and call.prompt.method == "DELETE":
                    call.answer = WholeAnswer(NO_CONTENT, _passed_headers(call, exchange), b"")
                elif exchange.status not in (PASSED_STATUSES if passes_through else GOOD_STATUSES):
                    await self._read_error(call, exchange, timer, timeouts.idle)
                elif call.sink is not None and passes_through:
                    await self._pass_through(call, call.sink, lease, exchange, timer, timeouts.idle)
                elif call.sink is not None:
                    await self._relay_stream(call, call.sink, lease, exchange, timer, timeouts)
                else:
                    await self._read_answer(call, lease, exchange, timer, timeouts.idle)
            except ErrorInside as error:
                raise self._error_answer(call, exchange, error) from None
            finally:
                exchange.close()

    async def _read_answer(
        self, call: "Call", lease: "Lease", exchange: "Exchange", timer: PhaseTimer, idle: float
    ) -> None:
        """Read an unstreamed answer."""
        held = call.share.held
        dialect = call.prompt.dialect
        try:
            exchange.decode_within(self._max_answer)
            body = await exchange.read_whole(call.share, self._max_answer, lambda: _limit_idle(timer, idle))
            if len(body) <= LARGE:
                answer: Answer = dialect.read_answer(exchange.content_type, body)
            else:
                timer.pause()
                answer = await self._executor.read(len(body), describe, dialect, exchange.content_type, body)
            texts = await self._executor.read(len(body), texts_of, dialect, body) if self._keep_text else None
        except BaseException:
            call.share.give_back_to(held)
            raise
        _describe(call.record, answer, texts)
        if call.remember is not None:
            call.remember(answer.response_id, lease.replica.id, lease.model)
        call.answer = WholeAnswer(exchange.status, _passed_headers(call, exchange), body)

    async def _read_error(self, call: "Call", exchange: "Exchange", timer: PhaseTimer, idle: float) -> None:
        """Read an answer other than a good one. Raises: the failure that it is."""
        held = call.share.held
        try:
            exchange.decode_within(self._max_error)
            body = await exchange.read_whole(call.share, self._max_error, lambda: _limit_idle(timer, idle))
        except InvalidResponse as unreadable:
            too_large = isinstance(unreadable, AnswerTooLarge) and self._max_error < self._max_answer
            if "Content-Encoding" not in exchange.headers and not too_large:
                raise
            drop_frames(unreadable)
            body = b""  # its status still says something
        finally:
            call.share.give_back_to(held)
        timer.pause()
        passed = _passed_headers(call, exchange)
        wait = retry_after(passed, self._wall_clock())
        failure = await self._executor.run(len(body), read_error, exchange.status, body, passed, wait)
        if call.prompt.is_about_response and isinstance(failure, ErrorAnswer) and failure.status in NOT_HERE:
            failure = NoSuchResponse(failure.status, failure.body, failure.headers)
        raise failure

    def _error_answer(self, call: "Call", exchange: "Exchange", error: ErrorInside) -> BackendError:
        """Return the error answer that an error inside a good answer is."""
        passed = _passed_headers(call, exchange)
        wait = retry_after(passed, self._wall_clock())
        body = call.prompt.dialect.error_inside(error.words)
        failure = read_error_inside(error.words, body, passed, wait)
        if error.words.number is None or call.committed:
            failure.outage = False  # that it cannot be used, it would have said before an answer
        if call.committed:
            failure.event = error.event
            failure.outcome = error.outcome
        return failure

    async def _read_no_stream(self, call: "Call", exchange: "Exchange", timer: PhaseTimer, idle: float) -> None:
        """Read an answer that is no stream, although one was asked for. Raises: the failure that it is."""
        if not is_json(exchange.content_type) and exchange.content_type not in {"", "text/plain"}:
            raise InvalidResponse("The backend's answer is not text/event-stream.")
        held = call.share.held
        try:
            body = await exchange.read_whole(call.share, self._max_answer, lambda: _limit_idle(timer, idle))
            timer.pause()
            await self._executor.read(len(body), raise_error_inside, body)
            await self._executor.read(len(body), check, body.removeprefix(BYTE_ORDER_MARK))
        except NO_JSON:
            raise InvalidResponse("The backend's answer is not text/event-stream.") from None
        finally:
            call.share.give_back_to(held)
        raise WrongForm("The backend's answer is not a stream, although one was asked for.")

    async def _relay_stream(  # noqa: PLR0917
        self,
        call: "Call",
        sink: "StreamSink",
        lease: "Lease",
        exchange: "Exchange",
        timer: PhaseTimer,
        timeouts: "Timeouts",
    ) -> None:
        """Hold a streamed answer until commit, then pass it on as it arrives."""
        exchange.decode_within(self._max_answer)
        is_stream = exchange.content_type == "text/event-stream"
        if not is_stream and not (exchange.content_type == "" and begins_as_stream(await exchange.peek())):
            await self._read_no_stream(call, exchange, timer, timeouts.idle)
        state = call.prompt.dialect.stream_state(
            call.prompt, keep_text=self._keep_text, until_answer=call.commit == "first_answer"
        )
        relay = StreamRelay(
            exchange,
            state,
            timer,
            idle=timeouts.idle,
            max_event=self._max_answer,
            share=call.share,
            executor=self._executor,
            clock=self._clock,
        )
        held = call.share.held
        try:
            due = call.record.attempt.started + timeouts.first_token
            events = await relay.until_first_content(
                due, timeouts.first_token, self._max_answer, lambda: call.may_go_elsewhere(lease.replica)
            )
            call.record.first_token = self._clock()
            self._report(call.record, lease, lease.begin_answer)
            if not state.answer:
                events += await relay.until_answer(self._max_answer)
            if call.commit == "complete":
                events += await relay.until_complete(self._max_answer)
            if call.remember is not None:
                call.remember(state.response_id, lease.replica.id, lease.model)
            timer.end_at(call.deadline.end)
            headers = {"content-type": "text/event-stream", **_passed_headers(call, exchange)}
            await sink.commit(headers, events, state, partial(held_up, exchange, call.share))
            write = sink.write if call.charge is None else call.charge.counting(sink.write, events)
            call.share.give_back(len(events))
            del events
            if call.commit != "complete":
                await relay.pass_on(write)
            await sink.end()
            await relay.read_end()
        finally:
            call.share.give_back_to(held)
            _describe(call.record, state, None if state.text is None else [state.text])

    async def _pass_through(  # noqa: PLR0917
        self, call: "Call", sink: "StreamSink", lease: "Lease", exchange: "Exchange", timer: PhaseTimer, idle: float
    ) -> None:
        """Pass an answer on as it comes, whatever it is: its first byte is its commit."""
        exchange.decode_within(self._max_answer)
        relay = BodyRelay(exchange, timer, idle=idle, share=call.share)
        held = call.share.held
        try:
            body = await relay.until_commit(self._max_answer, whole=call.commit == "complete")
            is_empty = exchange.status == RESET_CONTENT
            if is_empty:
                body = b""
            self._report(call.record, lease, lease.begin_answer)
            timer.end_at(call.deadline.end)
            await sink.commit(
                _passed_headers(call, exchange),
                body,
                None,
                partial(held_up, exchange, call.share),
                status=exchange.status,
                length=len(body) if is_empty or call.commit == "complete" else exchange.length,
            )
            write = sink.write if call.charge is None else call.charge.reading(sink.write, exchange.content_type, body)
            call.share.give_back(len(body))
            del body
            if not is_empty:
                await relay.pass_on(write)
            await sink.end()
        finally:
            call.share.give_back_to(held)

    def _begin(self, call: "Call", target: "Target", lease: "Lease") -> AttemptRecord:
        """Note that an attempt begins."""
        replica = lease.replica
        attempts = call.record.attempts
        call.record.first_token = None  # an attempt that failed before commit has given the caller none
        endpoint = target.endpoints[replica]
        attempt = AttemptRecord(
            len(attempts) + 1,
            endpoint.name,
            self._rng.getrandbits(64) or 1,
            self._clock(),
            host=endpoint.host,
            port=endpoint.port,
            url=endpoint.url_of(call.record.path or ""),
            model=target.model or call.model or None,
            target=target.labels,
            breaker=replica.breaker.state,
            budget_left=replica.budget.left(),
            deadline_left=call.deadline.left(),
            passed_over=lease.passed_over,
        )
        attempts.append(attempt)
        return attempt

    def _end(self, attempt: AttemptRecord, error: BaseException | None) -> None:
        """Note how an attempt ended, once."""
        if attempt.ended is not None:
            return
        attempt.ended = self._clock()
        if error is None:
            attempt.outcome, attempt.decision = "ok", "answered"
        elif isinstance(error, BackendError):
            attempt.outcome, attempt.message = error.outcome, error.message[:MAX_MESSAGE]
            attempt.error_type = str(attempt.status) if error.outcome.startswith("status_") else error.outcome
            attempt.retry_after = error.retry_after
            attempt.timer = error.param
        elif isinstance(error, DeadlineExceeded):
            attempt.outcome = attempt.error_type = "deadline_exceeded"
            attempt.message, attempt.decision = error.message, "gave up: deadline"
        elif isinstance(error, CancelledError | CallerLeft):
            attempt.outcome = attempt.error_type = "cancelled"
            attempt.decision = "gave up: cancelled"
        else:
            word = error.outcome if isinstance(error, GatewayError) else InternalError.code
            attempt.outcome = attempt.error_type = word
            attempt.decision = f"gave up: {word}"

    def _report(self, record: "Record", lease: "Lease", good: "Callable[[], None]") -> None:
        """Report a good answer, which closes a half-open breaker and changes no other."""
        if not lease.trial:
            good()
            return
        before = lease.replica.breaker.state
        good()
        self._note_breaker(record, lease.replica, before)

    def _note_breaker(self, record: "Record", replica: "Replica", before: str) -> None:
        """Note a change of the breaker's state since `before`."""
        after = replica.breaker.state
        if before != after:
            record.note_breaker(self._clock(), replica.name, before, after)


def _passed_headers(call: "Call", exchange: "Exchange") -> dict[str, str]:
    """Return the headers of an answer that pass to its caller: of rate limits only those of the caller's own key."""
    return exchange.passed_headers(limited=call.charge is not None)


def _is_only_about_it(failure: BackendError) -> bool:
    """Return whether what a server answered about a stored response says nothing about how it answers prompts."""
    answered = isinstance(failure, ErrorAnswer) or (
        isinstance(failure, InvalidResponse) and not isinstance(failure, CutOff)
    )
    return answered and failure.verdict is Verdict.FAILURE and not failure.cools


def _limit_idle(timer: PhaseTimer, seconds: float) -> None:
    timer.limit(seconds, lambda: stalled(seconds))


def _no_answer(seconds: float) -> Silent:
    return Silent(f"The backend did not answer within {seconds:g} s.", timer="answer")


def _describe(record: "Record", answer: "Answer", texts: list[str] | None) -> None:
    record.describe_answer(
        response_id=answer.response_id,
        model=answer.model,
        finish_reasons=answer.finish_reasons,
        input_tokens=answer.input_tokens,
        output_tokens=answer.output_tokens,
    )
    if texts is not None:
        record.output_text = output_messages(texts, record.finish_reasons)
