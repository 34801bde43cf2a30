"""The policy, top to bottom: deadline > admission > target > retry > breaker > attempt."""

from asyncio import CancelledError, to_thread
from random import getrandbits
from typing import TYPE_CHECKING

from tenacity import AsyncRetrying, retry_if_exception_type

from gateway.backend.client import Usage, authorization, check_stream, check_whole, classify
from gateway.dialects.capture import answer_texts
from gateway.dialects.requests import with_model
from gateway.dialects.stream_state import ChoicesProgress, Progress, ResponsesProgress
from gateway.errors import (
    BackendError,
    BackendUnavailable,
    CallerLeft,
    DeadlineExceeded,
    GatewayError,
    GatewayOverloaded,
    InternalError,
    Silent,
    StaleConnection,
    Stalled,
    let_go,
)
from gateway.forwarding.phase_timer import Watch
from gateway.forwarding.stream_relay import Relay, no_first_token
from gateway.policy.retry import Retry, RetryPolicy
from gateway.record import Attempt

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.backend.client import Exchange, HttpClient
    from gateway.dialects.requests import Prompt
    from gateway.policy.admission import Admission, Share
    from gateway.policy.breaker import State
    from gateway.policy.deadline import Deadline
    from gateway.policy.pool import Lease, Replica, Route, Target
    from gateway.record import Record
    from gateway.server.stream_writer import Outlet
    from gateway.settings import Settings


LARGE_BODY = 65_536
"""Bytes; to look through a larger body takes milliseconds, in which nobody else would be served."""


class Call:
    """One request on its way: what it asks, how long it may take, and where its answer goes.

    Attributes:
        headers: those of the caller that go to the backend.
        hold: whether a stream is held back until it is whole.
        body: the bytes for the target at hand.
        answer: status, headers and body of an unstreamed answer, once it is there.
    """

    __slots__ = ("answer", "body", "deadline", "headers", "hold", "outlet", "prompt", "record", "share")

    def __init__(
        self,
        prompt: "Prompt",
        deadline: "Deadline",
        record: "Record",
        outlet: "Outlet",
        *,
        share: "Share",
        headers: list[tuple[str, str]],
        hold: bool,
    ) -> None:
        self.prompt = prompt
        self.deadline = deadline
        self.record = record
        self.outlet = outlet
        self.share = share
        self.headers = headers
        self.hold = hold
        self.body = prompt.body
        self.answer: tuple[int, dict[str, str], bytes] | None = None


class Forwarder:
    """Takes a call to a backend that answers it."""

    def __init__(
        self,
        settings: "Settings",
        *,
        client: "HttpClient",
        admission: "Admission",
        clock: "Callable[[], float]",
        retries_allowed: "Callable[[str], None]",
        retries_refused: "Callable[[str], None]",
    ) -> None:
        self._client = client
        self._admission = admission
        self._clock = clock
        self._policy = RetryPolicy(settings)
        self._first_token_timeout = settings.gateway_first_token_timeout
        self._answer_timeout = settings.gateway_answer_timeout
        self._idle_timeout = settings.gateway_idle_timeout
        self._max_answer = settings.gateway_max_answer_bytes
        self._default_model = settings.model_name
        self._keep_text = settings.gateway_capture_content
        self._retries_allowed = retries_allowed
        self._retries_refused = retries_refused

    async def forward(self, call: Call, route: "Route") -> None:
        """Get the call answered: `call.answer` is set, or its outlet has passed a whole stream on.

        Raises:
            Refusal: no attempt was made.
            DeadlineExceeded: wherever the call stood.
            BackendError: the last attempt's failure, before or after commit.
            CallerLeft: while a stream was written.
        """
        if not self._admission.enter_at_once():
            self._admission.check()
            queued_at = self._clock()
            try:
                await self._admission.enter(call.deadline.left_to_commit())
            finally:
                call.record.queued = self._clock() - queued_at
        try:
            await self._try_targets(call, route)
        except (DeadlineExceeded, GatewayOverloaded, CallerLeft, CancelledError) as error:
            _note_end(call.record, _END_WORDS.get(type(error), "cancelled"))
            raise
        finally:
            self._admission.leave()

    async def _try_targets(self, call: Call, route: "Route") -> None:
        """Each target in order, until one answers or a failure is final."""
        failure: BackendError | None = None
        skipped: Target | None = None
        for target in route.targets:
            if failure is not None:
                if call.deadline.left_to_commit() < self._policy.connect_timeout:
                    call.record.stop_reason = "deadline"
                    break
                call.record.attempt.decision = "fallback"
            lease = self._first_lease(target)
            if lease is None:
                skipped = target
                call.record.skipped(target.backend, self._clock())
                continue
            call.record.fell_back = target is not route.targets[0]
            try:
                await self._try_target(call, target, lease)
            except BackendError as error:
                failure = error
                let_go(error)
                if call.outlet.committed or not error.falls_back:
                    break
            else:
                call.record.stop_reason = None
                return
        if failure is None:
            waits = [wait for target in route.targets if (wait := target.retry_in()) is not None]
            raise BackendUnavailable(
                "No backend can take the request now: their breakers are open.", retry_after=min(waits, default=1.0)
            )
        if skipped is route.targets[-1]:
            call.record.stop_reason = "breaker"  # there was one more to ask, if it could have been asked
        call.record.attempt.decision = f"gave up: {call.record.stop_reason or 'no further target'}"
        raise failure

    async def _try_target(self, call: Call, target: "Target", lease: "Lease") -> None:
        """The first attempt; only when it failed, the machinery for more."""
        try:
            await self._set_model(call, target)
            lease.replica.budget.first()
            await self._attempt(call, target, lease, slept=0.0)
        except BackendError as failure:
            if call.outlet.committed:
                call.record.stop_reason = "committed"
                raise
            await self._retry(call, target, lease.replica, failure)
        finally:
            lease.release()
            if call.body is not call.prompt.body:
                call.share.give_back(len(call.prompt.body))

    async def _retry(self, call: Call, target: "Target", replica: "Replica", failure: BackendError) -> None:
        """Further attempts within the target. Raises: the last one's failure."""
        retry = Retry(self._policy, target, call.deadline)
        _note(retry, replica, failure)
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(BackendError), wait=retry.wait, stop=retry.stop, reraise=True
            ):
                with attempt:
                    if attempt.retry_state.attempt_number == 1:
                        raise failure  # the first attempt's, which tenacity has not seen
                    lease = retry.lease(failure)
                    call.record.attempt.decision = "retry"
                    self._retries_allowed(lease.replica.name)
                    slept = self._clock() - (call.record.attempt.ended or 0.0) if retry.slept else 0.0
                    try:
                        await self._attempt(call, target, lease, slept=slept)
                    except BackendError as error:
                        failure = error
                        if call.outlet.committed:
                            retry.stopped = "committed"
                        _note(retry, lease.replica, error)
                        raise
        except BackendError:
            call.record.stop_reason = retry.stopped
            if retry.stopped == "budget":
                self._retries_refused((retry.refused or retry.tried[-1]).name)
            raise
        finally:
            let_go(failure)

    async def _attempt(self, call: Call, target: "Target", lease: "Lease", *, slept: float) -> None:
        """One place in the breaker: one HTTP call, or two when a kept-alive connection was dead."""
        replica = lease.replica
        attempt = self._begin(call, target, replica, slept)
        try:
            try:
                # A connection kept from before the outage may be dead without a word, and spoil the trial.
                await self._exchange(call, lease, attempt, fresh=lease.trial)
            except StaleConnection as stale:
                self._end(attempt, stale)
                attempt.decision = "resend"
                attempt = self._begin(call, target, replica, 0.0)
                attempt.resend = True
                await self._exchange(call, lease, attempt, fresh=True)
        except BackendError as failure:
            self._end(attempt, failure)
            before = replica.breaker.state
            lease.fail(failure, f"{call.record.trace_id:032x}")
            self._note_breaker(call, replica, before)
            let_go(failure)
            raise
        except BaseException as error:
            self._end(attempt, error)
            raise
        else:
            self._end(attempt, None)
            before = replica.breaker.state
            lease.succeed()
            self._note_breaker(call, replica, before)
        finally:
            lease.release()

    async def _exchange(self, call: Call, lease: "Lease", attempt: Attempt, *, fresh: bool) -> None:
        """One HTTP call, every phase under its own timer, all under the deadline."""
        headers = [*call.headers, *authorization(lease.replica)]
        headers.append(("x-request-timeout", f"{attempt.deadline_left:.3f}"))
        flag = "01" if call.record.sampled else "00"
        headers.append(("traceparent", f"00-{call.record.trace_id:032x}-{attempt.span_id:016x}-{flag}"))
        streamed = call.prompt.stream
        watch = Watch(call.deadline.commit_by)
        if streamed:
            watch.limit(self._first_token_timeout, lambda: no_first_token(self._first_token_timeout))
        else:
            watch.limit(self._answer_timeout, self._no_answer)
        with watch:
            exchange = await self._client.send(lease.replica, call.prompt.path, call.body, headers, fresh=fresh)
            attempt.status = exchange.status
            try:
                if exchange.status >= 300:  # noqa: PLR2004
                    await self._read_error(call, exchange, watch)
                elif streamed:
                    await self._stream(call, lease, attempt, exchange, watch)
                else:
                    await self._read_answer(call, exchange, watch)
            finally:
                exchange.close()

    async def _read_answer(self, call: Call, exchange: "Exchange", watch: Watch) -> None:
        """An unstreamed answer, whole."""
        held = call.share.held
        try:
            exchange.check_plain()
            body = await exchange.read_whole(call.share, self._max_answer, lambda: self._limit_idle(watch))
            whole = check_whole(exchange.content_type, body)
        except BaseException:
            call.share.give_back(call.share.held - held)
            raise
        usage = whole.usage or Usage()
        call.record.answered(
            response_id=whole.id,
            model=whole.model,
            finish_reasons=whole.finish_reasons,
            input_tokens=usage.input,
            output_tokens=usage.output,
            texts=answer_texts(body) if self._keep_text else None,
        )
        call.answer = (exchange.status, exchange.passed_headers(), body)

    async def _read_error(self, call: Call, exchange: "Exchange", watch: Watch) -> None:
        """Raises: the failure that an answer other than 2xx is."""
        held = call.share.held
        try:
            body = await exchange.read_whole(call.share, self._max_answer, lambda: self._limit_idle(watch))
        finally:
            call.share.give_back(call.share.held - held)
        raise classify(exchange.status, body, exchange.passed_headers())

    async def _stream(self, call: Call, lease: "Lease", attempt: Attempt, exchange: "Exchange", watch: Watch) -> None:
        """A streamed answer: held until commit, then passed on as it arrives."""
        exchange.check_plain()
        check_stream(exchange.content_type)
        progress = self._progress(call.prompt)
        relay = Relay(exchange, progress, watch, idle=self._idle_timeout, share=call.share)
        held = call.share.held
        try:
            events = await relay.until_first_token(
                attempt.started + self._first_token_timeout, self._first_token_timeout, self._max_answer
            )
            call.record.first_token = self._clock()
            before = lease.replica.breaker.state
            lease.answered()
            self._note_breaker(call, lease.replica, before)
            if call.hold:
                events += await relay.until_complete(self._max_answer)
            watch.end_at(call.deadline.end)
            await call.outlet.commit(exchange.passed_headers(), events)
            if not call.hold:
                await relay.pass_on(call.outlet.write)
            await call.outlet.end()
        finally:
            if call.outlet.committed:
                call.outlet.sequence_number = progress.sequence_number
            call.share.give_back(call.share.held - held)
            _describe(call.record, progress)

    def _first_lease(self, target: "Target") -> "Lease | None":
        replica = target.pick()
        return replica.lease() if replica is not None else None

    async def _set_model(self, call: Call, target: "Target") -> None:
        """The caller's bytes; only the model is set, where the target names another or the caller named none.

        Raises:
            GatewayOverloaded: the share cannot hold a second body.
        """
        prompt = call.prompt
        call.body = prompt.body
        model = target.model or prompt.model or self._default_model
        if model == prompt.model:
            return
        call.share.take(len(prompt.body))
        if len(prompt.body) < LARGE_BODY:
            call.body = with_model(prompt.body, model)
        else:
            call.body = await to_thread(with_model, prompt.body, model)

    def _note_breaker(self, call: Call, replica: "Replica", before: "State") -> None:
        """After a report to a breaker: a change of its state is an event of the request."""
        after = replica.breaker.state
        if before is not after:
            change = {
                "gateway.backend": replica.name,
                "gateway.breaker.from": before.value,
                "gateway.breaker.to": after.value,
            }
            call.record.events.append((self._clock(), "gateway.breaker", change))

    def _begin(self, call: Call, target: "Target", replica: "Replica", slept: float) -> Attempt:
        attempts = call.record.attempts
        call.record.first_token = None  # an attempt that failed before commit has given the caller none
        attempt = Attempt(len(attempts) + 1, replica.name, getrandbits(64) or 1, self._clock())
        attempt.host, attempt.port = replica.host, replica.port
        attempt.url = f"{replica.base}{call.prompt.path}"
        attempt.model = target.model or call.prompt.model or self._default_model
        attempt.backoff = slept
        attempt.breaker = replica.breaker.state.value
        attempt.budget_left = replica.budget.left()
        attempt.deadline_left = call.deadline.left()
        attempts.append(attempt)
        return attempt

    def _end(self, attempt: Attempt, error: BaseException | None) -> None:
        """Note how an attempt ended: once."""
        if attempt.ended is not None:
            return
        attempt.ended = self._clock()
        if error is None:
            attempt.outcome, attempt.decision = "ok", "answered"
        elif isinstance(error, BackendError):
            attempt.outcome, attempt.message = error.outcome, error.message
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

    def _progress(self, prompt: "Prompt") -> Progress:
        if prompt.path == "/v1/responses":
            return ResponsesProgress(keep_text=self._keep_text)
        return ChoicesProgress(prompt.choices, keep_text=self._keep_text)

    def _limit_idle(self, watch: Watch) -> None:
        watch.limit(
            self._idle_timeout, lambda: Stalled(f"The backend's answer stood still for {self._idle_timeout:g} s.")
        )

    def _no_answer(self) -> Silent:
        return Silent(f"The backend did not answer within {self._answer_timeout:g} s.", timer="answer")


def _note(retry: Retry, replica: "Replica", failure: BackendError) -> None:
    retry.tried.append(replica)
    if not failure.same_replica:
        retry.silent.add(replica)


_END_WORDS: dict[type[BaseException], str] = {DeadlineExceeded: "deadline", GatewayOverloaded: "memory"}


def _note_end(record: "Record", why: str) -> None:
    """The request ends in the middle of an attempt or of a backoff."""
    record.stop_reason = why
    if record.attempts and record.attempt.decision is None:
        record.attempt.decision = f"gave up: {why}"


def _describe(record: "Record", progress: Progress) -> None:
    record.answered(
        response_id=progress.response_id,
        model=progress.model,
        finish_reasons=progress.finish_reasons,
        input_tokens=progress.input_tokens,
        output_tokens=progress.output_tokens,
        texts=None if progress.text is None else [progress.text],
    )
