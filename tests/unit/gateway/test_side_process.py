"""What is very large is read in a process of its own, and nothing of that can be seen from outside."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

import msgspec
import pytest

from gateway import side_process as module
from gateway.dialects.answer_fields import describe, raise_error_inside
from gateway.dialects.dialect import Prompt
from gateway.dialects.json_text import NO_JSON, check
from gateway.dialects.openai.chat import CHAT, OpenAIChat
from gateway.dialects.openai.choices import ChoicesState
from gateway.errors import ErrorInside, ErrorWords, GatewayError, GatewayOverloaded, InvalidRequest
from gateway.executor import Executor
from gateway.side_process import LONG, SideProcess, SideProcessDiedError, _receive, _send, _serve
from testkit.polling import until
from testkit.process_table import lives, state_of

CHATS = OpenAIChat()
LONG_TEXT = b"a" * (2 * LONG)
BODY = b'{"model":"m","messages":[{"role":"user","content":"%b"}],"n":2,"stream":true}' % LONG_TEXT


@pytest.fixture
def worker() -> Iterator[SideProcess]:
    worker = SideProcess()
    yield worker
    worker.end()


def kinds(parent: type[GatewayError]) -> list[type[GatewayError]]:
    return [parent, *(kind for child in parent.__subclasses__() for kind in kinds(child))]


def where() -> tuple[int, bytes]:
    return os.getpid(), LONG_TEXT


def raise_again(error: Exception) -> None:
    raise error


def length_and_itself(text: bytes) -> tuple[int, list[bytes]]:
    return len(text), [text, text]


def kind_and_length(text: bytes | memoryview) -> tuple[str, int]:
    return type(text).__name__, len(text)


class Held:
    """Something of a work, that is seen until it is let go."""

    seen: ClassVar[WeakSet["Held"]] = WeakSet()

    def __init__(self) -> None:
        self.seen.add(self)

    def __reduce__(self) -> tuple[type["Held"], tuple[()]]:
        return Held, ()


def refuse(argument: Held) -> None:
    """Raise an error that comes from two others, each with frames that hold something."""
    try:
        try:
            raise_holding(KeyError("first"))
        except KeyError as first:
            second = ValueError("second")
            second.__cause__ = first
            raise_holding(second)
    except ValueError:
        raise InvalidRequest(f"third, {type(argument).__name__}") from None


def raise_holding(error: Exception) -> None:
    held = Held()
    if held in Held.seen:
        raise error


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_work_is_done_in_one_process_that_is_not_ours(worker: SideProcess) -> None:
    (first, text), (second, _) = worker.call(where), worker.call(where)

    assert first == second == worker.pid
    assert first != os.getpid()
    assert text == LONG_TEXT


def test_a_long_text_does_not_come_back(worker: SideProcess) -> None:
    length, texts = worker.call(length_and_itself, LONG_TEXT)

    assert length == len(LONG_TEXT)
    assert all(text is LONG_TEXT for text in texts)


def test_a_prompt_is_as_it_was_read_here(worker: SideProcess) -> None:
    here, there = CHATS.read_request(CHAT, BODY), worker.call(CHATS.read_request, CHAT, BODY)

    assert there.body is BODY
    assert isinstance(there.dialect, OpenAIChat)
    for field in set(Prompt.__struct_fields__) - {"dialect"}:
        assert getattr(here, field) == getattr(there, field), field


def test_every_error_comes_out_as_it_was_raised(worker: SideProcess) -> None:
    for number, kind in enumerate(kinds(GatewayError)):
        error = kind.__new__(kind, "what happened")
        error.__dict__.update(message="what happened", param=f"p{number}", retry_after=1.5, outcome="word")

        with pytest.raises(kind) as raised:
            worker.call(raise_again, error)

        assert type(raised.value) is kind
        assert raised.value.__dict__.items() >= error.__dict__.items()
        assert str(raised.value) == "what happened"


def test_errors_of_requests_and_answers_come_out_whole(worker: SideProcess) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        worker.call(CHATS.read_request, CHAT, BODY.replace(b'"n":2', b'"n":0'))
    assert wrong.value.param == "n"
    assert "read_request" in "".join(wrong.value.__notes__)  # where it was raised

    with pytest.raises(ErrorInside) as inside:
        worker.call(raise_error_inside, b'{"error":{"message":"no","code":429},"x":"%b"}' % LONG_TEXT)
    assert inside.value.words == ErrorWords({"message": "no", "code": 429}, "no", frozenset(), 429)

    for text in (b"[" + LONG_TEXT, b'"\xff' + LONG_TEXT + b'"', b"[" * LONG + b"]" * LONG):
        with pytest.raises(NO_JSON) as here:
            check(text)
        with pytest.raises(type(here.value)) as there:
            worker.call(check, text)
        assert str(there.value) == str(here.value)


def test_nothing_of_a_work_that_fails_is_held_where_it_was_done() -> None:
    for _ in range(3):
        requests, answers = BytesIO(), BytesIO()
        _send(requests, (refuse, (Held(),), {}), [])
        requests.seek(0)
        with without_collector():
            _serve(requests, answers)
            assert not Held.seen
        answers.seek(0)
        _, error = _receive(answers, [])
        assert isinstance(error, InvalidRequest)
        assert "in refuse" in "".join(error.__notes__)


def test_nothing_of_a_work_that_fails_is_held_where_it_was_asked_for(worker: SideProcess) -> None:
    with without_collector():
        with suppress(InvalidRequest):
            worker.call(refuse, Held())
        assert not Held.seen


def test_what_comes_back_is_small_however_large_the_text(worker: SideProcess) -> None:
    answer = b'{"id":"%b","model":"m","choices":[%b]}' % (LONG_TEXT, b",".join([b'{"finish_reason":"stop"}'] * 9000))
    described = worker.call(describe, CHATS, "application/json", answer)
    event = b'{"model":"m","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":"stop"}]}' % LONG_TEXT
    state = ChoicesState(1)
    state.feed(worker.call(ChoicesState.abridged, event))

    assert len(msgspec.json.encode(described)) < 1000
    assert described.model == "m"
    assert (state.model, state.content, state.finished) == ("m", True, True)
    assert len(ChoicesState.abridged(event)) <= LONG + 1000


def test_a_part_of_a_text_arrives_as_bytes(worker: SideProcess) -> None:
    part = memoryview(LONG_TEXT)[1:-1]

    assert worker.call(kind_and_length, part) == ("bytes", len(part))
    assert worker.call(kind_and_length, part[:10]) == ("bytes", 10)


def test_a_death_costs_one_call_and_the_next_one_gets_another_process(worker: SideProcess) -> None:
    first = worker.call(where)[0]
    with pytest.raises(SideProcessDiedError):
        worker.call(die)
    second = worker.call(where)[0]
    os.kill(second, signal.SIGKILL)
    os.waitid(os.P_PID, second, os.WEXITED | os.WNOWAIT)  # between two calls nobody notices

    assert len({first, second, worker.call(where)[0]}) == 3


def test_where_no_process_can_be_started_work_is_done_here(
    monkeypatch: pytest.MonkeyPatch, worker: SideProcess
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")

    assert worker.call(where)[0] == os.getpid()


def test_the_process_ends_when_the_one_that_asks_is_gone(worker: SideProcess) -> None:
    worker.call(where)
    process = worker._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()

    assert process.wait(20) == 0


ASK = f"import sys; sys.path[:] = {sys.path!r}; from gateway.side_process import SideProcess; worker = SideProcess(); "


@pytest.mark.parametrize("options", [[], ["-I"], ["-E"], ["-s"], ["-S"], ["-P"], ["-B"], ["-O"], ["-OO"], ["-E", "-O"]])
def test_the_process_runs_no_code_that_ours_does_not(options: list[str], tmp_path: Path) -> None:
    loaded, flags = tmp_path / "loaded", "tuple(__import__('sys').flags)"
    (tmp_path / "sitecustomize.py").write_text(f"import os; open({str(loaded)!r}, 'a').write(f'{{os.getpid()}} ')")
    ask = f"{ASK}print(worker.call(eval, {flags!r}) == {flags})"
    environment = {"PYTHONPATH": str(tmp_path), "LC_ALL": "C.UTF-8"}
    command = [sys.executable, *options, "-c", ask]
    there = subprocess.run(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, check=True)  # noqa: S603

    assert there.stdout == b"True\n"
    processes = len(loaded.read_text().split()) if loaded.exists() else 0
    assert processes == (0 if {"-I", "-E", "-S"} & set(options) else 2)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone kills it")
async def test_even_a_process_that_is_stopped_ends_when_the_one_that_asks_is_killed() -> None:
    stop = "worker.call(abs, 1); os.kill(worker.pid, signal.SIGSTOP); print(worker.pid, flush=True); signal.pause()"
    asking = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"import os, signal; {ASK}{stop}", stdout=subprocess.PIPE
    )
    assert asking.stdout is not None
    process = int(await asking.stdout.readline())
    await until(lambda: state_of(process) in "tT")
    asking.kill()
    await asking.wait()

    await until(lambda: not lives(process))


def test_signals_to_the_whole_group_do_not_end_it(worker: SideProcess) -> None:
    process = worker.call(where)[0]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process, number)

    assert worker.call(where)[0] == process


async def test_only_what_is_very_large_goes_to_the_process() -> None:
    executor = Executor(at_once=10, in_thread=100)
    thread = threading.get_ident()
    try:
        assert await executor.read(10, threading.get_ident) == thread
        assert await executor.read(100, threading.get_ident) != thread
        assert (await executor.read(100, where))[0] == os.getpid()
        assert (await executor.read(101, where))[0] != os.getpid()
        assert (await executor.run(101, where))[0] == os.getpid()
    finally:
        executor.close()


async def test_a_death_is_an_error_that_says_to_try_again() -> None:
    executor = Executor(at_once=0, in_thread=0)
    try:
        with pytest.raises(GatewayOverloaded) as overloaded:
            await executor.read(1, die)
        assert overloaded.value.reason == "memory"
        assert (await executor.read(1, where))[0] != os.getpid()
    finally:
        executor.close()


async def test_an_idle_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.executor.IDLE", 0.0)
    executor = Executor(at_once=0, in_thread=0)
    try:
        first = (await executor.read(1, where))[0]
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # the timer is due
        second = (await executor.read(1, where))[0]
    finally:
        executor.close()

    assert first != second
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


async def test_what_is_merely_large_does_not_wait_for_what_is_very_large() -> None:
    executor = Executor(at_once=1, in_thread=10)
    stuck = threading.Event()
    executor._side_process.call = lambda *_: stuck.wait()  # type: ignore[assignment, method-assign]
    try:
        very_large = asyncio.create_task(executor.read(11, where))
        await asyncio.sleep(0)
        assert await executor.run(5, where) == where()
        assert await executor.read(5, where) == where()
        assert not very_large.done()
    finally:
        stuck.set()
        await very_large
        executor.close()


def test_a_process_that_is_stuck_is_killed(worker: SideProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.call(where)
    assert worker.pid is not None
    monkeypatch.setattr(module, "LONGEST", 0.5)
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(SideProcessDiedError):
        worker.call(where)
    monkeypatch.undo()
    assert worker.call(where)[1] == LONG_TEXT
