"""The way of a request, top to bottom: deadline > admission > target > retry > breaker > attempt > wait."""

from asyncio import CancelledError, sleep
from functools import partial
from typing import TYPE_CHECKING

from tenacity import AsyncRetrying, retry_if_exception_type

from gateway.errors import (
    BackendError,
    BackendFull,
    BackendRateLimited,
    BackendUnavailable,
    CallerLeft,
    DeadlineExceeded,
    GatewayDraining,
    GatewayError,
    GatewayOverloaded,
    NoSuchPath,
    Verdict,
    drop_frames,
)
from gateway.forwarding.waits import Waits
from gateway.policy.retry import Retry
from gateway.record import COOLDOWN

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.executor import Executor
    from gateway.forwarding.attempt import Attempts
    from gateway.forwarding.call import Call
    from gateway.policy.admission import Admission
    from gateway.policy.fingerprints import Repeats
    from gateway.policy.guard import Watch
    from gateway.policy.lease import Lease
    from gateway.policy.pool import Target
    from gateway.policy.replica import Replica
    from gateway.policy.retry import RetryPolicy

END_WORDS: dict[type[BaseException], str] = {DeadlineExceeded: "deadline", GatewayDraining: "draining"}


class Forwarder:
    """Takes a call to a backend that answers it.

    Args:
        admission: of all requests.
        policy: of retries.
        attempts: makes the attempts.
        repeats: the requests that failed lately.
        executor: looks into large bodies.
        clock: seconds, monotonic.
        retry_allowed, retry_refused: called with the name of the replica that gets a retry, or whose budget refused it.
    """

    def __init__(
        self,
        *,
        admission: "Admission",
        policy: "RetryPolicy",
        attempts: "Attempts",
        repeats: "Repeats",
        executor: "Executor",
        clock: "Callable[[], float]",
        retry_allowed: "Callable[[str], None]",
        retry_refused: "Callable[[str], None]",
    ) -> None:
        self._admission = admission
        self._policy = policy
        self._attempts = attempts
        self._repeats = repeats
        self._executor = executor
        self._clock = clock
        self._retry_allowed = retry_allowed
        self._retry_refused = retry_refused

    async def forward(self, call: "Call") -> None:
        """Get the call answered: `call.answer` is set, or its sink has received a complete stream.

        Raises:
            Refusal: no attempt was made; among them RateLimitExceeded, where its charge does not fit.
            DeadlineExceeded: wherever the call was.
            BackendError: the last attempt's failure, before or after commit.
            CallerLeft: while a stream was written.
        """
        charge = call.charge
        if not self._admission.enter_at_once(call.caller, charge):
            queued_at = call.record.queued_at = self._clock()
            call.record.queued_for = self._admission.limit_in_the_way(call.caller, charge)
            try:
                await self._admission.enter(call.deadline.left_to_commit(), call.caller, charge)
            finally:
                call.record.queued = self._clock() - queued_at
        failure: BackendError | None = None
        try:
            if self._repeats.failed:
                await self._look_up(call)
            answered = False
            try:
                targets = call.targets if len(call.targets) == 1 else self._in_order(call)
                answered = await self._try_targets(call, targets)
            except BackendError as error:
                failure = error
                drop_frames(error)
            if not answered:
                await self._wait_and_try(call, failure)
        except BackendError as error:
            call.record.attempt.decision = f"gave up: {call.record.stop_reason}"
            call.record.failed_by = next((made for each, made in call.failures.values() if each is error), None)
            self._remember(call, error)
            raise
        except (DeadlineExceeded, GatewayOverloaded, GatewayDraining, CallerLeft, CancelledError) as error:
            word = error.reason if isinstance(error, GatewayOverloaded) else END_WORDS.get(type(error), "cancelled")
            call.record.give_up(word)
            raise
        finally:
            failure = None
            if call.failures:
                call.forget_failures()
            if charge is not None:
                charge.end(call)
            self._admission.leave(call.caller)

    async def _look_up(self, call: "Call") -> None:
        """Find out whether the same request failed a short time ago."""
        self._repeats.expire()
        if self._repeats.failed:
            fingerprint = await self._executor.run(len(call.prompt.body), call.fingerprint)
            call.failed_before = self._repeats.failed_by(call.caller, fingerprint)

    def _in_order(self, call: "Call") -> "tuple[Target, ...]":
        """Return the targets of a call; those that only repeat a refusal, noted, come after all others."""

        def refuses(target: "Target") -> bool:
            return target.refuses(target.model or call.model, call.prompt.path)

        targets = tuple(sorted(call.targets, key=refuses))
        for target in call.targets[: call.targets.index(targets[0])]:
            call.record.skip_target(target.backend, "avoided", self._clock())
        return targets

    async def _try_targets(
        self, call: "Call", targets: "tuple[Target, ...]", failure: BackendError | None = None
    ) -> bool:
        """Try each target in order, until one answers; return False when nobody could be asked who could answer.

        Args:
            call: to be answered.
            targets: in order.
            failure: of an earlier attempt, or None.

        Raises:
            BackendError: the last failure.
        """
        record = call.record
        skipped: Target | None = None
        for target in targets:
            if failure is not None and call.deadline.left_to_commit() < target.connect_timeout:
                record.stop_reason = "deadline"
                break
            lease = self._first_lease(call, target)
            if lease is None:
                skipped = target
                continue
            if failure is not None:
                record.attempt.decision = "fallback"
            record.fell_back = target is not call.targets[0]
            try:
                await self._try_target(call, target, lease)
            except BackendError as error:
                failure = error
                drop_frames(error)
                if call.committed or not error.falls_back:
                    raise
            else:
                record.stop_reason = None
                return True
        if failure is not None and skipped is targets[-1]:
            record.stop_reason = _why_skipped(call, skipped)  # one more target could have been asked but for that
        failure = call.narrow(failure)
        if failure is None:
            return False
        raise failure

    def _first_lease(self, call: "Call", target: "Target") -> "Lease | None":
        """Take a place for the first attempt at a target; None, noted, when it has none to give."""
        model = target.model or call.model
        home = target.home
        if home.full.queue or (home.bridging.queue and home.outage.holds_newcomers):  # behind those who wait already
            call.record.skip_target(target.backend, "full" if home.full.queue else "bridging", self._clock())
            return None
        last = partial(_comes_last, call, model) if len(target.replicas) > 1 else None
        lease = target.lease(model, without=call.given_up, last=last)
        if lease is None:
            why = _why_skipped(call, target)
            call.record.skip_target(target.backend, why, self._clock())
            if target.watch is not None and why == "breaker" and not call.record.attempts and target.watch.turn_away():
                call.record.note_guard(target.backend, self._clock())
            return None
        lease.replica.budget.count_first()
        return lease

    async def _try_target(self, call: "Call", target: "Target", lease: "Lease", *, waited: bool = False) -> None:
        """Make the first attempt at a target, and only when it fails set up further ones.

        Args:
            call: to be answered.
            target: where.
            lease: for the first attempt.
            waited: whether it may wait again in place of a retry, while an outage is bridged.

        Raises:
            BackendError: the last failure.
        """
        call.target = target
        watch, first = target.watch, not call.record.attempts
        try:
            call.body = call.prompt.body
            if call.body and (target.model or call.model) != call.prompt.model:
                await self._set_model(call, target)
            await self._attempts.make(call, target, lease, backoff=0.0)
        except BackendError as failure:
            _note(call, lease, failure)
            if watch is not None:
                self._tell_guard(watch, call, lease, failure, first=first)
            if call.committed:
                call.record.stop_reason = "committed"
                raise
            if waited and failure.outage and target.home.outage.is_bridged:
                raise
            await self._retry(call, target, lease, failure)
        else:
            if watch is not None:
                watch.note(failed=False, first=first)
        finally:
            lease.release()
            if call.body is not call.prompt.body:
                call.share.give_back(len(call.prompt.body))

    def _tell_guard(self, watch: "Watch", call: "Call", lease: "Lease", failure: BackendError, *, first: bool) -> None:
        """Tell the guard how an attempt has failed; what the breaker counts neither way does not count here either."""
        failed = lease.replica in call.counted
        if (failed or failure.verdict is Verdict.SUCCESS) and watch.note(failed=failed, first=first):
            call.record.note_guard(watch.backend, self._clock())

    async def _retry(self, call: "Call", target: "Target", lease: "Lease", failure: BackendError) -> None:
        """Make further attempts within a target: decide, back off, take a place, try. Raises: the last failure."""
        record = call.record
        retry = Retry(
            self._policy,
            target,
            target.model or call.model,
            call.deadline,
            given_up=call.given_up,
            is_repeat=call.failed_before is not None,
            made=max(0, call.attempts_at(target) - 1),
        )
        retry.count(lease.replica, failure, trial=lease.trial)
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
                        _note(call, lease, error)
                        retry.count(lease.replica, error, trial=lease.trial)
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

    async def _wait_and_try(self, call: "Call", failure: BackendError | None) -> None:
        """Wait for the end of an outage or a cooldown, and try again, as long as that may help.

        Raises:
            BackendError: the last attempt's failure.
            Refusal: nobody was asked who could answer.
        """
        waits = Waits(call, policy=self._policy, limit=self._admission.waiting, clock=self._clock)
        while (waiter := waits.begin(failure)) is not None:
            try:
                await waiter.chance
            finally:
                waits.end(waiter)
            lease = waits.take(waiter.chance.result())
            if lease is not None:
                failure = await self._try_after_wait(call, waits, lease)
                if failure is None:
                    return
                failure = call.narrow(failure)
        if failure is None:
            if call.record.attempts:
                call.record.give_up(_why_skipped(call, call.targets[0]))
            raise _refusal(call, self._clock(), full=waits.queued_in_vain)
        await self._try_later_targets(call, waits, failure)

    async def _try_after_wait(self, call: "Call", waits: Waits, lease: "Lease") -> BackendError | None:
        """Try the target that was waited for; return the failure."""
        record, target = call.record, waits.target
        if record.attempts:
            record.attempt.decision = f"waited: {record.waits[-1].kind}"
            self._retry_allowed(lease.replica.name)
        record.fell_back = target is not call.targets[0]
        try:
            await self._try_target(call, target, lease, waited=True)
        except BackendError as error:
            drop_frames(error)
            return error
        finally:
            waits.end_trial()
        record.stop_reason = None
        return None

    async def _try_later_targets(self, call: "Call", waits: Waits, failure: BackendError) -> None:
        """Try the targets after the one that failed after a wait. Raises: the last failure."""
        record = call.record
        if waits.led_to_attempt and waits.target in call.targets and failure.falls_back and not call.committed:
            later = call.targets[call.targets.index(waits.target) + 1 :]
            if later and await self._try_targets(call, later, failure):
                return
        if record.waits and (failure.outage or failure.cools) and not call.committed:
            kind = record.waits[-1].kind
            is_spent = kind == COOLDOWN and call.attempts_at(waits.target) >= self._policy.max_attempts
            record.stop_reason = "attempts" if is_spent else kind
        raise failure

    def _remember(self, call: "Call", failure: BackendError) -> None:
        """Remember a request that failed after more than one attempt, so that its repeat is not multiplied."""
        names = {attempt.backend for attempt in call.record.attempts if not attempt.resend}
        if sum(not attempt.resend for attempt in call.record.attempts) < 2 or failure.unreachable:  # noqa: PLR2004
            return
        self._repeats.add(call.caller, call.fingerprint(), frozenset(names))

    async def _set_model(self, call: "Call", target: "Target") -> None:
        """Set the model in the body: the target names another, or the caller named none.

        Raises:
            GatewayOverloaded: the share cannot hold a second body.
        """
        prompt = call.prompt
        call.share.hold(len(prompt.body))
        call.body = await self._executor.run(len(prompt.body), prompt.with_model, target.model or call.model)


def _note(call: "Call", lease: "Lease", failure: BackendError) -> None:
    """Note what a failure says beyond its attempt: to the request, and about the path."""
    call.note_failure(lease.replica, failure)
    if isinstance(failure, NoSuchPath):
        lease.replica.avoid_path(call.prompt.path, lease.model)


def _comes_last(call: "Call", model: str, replica: "Replica") -> bool:
    """Return whether a replica lacked the path a short time ago, or failed the same request."""
    return replica.lacks(call.prompt.path, model) or replica.name in (call.failed_before or ())


def _why_skipped(call: "Call", target: "Target") -> str:
    """Return why a target has no place to give."""
    if target.full:
        return "full"
    return "cooldown" if target.cooling_until(target.model or call.model) is not None else "breaker"


def _refusal(call: "Call", now: float, *, full: bool) -> GatewayError:
    """Return why no attempt was made; `full`: its backends stayed full for too long."""
    if full or any(target.full for target in call.targets):
        return BackendFull()
    ends = [end for target in call.targets if (end := target.cooling_until(target.model or call.model)) is not None]
    if ends:
        return BackendRateLimited(
            "Every backend that could answer has asked to be left alone for now.", retry_after=min(ends) - now
        )
    waits = [wait for target in call.targets if (wait := target.retry_in()) is not None]
    return BackendUnavailable(
        "No backend can take the request now: their circuit breakers are open, or they have failed for some seconds.",
        retry_after=min(waits, default=1.0),
    )
