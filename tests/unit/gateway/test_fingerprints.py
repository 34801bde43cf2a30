"""Bodies that failed are remembered for a while, and not too many of them."""

from gateway.policy.fingerprints import BAD_BODY, MAX_FINGERPRINTS, REPEAT, BadBodies, Repeats, fingerprint
from tests.unit.gateway.fakes import Clock


def test_a_body_is_known_for_a_minute() -> None:
    clock = Clock()
    bad = BadBodies(clock)

    assert not bad.add(b"1")
    clock.forward(BAD_BODY - 1)
    assert bad.add(b"1")
    assert not bad.add(b"2")
    clock.forward(BAD_BODY + 1)
    assert not bad.add(b"1")


def test_a_fingerprint_is_of_path_and_body() -> None:
    assert len({fingerprint("/a", [b"1"]), fingerprint("/b", [b"1"]), fingerprint("/a", [b"2"])}) == 3
    assert fingerprint("/a", [b"1"]) == fingerprint("/a", [b"1"])


def test_a_repeat_is_of_the_same_caller_within_half_a_minute() -> None:
    clock = Clock()
    repeats = Repeats(clock)
    failed = frozenset({"a-1", "a-2"})
    repeats.add("one", b"1", failed)

    assert repeats.failed_by("one", b"1") == failed
    assert repeats.failed_by("another", b"1") is None
    assert repeats.failed_by("one", b"2") is None
    clock.forward(REPEAT)
    repeats.expire()
    assert not repeats.failed
    assert repeats.failed_by("one", b"1") is None


def test_their_number_is_bounded() -> None:
    clock = Clock()
    repeats, bad = Repeats(clock), BadBodies(clock)
    for number in range(3 * MAX_FINGERPRINTS):
        repeats.add("one", str(number).encode(), frozenset())
        bad.add(str(number).encode())

    assert len(repeats.failed) == len(bad._until) == MAX_FINGERPRINTS
    assert repeats.failed_by("one", str(3 * MAX_FINGERPRINTS - 1).encode()) is not None
