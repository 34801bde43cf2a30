import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from gateway import day_store
from gateway.config import LimitsConfig
from gateway.day_store import FILE, DayStore
from gateway.policy.caller import Caller
from gateway.policy.limits import DAY, Limits, Reservation
from testkit.polling import until
from tests.unit.gateway.fakes import Clock

EPOCH = 1_800_000_000.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(day_store, "INTERVAL", 0.01)
    monkeypatch.setattr(day_store, "BUSY", 0.05)


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
    with closing(sqlite3.connect(folder / FILE)) as database:
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


async def test_a_locked_file_is_said_once_and_nothing_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gateway")
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
