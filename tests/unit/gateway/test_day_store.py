import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from gateway import day_store
from gateway.config import KeyConfig, LimitsConfig
from gateway.day_store import FILE, DayStore
from gateway.limits_store import PREFIX
from gateway.policy.allotment import Allotment
from gateway.policy.caller import Caller
from gateway.policy.ledger import Answer
from gateway.policy.limits import Limits, Reservation
from gateway.policy.window import DAY
from gateway.workers import parent_store
from gateway.workers.parent_store import Ledgers
from testkit.polling import until
from tests.unit.gateway.fakes import Clock

EPOCH = 1_800_000_000.0


@pytest.fixture(autouse=True)
def quick_looks_and_patience_with_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(day_store, "INTERVAL", 0.01)
    for limit in ("BUSY", "LAST_SAVE"):
        monkeypatch.setattr(day_store, limit, 30.0)


def caller(clock: Clock, name: str = "a", **config: int) -> Caller:
    return Caller(f"key {name}", name, None, Limits(LimitsConfig(**config or {"tokens_per_day": 1_000}), clock))


def use(of: Caller, tokens: int) -> None:
    assert of.limits is not None
    reservation = Reservation(of.limits, tokens)
    assert reservation.take() is None
    reservation.settle(tokens)


def used(of: Caller) -> int:
    assert of.limits is not None
    of.limits.look()
    return of.limits.tokens.windows[0].used


def rows(folder: Path) -> list[tuple[str, str, int, int]]:
    with closing(sqlite3.connect(folder / FILE, timeout=30)) as database:
        if not list(database.execute("SELECT 1 FROM sqlite_master WHERE name = 'used'")):
            return []  # a file is there before its table is
        return list(database.execute("SELECT key, name, slot, amount FROM used ORDER BY slot"))


async def test_what_was_used_is_there_again_until_a_day_later(tmp_path: Path) -> None:
    clock = Clock(EPOCH)
    first = caller(clock)
    async with DayStore(tmp_path, [first], clock):
        use(first, 100)
        clock.forward(7_200)
        use(first, 20)
    clock.forward(3_600)
    second, other = caller(clock), caller(clock, "other")
    async with DayStore(tmp_path, [second, other], clock) as store:
        assert (used(second), used(other), store.status) == (120, 0, "ok")
    clock.forward(DAY - 7_200)
    third = caller(clock)
    async with DayStore(tmp_path, [third], clock):
        assert used(third) == 20
        use(third, 1)
    assert [amount for *_, amount in rows(tmp_path)] == [20, 1], "what is older than a day is dropped"


async def test_it_is_saved_while_the_process_runs(tmp_path: Path) -> None:
    clock = Clock(EPOCH)
    one = caller(clock)
    async with DayStore(tmp_path, [one], clock):
        use(one, 7)
        await until(lambda: [amount for *_, amount in rows(tmp_path)] == [7])
        assert one.limits is not None
        reservation = Reservation(one.limits, 50)
        reservation.take()
        await until(lambda: [amount for *_, amount in rows(tmp_path)] == [57])
        reservation.settle(3)
        await until(lambda: [amount for *_, amount in rows(tmp_path)] == [10])


async def test_two_processes_in_one_folder_add_up(tmp_path: Path) -> None:
    clock = Clock(EPOCH)
    old, new = caller(clock), caller(clock)
    async with DayStore(tmp_path, [old], clock):
        use(old, 5)
        await until(lambda: [amount for *_, amount in rows(tmp_path)] == [5])
        async with DayStore(tmp_path, [new], clock):
            use(new, 20)
            use(old, 100)
    after = caller(clock)
    async with DayStore(tmp_path, [after], clock):
        assert used(after) == 125


async def test_a_locked_file_is_said_once_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "gateway")
    monkeypatch.setattr(day_store, "BUSY", 0.05)
    clock = Clock(EPOCH)
    before = caller(clock)
    async with DayStore(tmp_path, [before], clock):
        use(before, 3)
    lock = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    one = caller(clock)
    async with DayStore(tmp_path, [one], clock) as store:
        assert (store.status, used(one)) == ("degraded", 0)
        use(one, 10)
        await asyncio.sleep(0.3)
        assert store.status == "degraded"
        lock.execute("ROLLBACK")
        await until(lambda: store.status == "ok")
        assert used(one) == 13
    lock.close()
    assert [amount for *_, amount in rows(tmp_path)] == [13]
    assert len([record for record in caplog.records if "limits of a day" in record.getMessage()]) == 2


@pytest.mark.parametrize("content", [b"no database" * 200, b"SQLite format 3\0 and nothing else"])
async def test_a_broken_file_hurts_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    clock = Clock(EPOCH)
    one = caller(clock)
    async with DayStore(tmp_path, [one], clock) as store:
        use(one, 10)
        assert (store.status, used(one)) == ("degraded", 10)
    assert (tmp_path / FILE).read_bytes() == content


async def test_odd_rows_are_left_alone(tmp_path: Path) -> None:
    clock = Clock(EPOCH)
    async with DayStore(tmp_path, [caller(clock)], clock):
        pass
    slot = int(EPOCH // 1440)
    with closing(sqlite3.connect(tmp_path / FILE)) as database, database:
        odd = [("a", "tokens_per_day", "x", 1), ("a", "tokens_per_day", slot - 1, "y"), ("b", "?", slot, 4)]
        database.executemany(
            "INSERT INTO used VALUES (?, ?, ?, ?)", [*odd, ("a", "tokens_per_day", slot, 5), (None, None, slot, 6)]
        )
    one = caller(clock)
    async with DayStore(tmp_path, [one], clock) as store:
        assert (used(one), store.status) == (5, "ok")


@pytest.mark.parametrize(
    ("config", "folder", "status"),
    [(None, True, "off"), ({"max_in_flight": 1}, True, "ok"), ({"tokens_per_day": 1}, False, "ok")],
)
async def test_without_limits_of_a_day_or_a_folder_there_is_no_file(
    tmp_path: Path, config: dict[str, int] | None, status: str, *, folder: bool
) -> None:
    clock = Clock(EPOCH)
    one = Caller("key a", "a", None, Limits(LimitsConfig(**config), clock) if config is not None else None)
    async with DayStore(tmp_path if folder else None, [one], clock) as store:
        assert store.status == status
    assert not (tmp_path / FILE).exists()


async def test_a_key_that_goes_and_comes_back_has_used_what_it_used(tmp_path: Path) -> None:
    clock = Clock(EPOCH)
    first, other = caller(clock), caller(clock, "other")
    async with DayStore(tmp_path, [first, other], clock) as store:
        use(first, 100)
        store.follow([other])
        await until(lambda: [amount for *_, amount in rows(tmp_path)] == [100])
        assert store.status == "ok"
        store.follow([])
        assert store.status == "off"
        again = caller(clock)
        store.follow([again])
        await until(lambda: used(again) == 100)
        use(again, 20)
        await until(lambda: [amount for *_, amount in rows(tmp_path)] == [120])


async def test_a_limit_that_goes_and_comes_back_has_the_same_uses(tmp_path: Path) -> None:
    clock = Clock(EPOCH)
    one = caller(clock)
    async with DayStore(tmp_path, [one], clock) as store:
        use(one, 100)
        await until(lambda: [amount for *_, amount in rows(tmp_path)] == [100])
        assert one.limits is not None
        for config in (LimitsConfig(requests_per_minute=9), LimitsConfig(tokens_per_day=2_000)):
            one.limits.change(config)
            store.follow([one])
        await until(lambda: used(one) == 100)
        use(one, 20)
        await until(lambda: [amount for *_, amount in rows(tmp_path)] == [120])


# Where several workers share the limits, their parent's ledgers


class Sharer:
    """A worker's part of a key's limits: it reports to the parent's ledgers."""

    def __init__(self, ledgers: Ledgers, clock: Clock, number: int, **config: int) -> None:
        self.caller = caller(clock, "a", **config)
        assert self.caller.limits is not None
        self.number = number
        self._ledgers = ledgers
        self._allotment = Allotment(self.caller.limits, f"{number}", 0.5, lambda _: asyncio.Future())
        self._allotment.come_back()

    def report(self) -> None:
        for _ in range(3):
            report = msgspec.msgpack.encode(self._allotment.report(f"epoch {id(self._ledgers)}")).decode("latin-1")
            (answer,), self.keeps = self._ledgers.exchange(self.number, [(f"{PREFIX}a", report)])
            self._allotment.answered(msgspec.msgpack.decode(answer.encode("latin-1"), type=Answer))
            if not self._allotment.at_once:
                return

    def use(self, tokens: int) -> None:
        assert self.caller.limits is not None
        reservation = Reservation(self.caller.limits, tokens)
        if reservation.take() is not None:  # it is asked for
            self.report()
            assert reservation.take() is None
        reservation.settle(tokens)
        self.report()

    @property
    def left(self) -> int:
        assert self.caller.limits is not None
        self.report()
        return self.caller.limits.tokens.windows[0].left


def keyed(**config: int) -> list[KeyConfig]:
    return [KeyConfig("a", b"", limits=LimitsConfig(**config or {"tokens_per_day": 1_000}))]


async def test_one_process_and_several_workers_go_on_with_what_the_others_have_used(tmp_path: Path) -> None:
    clock = Clock(EPOCH)
    before = caller(clock)
    async with DayStore(tmp_path, [before], clock):
        use(before, 100)
    clock.forward(3_600)
    ledgers = Ledgers(tmp_path, clock=clock)
    ledgers.expect(keyed())
    async with ledgers:
        one, two = (Sharer(ledgers, clock, number) for number in (1, 2))
        one.use(30)
        two.use(4)
        assert (one.left, two.left, ledgers.used()) == (866, 866, {("a", "tokens_per_day"): 134})
        await until(lambda: sum(amount for *_, amount in rows(tmp_path)) == 134)
        one.use(6)
    clock.forward(3_600)
    after = caller(clock)
    async with DayStore(tmp_path, [after], clock):
        assert used(after) == 140
    clock.forward(DAY - 5_000)
    ledgers = Ledgers(tmp_path, clock=clock)
    ledgers.expect(keyed())
    async with ledgers:
        assert ledgers.used() == {("a", "tokens_per_day"): 40}


async def test_a_ledger_knows_what_was_used_of_a_limit_that_comes_with_a_reload(tmp_path: Path) -> None:
    clock = Clock(EPOCH)
    before = caller(clock)
    async with DayStore(tmp_path, [before], clock):
        use(before, 100)
    ledgers = Ledgers(tmp_path, clock=clock)
    ledgers.expect([*keyed(tokens_per_minute=5), KeyConfig(None, b"")])
    async with ledgers:
        assert ledgers.used() == {}
        one = Sharer(ledgers, clock, 1)
        one.report()
        await until(lambda: ledgers.used() == {("a", "tokens_per_day"): 100})
        clock.forward(1)
        assert one.left == 900


async def test_workers_are_told_when_what_they_use_of_a_day_cannot_be_kept(tmp_path: Path) -> None:
    clock = Clock(EPOCH)
    (tmp_path / "state").write_text("a file")
    ledgers = Ledgers(tmp_path / "state", clock=clock)
    ledgers.expect(keyed())
    async with ledgers:
        one = Sharer(ledgers, clock, 1)
        one.use(7)
        assert not one.keeps
        (tmp_path / "state").unlink()
        await until(lambda: (tmp_path / "state" / FILE).exists() and bool(rows(tmp_path / "state")))
        await until(lambda: ledgers.exchange(1, [])[1])


async def test_of_a_worker_that_ends_nothing_is_held_and_what_nobody_knows_of_counts(tmp_path: Path) -> None:
    clock = Clock(EPOCH)
    ledgers = Ledgers(tmp_path, clock=clock)
    ledgers.expect(keyed())
    async with ledgers:
        one, two = (Sharer(ledgers, clock, number) for number in (1, 2))
        one.use(40)
        one.report()  # it holds a reserve
        clock.forward(0.1)
        use(one.caller, 10)
        ledgers.ended(1)
        ledgers.ended(1)
        (counted,) = ledgers.used().values()
        assert 50 <= counted <= 90
        two.use(1_000 - counted)
        assert two.left == 0, "all that the other held could be used at once"
    assert sum(amount for *_, amount in rows(tmp_path)) == 1_000


async def test_ledgers_of_which_nothing_counts_make_room_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent_store, "MOST", 2)
    clock = Clock(EPOCH)
    ledgers = Ledgers(tmp_path, clock=clock)
    ledgers.expect([KeyConfig(name, b"", limits=LimitsConfig(tokens_per_day=9)) for name in "bcde"])
    async with ledgers:
        one = Sharer(ledgers, clock, 1)
        one.use(5)
        assert set(ledgers.used()) == {("e", "tokens_per_day"), ("a", "tokens_per_day")}


async def test_without_limits_of_a_day_the_parent_of_workers_has_no_file(tmp_path: Path) -> None:
    clock = Clock(EPOCH)
    ledgers = Ledgers(tmp_path, clock=clock)
    ledgers.expect(keyed(tokens_per_minute=1_000))
    async with ledgers:
        one = Sharer(ledgers, clock, 1, tokens_per_minute=1_000)
        one.use(7)
        ledgers.ended(1)
    assert not (tmp_path / FILE).exists()
