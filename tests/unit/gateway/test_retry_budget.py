from hypothesis import example, given
from hypothesis import strategies as st

from gateway.policy.retry_budget import WINDOW, RetryBudget
from tests.unit.gateway.fakes import Clock


def budget(clock: Clock, ratio: float = 0.2, floor: int = 10) -> RetryBudget:
    return RetryBudget(ratio=ratio, floor=floor, clock=clock)


def taken(of: RetryBudget, tries: int = 1000) -> int:
    return sum(of.take() for _ in range(tries))


def test_a_quiet_replica_may_receive_the_floor() -> None:
    assert taken(budget(Clock())) == 10


def test_a_busy_replica_may_receive_its_share() -> None:
    of = budget(Clock())
    for _ in range(1000):
        of.count_first()

    assert of.left() == 200
    assert taken(of) == 200
    assert of.left() == 0


def test_share_and_floor_are_not_added() -> None:
    of = budget(Clock(), ratio=0.5, floor=3)
    for _ in range(10):
        of.count_first()

    assert taken(of) == 5


def test_ratio_0_allows_no_retry_whatever_the_floor() -> None:
    of = budget(Clock(), ratio=0, floor=100)
    for _ in range(100):
        of.count_first()

    assert not of.allows_any
    assert of.left() == 0
    assert not of.take()


def test_floor_0_and_no_first_attempt_allow_none_but_retries_exist() -> None:
    of = budget(Clock(), floor=0)

    assert of.allows_any
    assert not of.take()


def test_a_refused_retry_costs_nothing() -> None:
    clock = Clock()
    of = budget(clock, floor=1)
    assert of.take()
    for _ in range(50):
        assert not of.take()
    clock.forward(WINDOW)

    assert of.take()


def test_what_was_taken_comes_back_when_its_window_is_over_and_not_before() -> None:
    clock = Clock()
    of = budget(clock)
    assert taken(of) == 10
    clock.forward(WINDOW - 0.001)
    assert taken(of) == 0
    clock.forward(0.001)

    assert taken(of) == 10


def test_first_attempts_expire_with_the_window() -> None:
    clock = Clock()
    of = budget(clock, floor=0)
    for _ in range(100):
        of.count_first()
    clock.forward(WINDOW / 2)
    assert of.left() == 20
    clock.forward(WINDOW / 2)

    assert of.left() == 0


def test_a_pause_of_an_hour_empties_the_window_once() -> None:
    clock = Clock()
    of = budget(clock, floor=0)
    for _ in range(100):
        of.count_first()
    clock.forward(3600)
    for _ in range(5):
        of.count_first()

    assert of.left() == 1


STEP = st.tuples(st.sampled_from(["first", "retry", "burst"]), st.floats(0, 12))


@given(
    st.lists(STEP, max_size=120),
    st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.7, 1.0, 3.0]),
    st.integers(0, 12),
    st.floats(0, 1e6),
)
@example([("first", 0.05)] * 60 + [("retry", 0.05)] * 60, 0.2, 0, 0.0)
def test_whenever_a_retry_is_sent_the_last_ten_seconds_keep_the_promise(
    steps: list[tuple[str, float]], ratio: float, floor: int, start: float
) -> None:
    clock = Clock(start)
    of = budget(clock, ratio, floor)
    firsts: list[float] = []
    retries: list[float] = []
    for kind, pause in steps:
        clock.forward(pause)
        if kind != "retry":
            for _ in range(1 if kind == "first" else 25):
                of.count_first()
                firsts.append(clock())
            continue
        before = of.left()
        went = of.take()
        assert went == (before > 0)
        assert of.left() == before - went
        if not went:
            continue
        retries.append(clock())
        begin = clock() - WINDOW
        sent = sum(moment > begin for moment in retries)
        base = sum(moment > begin for moment in firsts)
        assert ratio > 0
        assert sent <= max(ratio * base + 1e-9, floor)


@given(st.floats(5, 60), st.floats(0, 1e5))
def test_in_a_total_outage_a_replica_gets_at_most_a_fifth_more(rate: float, start: float) -> None:
    clock = Clock(start)
    of = budget(clock, ratio=0.2, floor=10)
    requests = int(rate * 30)
    attempts = 0
    for _ in range(requests):
        of.count_first()
        attempts += 1 + of.take() + of.take()
        clock.forward(1 / rate)

    assert attempts <= 1.2 * requests + 10


def test_at_a_steady_rate_the_whole_share_is_used() -> None:
    clock = Clock()
    of = budget(clock, ratio=0.2, floor=0)
    retries = 0
    for _ in range(3000):
        of.count_first()
        retries += of.take()
        clock.forward(0.01)

    assert 0.95 * 600 <= retries <= 600
