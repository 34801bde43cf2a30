"""Replicas that asked to be left alone: with 429, or with 503 or 529 and a `Retry-After`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST = 1.0
"""Seconds of a cooldown for which the replica named none; doubled while it goes on, up to `LONGEST_OWN`."""
LONGEST_OWN = 30.0
LONGEST = 300.0
"""Seconds; a longer `Retry-After` is cut to it."""
PATIENCE = 0.1
"""Seconds after which the first attempt after a cooldown no longer keeps others waiting: a refusal comes at once."""
MEMORY = 30.0
"""Seconds after the end of a cooldown for which it is remembered, so that the next one can be longer."""
MAX_MODELS = 1000


class _Pause:
    __slots__ = ("began", "length", "trial_at", "until")

    def __init__(self, began: float) -> None:
        self.began = began
        self.until = began
        self.length = 0.0
        self.trial_at: float | None = None


class Cooldown:
    """The cooldowns of one replica by the model it was asked for; limits of hosted APIs are by model.

    A cooling pair is not asked. When its cooldown is over one attempt goes first; a success ends the cooldown.

    Args:
        clock: seconds, monotonic.
        begun: called with (model, seconds) when a cooldown begins or grows.
        changed: called with the model, or None for all of them, when somebody may have to wait less.
    """

    def __init__(
        self,
        *,
        clock: "Callable[[], float]",
        begun: "Callable[[str, float], None]" = lambda _model, _seconds: None,
        changed: "Callable[[str | None, bool], None]" = lambda _model, _over: None,
    ) -> None:
        self._clock = clock
        self._begun = begun
        self._changed = changed
        self._by_model: dict[str, _Pause] = {}
        self._whole: _Pause | None = None  # of every model

    @property
    def left(self) -> float | None:
        """Seconds until no model cools any more; None when none does."""
        now = self._clock()
        pauses = [*self._by_model.values(), *([self._whole] if self._whole is not None else [])]
        return max((pause.until - now for pause in pauses if pause.until > now), default=None)

    def due(self, model: str) -> float | None:
        """Return the instant from which an attempt for the model is admitted; None: at once."""
        if not self._by_model and self._whole is None:
            return None
        now = self._clock()
        instants = [
            pause.until if pause.trial_at is None else max(pause.until, pause.trial_at + PATIENCE)
            for pause in self._pauses(model, now)
        ]
        latest = max(instants, default=now)
        return latest if latest > now else None

    def take(self, model: str) -> bool:
        """Note that an attempt is made; return whether it is the first one after a cooldown."""
        if not self._by_model and self._whole is None:
            return False
        now = self._clock()
        pauses = self._pauses(model, now)
        for pause in pauses:
            pause.trial_at = now if pause.trial_at is None else pause.trial_at
        return bool(pauses)

    def begin(self, model: str, seconds: float | None, asked_at: float) -> None:
        """Begin a cooldown.

        Args:
            model: the one that was asked for; "" for a call that asks none, which says nothing about models.
            seconds: what the replica asked for, or None.
            asked_at: when the attempt began; what is answered to attempts from before a cooldown does not double it.
        """
        now = self._clock()
        others = [
            name for name, pause in self._by_model.items() if name and model and name != model and pause.until > now
        ]
        before = self._by_model.get(model)
        if before is not None and before.until + MEMORY < now:
            before = None
        pause = before or _Pause(now)
        if before is None or pause.began <= asked_at:
            own = FIRST if before is None else min(LONGEST_OWN, 2 * max(pause.length, FIRST))
            pause.began, pause.trial_at = now, None
            pause.length = min(LONGEST, seconds) if seconds is not None else own
            pause.until = now + pause.length
        elif seconds is not None:
            pause.until = max(pause.until, now + min(LONGEST, seconds))
        self._by_model.pop(model, None)
        self._by_model[model] = pause  # the latest is the last one to be forgotten
        self._bound()
        if others:  # a second model: the limit is not by model
            whole = self._whole = self._whole or _Pause(now)
            whole.began, whole.until, whole.trial_at = now, max(whole.until, pause.until), None
        self._begun(model, pause.until - now)
        self._changed(None if others else model, False)

    def hint(self, model: str, seconds: float) -> None:
        """Cool as long as somebody else does who asked the same replica, unless it is for longer already."""
        now = self._clock()
        if (self.due(model) or now) < now + seconds:
            pause = self._by_model[model] = self._by_model.get(model) or _Pause(now)
            pause.began, pause.until, pause.trial_at = now, now + seconds, None
            self._bound()
            self._changed(model, False)

    def succeed(self, model: str, asked_at: float) -> None:
        """End the cooldown: an attempt that began after it was answered."""
        if not self._by_model and self._whole is None:
            return
        pause, whole = self._by_model.get(model), self._whole
        ended = False
        if pause is not None and pause.began <= asked_at:
            del self._by_model[model]
            ended = True
        if whole is not None and whole.began <= asked_at:
            self._whole = None
            self._changed(None, True)
        elif ended:
            self._changed(model, True)

    def let_go(self, model: str) -> None:
        """Let another attempt go first: the one that did ended without an answer to this question."""
        for pause in self._pauses(model, self._clock()):
            pause.trial_at = None
        self._changed(model, False)

    def _bound(self) -> None:
        if len(self._by_model) > MAX_MODELS:
            del self._by_model[next(iter(self._by_model))]

    def _pauses(self, model: str, now: float) -> list[_Pause]:
        """Return the pauses that concern the model; what has long ended is forgotten."""
        pauses = []
        for pause in (self._whole, self._by_model.get(model)):
            if pause is None:
                continue
            if pause.until + MEMORY < now:
                if pause is self._whole:
                    self._whole = None
                else:
                    del self._by_model[model]
            else:
                pauses.append(pause)
        return pauses
