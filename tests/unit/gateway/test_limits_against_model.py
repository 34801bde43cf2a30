"""The limits of a key against a model that keeps every use, and adds all of them up each time it is asked."""

import math
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.config import LimitsConfig
from gateway.policy.caller import Caller
from gateway.policy.limits import Limits, Reservation
from gateway.policy.window import DAY, MINUTE, SLOTS, Meter, Window
from gateway.record import Record
from gateway.server.responses import explaining
from tests.unit.gateway.fakes import Clock

EPOCH = 1_800_000_000.0
KINDS = ("requests", "tokens")


class Model:
    """One limit: every use of it, by the instant."""

    def __init__(self, name: str, limit: int, since: float, clock: Clock) -> None:
        self.name, self.limit, self.since, self.clock = name, limit, since, clock
        self.slot_seconds = (MINUTE if name.endswith("minute") else DAY) // SLOTS
        self.uses: list[list[float]] = []
        self.most: float | None = None
        self.leased = False
        self.elsewhere, self.empty_at = 0, 0.0
        self.slot = -1

    def look(self) -> None:
        """Forget what is too old."""
        slot = int(self.clock() // self.slot_seconds)
        if slot == self.slot:
            return
        self.slot = slot
        kept = [use for use in self.uses if int(use[0] // self.slot_seconds) >= slot - SLOTS]
        if self.leased and self.most is not None:
            self.most -= sum(use[1] for use in self.uses) - sum(use[1] for use in kept)
        self.uses = kept
        if self.clock() >= self.empty_at:
            self.elsewhere = 0

    def may(self) -> float:
        return self.limit if self.most is None else self.most

    def used(self) -> int:
        return int(sum(use[1] for use in self.uses))

    def slots(self) -> dict[int, int]:
        slots: dict[int, int] = {}
        for at, amount in self.uses:
            slot = int(at // self.slot_seconds)
            slots[slot] = slots.get(slot, 0) + int(amount)
        return {slot: used for slot, used in slots.items() if used}

    def reset(self) -> int:
        second = int(self.clock())
        own = max([(slot + SLOTS + 1) * self.slot_seconds - second for slot in self.slots()], default=0)
        return max(own, math.ceil(self.empty_at) - second) if self.elsewhere else own


class Taken(NamedTuple):
    """A request under way."""

    reservation: Reservation
    base: int
    request: dict[Model, list[float]]
    tokens: dict[Model, list[float]]


def told_of(limits: Limits) -> str:
    """The lines of an answer's head that tell of limits."""
    record = Record("POST", None, 1, 2, "id", 0.0, 0, caller=Caller("key", None, None, limits))
    return (
        explaining(record, limits.clock())
        .decode()
        .partition("server-timing: queue;dur=0.0\r\n")[2]
        .removesuffix("\r\n")
    )


limit = st.none() | st.integers(1, 60)
configs = st.fixed_dictionaries(
    {
        "requests_per_minute": limit,
        "requests_per_day": limit,
        "tokens_per_minute": limit,
        "tokens_per_day": limit,
        "max_in_flight": st.none() | st.integers(1, 6),
    }
).map(lambda drawn: LimitsConfig(**drawn))


class AgainstModel(RuleBasedStateMachine):
    """Whatever happens to a key, in whatever order: what is let through, and what is told, is as the model says."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock(EPOCH)
        self.config = LimitsConfig(requests_per_minute=8, tokens_per_minute=50, tokens_per_day=90)
        self.of = Limits(self.config, self.clock)
        self.models: dict[str, list[Model]] = {}
        self.change_models(-math.inf)
        self.open: list[Taken] = []

    def change_models(self, since: float) -> None:
        for kind in KINDS:
            known = {model.name: model for model in self.models.get(kind, ())}
            self.models[kind] = []
            for name in (f"{kind}_per_minute", f"{kind}_per_day"):
                if (limit := getattr(self.config, name)) is None:
                    continue
                model = known.get(name) or Model(name, limit, since, self.clock)
                model.limit, model.most, model.leased = limit, None, False
                self.models[kind].append(model)

    def pairs(self) -> list[tuple[Window, Model]]:
        return list(zip(self.of.windows, [*self.models["requests"], *self.models["tokens"]], strict=True))

    def look(self) -> None:
        for models in self.models.values():
            for model in models:
                model.look()

    @rule(tokens=st.integers(0, 70))
    def take(self, tokens: int) -> None:
        self.look()
        needs = [(model, 1) for model in self.models["requests"]]
        needs += [(model, min(tokens, model.limit)) for model in self.models["tokens"]]
        fits = all(model.used() + need <= model.may() for model, need in needs)
        if self.config.max_in_flight is not None and len(self.open) >= self.config.max_in_flight:
            fits = False
        reservation = Reservation(self.of, tokens)
        assert (reservation.take() is None) == fits
        if fits:
            base = min([tokens, *(model.limit for model in self.models["tokens"])])
            taken = Taken(reservation, base, {}, {})
            for model, need in needs:
                use = [self.clock(), need]
                model.uses.append(use)
                (taken.request if model in self.models["requests"] else taken.tokens)[model] = use

            self.open.append(taken)

    @rule(index=st.integers(0, 5), used=st.none() | st.integers(0, 90))
    def settle(self, index: int, used: int | None) -> None:
        if self.open:
            taken = self.open.pop(index % len(self.open))
            used = taken.reservation.tokens if used is None else used
            self.settle_models(taken, used)
            taken.reservation.settle(used)

    def settle_models(self, taken: Taken, used: int) -> None:
        for use in taken.tokens.values():
            use[1] = min(used, taken.base)
        if used > taken.base:
            self.look()
            for model in self.models["tokens"]:
                model.uses.append([self.clock(), used - taken.base])

    @rule(index=st.integers(0, 5))
    def give_back(self, index: int) -> None:
        if self.open:
            taken = self.open.pop(index % len(self.open))
            self.settle_models(taken, 0)
            for use in taken.request.values():
                use[1] = 0
            taken.reservation.give_back()

    @rule(seconds=st.floats(0.01, 3) | st.floats(3, 70) | st.floats(70, 3_000) | st.floats(3_000, 2 * DAY))
    def pass_time(self, seconds: float) -> None:
        self.clock.forward(seconds)

    @rule(length=st.sampled_from([1, DAY // SLOTS]))
    def pass_to_the_next_slot(self, length: int) -> None:
        self.clock.forward(length - self.clock() % length)

    @rule(config=configs)
    def change(self, config: LimitsConfig) -> None:
        self.config = config
        self.change_models(self.clock())
        for window in self.of.windows:
            window.leased = False
        self.of.change(config)
        self.clock.forward(0.001)

    @rule(
        slots=st.dictionaries(st.integers(-62, 3), st.integers(1, 20), max_size=3),
        index=st.integers(0, 3),
        later=st.booleans(),
    )
    def restore(self, slots: dict[int, int], index: int, later: bool) -> None:  # noqa: FBT001
        if later:
            self.pass_to_the_next_slot(DAY // SLOTS)
        of_a_day = [pair for pair in self.pairs() if pair[1].name.endswith("day")]
        if of_a_day:
            window, model = of_a_day[index % len(of_a_day)]
            model.look()
            for slot, used in slots.items():
                at = (model.slot + min(slot, 0)) * model.slot_seconds
                if slot >= -SLOTS:
                    model.uses.append([at, used])
            window.restore({model.slot + slot: used for slot, used in slots.items()}, self.clock())

    @rule(free=st.integers(-2, 30), index=st.integers(0, 3))
    def lease(self, free: int, index: int) -> None:
        pairs = self.pairs()
        if pairs:
            self.of.look()
            self.look()
            window, model = pairs[index % len(pairs)]
            window.leased = model.leased = True
            window.most = window.used + free
            model.most = model.used() + free

    @rule(used=st.integers(0, 30), empty_in=st.floats(0, 200), index=st.integers(0, 3))
    def hear(self, used: int, empty_in: float, index: int) -> None:
        pairs = self.pairs()
        if pairs:
            window, model = pairs[index % len(pairs)]
            window.elsewhere = model.elsewhere = used
            window.empty_at = model.empty_at = self.clock() + empty_in

    @rule()
    def compare(self) -> None:
        self.look()
        told = told_of(self.of)  # looks
        for window, model in self.pairs():
            assert (window.name, window.limit, window.most) == (model.name, model.limit, model.may())
            assert window.used == model.used() >= 0
            assert {slot: used for slot, used in window.slots().items() if used} == model.slots()
            assert window.left == model.limit - model.used() - model.elsewhere
        expected = ""
        for kind, meter in zip(KINDS, (self.of.requests, self.of.tokens), strict=True):
            expected += self.compare_meter(kind, meter)
        assert told == expected
        assert self.of.in_flight == len(self.open)

    def compare_meter(self, kind: str, meter: Meter) -> str:
        """Return what is to be told of it."""
        models = self.models[kind]
        assert meter.bound - meter.reading == min((model.may() - model.used() for model in models), default=math.inf)
        assert meter.smallest == min((model.limit for model in models), default=math.inf)
        if not models:
            assert meter.tightest is None
            return ""
        tightest = min(models, key=lambda model: model.limit - model.used() - model.elsewhere)
        left = tightest.limit - tightest.used() - tightest.elsewhere
        assert meter.tightest is not None
        assert meter.tightest.name == tightest.name
        assert meter.end - meter.reading == left
        assert meter.reading - meter.opened == tightest.slots().get(tightest.slot, 0)
        hours, seconds = divmod(tightest.reset(), 3_600)
        minutes, seconds = divmod(seconds, 60)
        reset = f"{hours}h{minutes}m{seconds}s" if hours else f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
        return (
            f"x-ratelimit-limit-{kind}: {tightest.limit}\r\nx-ratelimit-reset-{kind}: {reset}\r\n"
            f"x-ratelimit-remaining-{kind}: {max(0, left)}\r\n"
        )


class LookedAtAfterEachStep(AgainstModel):
    """The same: what has been found out for one step must not be told after the next."""

    @invariant()
    def is_as_the_model_says(self) -> None:
        self.compare()


TestAgainstModel = AgainstModel.TestCase
TestAgainstModel.settings = settings(max_examples=200)
TestLookedAtAfterEachStep = LookedAtAfterEachStep.TestCase
