"""The cooldown of a replica as a state machine: who is admitted when, and how it grows and ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.cooldown import FIRST, LONGEST, LONGEST_OWN, MAX_MODELS, MEMORY, PATIENCE, Cooldown
from tests.unit.gateway.fakes import Clock


def cooldown(clock: Clock) -> Cooldown:
    return Cooldown(clock=clock)


def test_without_a_retry_after_it_takes_a_second_and_doubles_while_it_goes_on() -> None:
    clock = Clock()
    of = cooldown(clock)
    lengths = []
    for _ in range(8):
        of.begin("m", None, clock())
        due = of.due("m")
        assert due is not None
        lengths.append(due - clock())
        clock.now = due
        assert of.due("m") is None
        assert of.take("m")

    assert lengths == [FIRST, 2, 4, 8, 16, LONGEST_OWN, LONGEST_OWN, LONGEST_OWN]


@pytest.mark.parametrize(("asked", "seconds"), [(0.25, 0.25), (30.0, 30.0), (1e6, LONGEST)])
def test_a_retry_after_is_kept_up_to_a_limit(asked: float, seconds: float) -> None:
    clock = Clock()
    of = cooldown(clock)
    of.begin("m", asked, clock())

    assert of.due("m") == clock() + seconds
    assert of.left == seconds
    assert of.due("another") is None


def test_many_refusals_of_what_was_sent_before_it_began_do_not_double_it() -> None:
    clock = Clock()
    of = cooldown(clock)
    asked_at = clock()
    clock.forward(0.1)
    for _ in range(20):
        of.begin("m", None, asked_at)

    assert of.due("m") == clock() + FIRST


def test_after_it_one_goes_first_and_the_others_follow_its_success() -> None:
    clock = Clock()
    of = cooldown(clock)
    of.begin("m", 5, clock())
    clock.forward(5)

    assert of.due("m") is None
    assert of.take("m")
    assert of.due("m") == clock() + PATIENCE
    of.succeed("m", clock())
    assert of.due("m") is None
    assert not of.take("m")


def test_a_first_one_that_takes_long_keeps_nobody_waiting() -> None:
    clock = Clock()
    of = cooldown(clock)
    of.begin("m", 5, clock())
    clock.forward(5)
    of.take("m")
    clock.forward(PATIENCE)

    assert of.due("m") is None
    of.take("m")
    assert of.due("m") is None, "all of them follow"


def test_a_first_one_without_an_answer_lets_another_go_first() -> None:
    clock = Clock()
    of = cooldown(clock)
    of.begin("m", 5, clock())
    clock.forward(5)
    of.take("m")
    of.let_go("m")

    assert of.due("m") is None
    assert of.take("m")


def test_an_answer_to_what_was_sent_before_it_began_does_not_end_it() -> None:
    clock = Clock()
    of = cooldown(clock)
    asked_at = clock()
    clock.forward(1)
    of.begin("m", 5, clock())
    of.succeed("m", asked_at)

    assert of.due("m") == clock() + 5


def test_a_second_model_in_that_time_cools_the_whole_replica() -> None:
    clock = Clock()
    of = cooldown(clock)
    of.begin("m", 5, clock())
    clock.forward(1)
    of.begin("n", 10, clock())

    assert of.due("another") == of.due("n") == clock() + 10
    clock.forward(10)
    assert of.take("another")
    of.succeed("another", clock())
    assert [of.due(model) for model in ("m", "n", "another")] == [None, None, None]


def test_the_success_of_one_model_does_not_shorten_the_cooldown_of_another() -> None:
    clock = Clock()
    of = cooldown(clock)
    of.begin("m", 9, clock())
    of.begin("n", 1, clock())
    clock.forward(1)
    of.take("n")
    of.succeed("n", clock())

    assert of.due("n") is None
    assert of.due("m") == clock() + 8


def test_what_has_long_ended_is_forgotten() -> None:
    clock = Clock()
    of = cooldown(clock)
    of.begin("m", 5, clock())
    clock.forward(5 + MEMORY + 1)
    assert not of.take("m")
    of.begin("m", None, clock())

    assert of.due("m") == clock() + FIRST


def test_the_number_of_models_is_bounded() -> None:
    clock = Clock()
    of = cooldown(clock)
    for number in range(3 * MAX_MODELS):
        of.begin(str(number), 5, clock())

    assert len(of._by_model) == MAX_MODELS


STEP = st.one_of(
    st.tuples(st.just("wait"), st.floats(0.01, 20)),
    st.tuples(st.sampled_from(["ask", "good", "limited", "gone"]), st.sampled_from(["m", "n", "o"])),
    st.tuples(st.just("limited for"), st.floats(0, 40)),
)


@given(st.lists(STEP, max_size=40))
def test_whatever_happens_nobody_is_admitted_too_early_and_everybody_in_the_end(
    steps: list[tuple[str, object]],
) -> None:
    clock = Clock()
    of = cooldown(clock)
    closed: dict[str, float] = {}
    for what, which in steps:
        model = which if isinstance(which, str) else "m"
        if what == "wait":
            clock.forward(float(str(which)))
        elif of.due(model) is None and what != "ask":
            assert clock() >= closed.get(model, 0.0)
            of.take(model)
            if what == "good":
                of.succeed(model, clock())
            elif what == "gone":
                of.let_go(model)
            else:
                seconds = float(str(which)) if what == "limited for" else None
                of.begin(model, seconds, clock())
                closed[model] = clock() + (seconds if seconds is not None else FIRST)
    clock.forward(LONGEST + 1)
    assert [of.due(model) for model in ("m", "n", "o")] == [None] * 3
    assert of.left is None


def test_a_hint_cools_as_long_as_the_other_does_and_never_shortens_a_cooldown() -> None:
    clock = Clock()
    begun: list[float] = []
    of = Cooldown(clock=clock, begun=lambda _model, seconds: begun.append(seconds))
    of.hint("m", 20)
    assert of.due("m") == clock() + 20
    of.hint("m", 5)
    assert of.due("m") == clock() + 20
    of.hint("m", 30)
    assert of.due("m") == clock() + 30
    assert begun == []  # or two that hint to each other would never stop
    clock.now += 30
    assert of.due("m") is None
    assert of.take("m")
    of.succeed("m", clock())
    assert not of.take("m")
    for number in range(MAX_MODELS + 10):
        of.hint(str(number), 1)
    assert of.due("0") is None
