"""The way of a request, top to bottom: deadline > admission > target > retry > breaker > attempt."""

from asyncio import CancelledError, sleep, to_thread
from typing import TYPE_CHECKING

from tenacity import AsyncRetrying, retry_if_exception_type

from gateway.dialects.model_field import with_model
from gateway.errors import (
    BackendError,
    BackendUnavailable,
    CallerLeft,
    DeadlineExceeded,
    GatewayError,
    GatewayOverloaded,
    drop_frames,
)
from gateway.policy.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.forwarding.attempt import Attempts
    from gateway.forwarding.call import Call
    from gateway.policy.admission import Admission
    from gateway.policy.pool import Route, Target
    from gateway.policy.replica import Lease
    from gateway.policy.retry import RetryPolicy

LARGE_BODY = 65_536
"""Bytes; setting the model in a larger body takes milliseconds, and is done off the event loop."""
END_WORDS: dict[type[BaseException], str] = {DeadlineExceeded: "deadline"}


class Forwarder:
    """Takes a call to a backend that answers it.

    Args:
        admission: of all requests.
        policy: of retries.
        attempts: makes the attempts.
        clock: seconds, monotonic.
        retry_allowed, retry_refused: called with the name of the replica that gets a retry, or whose budget refused it.
    """

    def __init__(
        self,
        *,
        admission: "Admission",
        policy: "RetryPolicy",
        attempts: "Attempts",
        clock: "Callable[[], float]",
        retry_allowed: "Callable[[str], None]",
        retry_refused: "Callable[[str], None]",
    ) -> None:
        self._admission = admission
        self._policy = policy
        self._attempts = attempts
        self._clock = clock
        self._retry_allowed = retry_allowed
        self._retry_refused = retry_refused

    async def forward(self, call: "Call", route: "Route") -> None:
        """Get the call answered: `call.answer` is set, or its sink has received a complete stream.

        Raises:
            Refusal: no attempt was made.
            DeadlineExceeded: wherever the call was.
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
            word = error.reason if isinstance(error, GatewayOverloaded) else END_WORDS.get(type(error), "cancelled")
            call.record.give_up(word)
            raise
        finally:
            self._admission.leave()

    async def _try_targets(self, call: "Call", route: "Route") -> None:
        """Try each target in order, until one answers or a failure is final."""
        record = call.record
        failure: BackendError | None = None
        skipped: Target | None = None
        targets = self._draw(call, route) if route.weighted else route.targets
        for target in targets:
            if failure is not None:
                if call.deadline.left_to_commit() < target.connect_timeout:
                    record.stop_reason = "deadline"
                    break
                record.attempt.decision = "fallback"
            replica = target.pick()
            lease = replica.lease() if replica is not None else None
            if lease is None:
                skipped = target
                record.skip_target(target.backend, "full" if target.full else "breaker", self._clock())
                continue
            record.fell_back = target is not targets[0]
            try:
                await self._try_target(call, target, lease)
            except BackendError as error:
                failure = error
                drop_frames(error)
                if call.committed or not error.falls_back:
                    break
            else:
                record.stop_reason = None
                return
        if failure is None:
            raise _nobody(targets)
        if skipped is targets[-1]:  # one more target could have been asked, if its breakers were not open
            record.stop_reason = "backend_full" if skipped.full else "breaker"
        record.attempt.decision = f"gave up: {record.stop_reason}"
        raise failure

    def _draw(self, call: "Call", route: "Route") -> "tuple[Target, ...]":
        """Return the route's targets in the order drawn for this call, and note which one comes first."""
        targets = route.order()
        first = targets[0]
        call.record.draw_target(first.backend, first.model or call.model, first.weight, self._clock())
        return targets

    async def _try_target(self, call: "Call", target: "Target", lease: "Lease") -> None:
        """Make the first attempt at a target, and only when it fails set up further ones."""
        try:
            await self._set_model(call, target)
            lease.replica.budget.count_first()
            await self._attempts.make(call, target, lease, backoff=0.0)
        except BackendError as failure:
            if call.committed:
                call.record.stop_reason = "committed"
                raise
            await self._retry(call, target, lease, failure)
        finally:
            lease.release()
            if call.body is not call.prompt.body:
                call.share.give_back(len(call.prompt.body))

    async def _retry(self, call: "Call", target: "Target", lease: "Lease", failure: BackendError) -> None:
        """Make further attempts within a target: decide, back off, take a place, try. Raises: the last failure."""
        record = call.record
        retry = Retry(self._policy, target, call.deadline)
        retry.count(lease.replica, failure)
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(BackendError), stop=retry.is_over, reraise=True
            ):
                with attempt:
                    backoff = retry.backoff(failure, attempt.retry_state)
                    await sleep(backoff)  # 0 too: the loop notices connections that have closed meanwhile
                    if backoff:
                        backoff = self._clock() - (record.attempt.ended or 0.0)
                    lease = retry.lease(failure)
                    record.attempt.decision = "retry"
                    self._retry_allowed(lease.replica.name)
                    try:
                        await self._attempts.make(call, target, lease, backoff=backoff)
                    except BackendError as error:
                        failure = error
                        retry.count(lease.replica, error)
                        if call.committed:
                            retry.stopped = "committed"
                        raise
        except BackendError:
            record.stop_reason = retry.stopped
            if retry.stopped == "budget":
                self._retry_refused(retry.refused_by.name)
            raise
        finally:
            drop_frames(failure)

    async def _set_model(self, call: "Call", target: "Target") -> None:
        """Take the caller's bytes; set the model where the target names another or the caller named none.

        Raises:
            GatewayOverloaded: the share cannot hold a second body.
        """
        prompt = call.prompt
        call.body = prompt.body
        model = target.model or call.model
        if model == prompt.model:
            return
        call.share.hold(len(prompt.body))
        if len(prompt.body) < LARGE_BODY:
            call.body = with_model(prompt.body, model)
        else:
            call.body = await to_thread(with_model, prompt.body, model)


def _nobody(targets: "tuple[Target, ...]") -> GatewayError:
    """Return the error of a request that none of its targets takes."""
    if any(target.full for target in targets):
        return GatewayOverloaded(
            "All backends for this request have as many requests under way as they may have.", reason="backend_full"
        )
    waits = [wait for target in targets if (wait := target.retry_in()) is not None]
    return BackendUnavailable(
        "No backend can take the request now: their circuit breakers are open.", retry_after=min(waits, default=1.0)
    )
