"""`python -m gateway` as a real process: how it starts, what it writes, how it stops."""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from openai import AsyncOpenAI

from gateway import __main__ as gateway_main
from gateway import __version__
from gateway.__main__ import main
from mock_model import __main__ as mock_model_main
from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.exposition import Exposition
from testkit.http import ask
from testkit.polling import until
from testkit.ports import free_port
from testkit.processes import python
from tests.integration.processes import PATIENCE, run, running
from tests.integration.recorder import Recorder
from tests.integration.wire import dial, post

LOCAL = {"HOST": "127.0.0.1", "PORT": "0"}
SECRET = "a prompt nobody may read"
MESSAGES: Any = [{"role": "user", "content": SECRET}]
BODY = json.dumps({"model": "demo-model", "messages": MESSAGES}).encode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_gateway_and_mock_model_serve_and_stop_cleanly_by_either_signal(number: signal.Signals) -> None:
    ports = {"PORT": "0", "CONTROL_PORT": "0"}
    async with running("mock_model", **ports) as model:
        await model.up()
        async with running(**LOCAL, GATEWAY_BACKEND_URLS=model.url) as gateway:
            await gateway.up()
            async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as sdk:
                answer = await sdk.chat.completions.create(model="demo-model", messages=MESSAGES)
                assert answer.choices[0].message.content
                stream = await sdk.chat.completions.create(model="demo-model", messages=MESSAGES, stream=True)
                assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "stop"
                # The SDK still keeps its connection: an idle one holds nobody up.
                gateway.signal(number)
                code, _, errors = await gateway.end()
            assert code == 0, errors
            assert "Traceback" not in errors
        model.signal(number)
        assert (await model.end())[0] == 0


async def test_the_start_says_whether_keys_are_needed_wherever_they_are_configured(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    route = 'backends: {a: {url: "http://127.0.0.1:1"}}\nroutes: [{model: "*", targets: [{backend: a}]}]\n'
    for keys, environment, words in (
        ("", {}, "open to everybody"),
        ("", {"GATEWAY_API_KEYS": "k"}, "gateway keys are required"),
        ("keys: [{name: team, key_env: TEAM_KEY}]\n", {"TEAM_KEY": "t"}, "gateway keys are required"),
        ("keys: [{name: team, key_env: TEAM_KEY}]\n", {"TEAM_KEY": "t", "GATEWAY_API_KEYS": "k"}, "is not read"),
    ):
        file.write_text(route + keys)
        async with running(**LOCAL, GATEWAY_CONFIG=str(file), **environment) as gateway:
            await gateway.up()
            gateway.signal(signal.SIGTERM)
            _, output, errors = await gateway.end()
        assert words in output + errors


@pytest.mark.parametrize("program", [gateway_main, mock_model_main])
@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("-h", 0), ("--port", 2), ("chekc", 2), ("worker", 2)])
@pytest.mark.usefixtures("pytests_own")
def test_a_command_line_that_is_wrong_starts_nothing_and_says_what_it_may_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: ModuleType, argument: str, code: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", argument])
    assert program.command() == code
    output, errors = capsys.readouterr()
    assert "usage: " in (errors if code else output)
    assert (output if code else errors) == ""
    if code:
        assert repr(argument) in errors


def test_the_gateway_says_its_version_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert (main("--version"), capsys.readouterr().out) == (0, f"llm-gateway {__version__}\n")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {"GATEWAY_BACKEND_URLS": "http://127.0.0.1:1/v1/chat/completions"},
            "the url of backend-1 ends with /chat/completions",
        ),
        ({"GATEWAY_BACKEND_URLS": ""}, "GATEWAY_BACKEND_URLS is empty: prompts go to http://127.0.0.1:8001"),
    ],
)
async def test_urls_that_are_hardly_meant_are_told_at_the_start(environment: dict[str, str], words: str) -> None:
    async with running(**LOCAL, **environment) as gateway:
        await gateway.up()
        gateway.signal(signal.SIGTERM)
        _, _, errors = await gateway.end()
    assert errors.count(words) == 1, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("module", ["gateway", "mock_model"])
async def test_a_signal_during_the_imports_ends_the_process_without_a_traceback(
    tmp_path: Path, module: str, number: signal.Signals
) -> None:
    """The program imports uvloop, which is here a module that takes for ever."""
    (tmp_path / "uvloop.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(1000)\n")
    async with running(module, PYTHONPATH=str(tmp_path)) as program:
        await until(lambda: "importing" in program.output.read_text(), "it imports", seconds=PATIENCE)
        program.signal(signal.SIGHUP)
        program.signal(number)
        code, _, errors = await program.end()
    assert (code, errors) == (-number, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("variable", ["GATEWAY_CONFIG", "GATEWAY_API_KEYS_FILE"])
async def test_a_signal_before_it_listens_ends_the_process_without_a_traceback(
    tmp_path: Path, variable: str, number: signal.Signals
) -> None:
    """It waits for what comes out of a pipe, whose name it was given for a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ends: list[int] = []

    def is_read() -> bool:
        with suppress(OSError):  # nobody has it open
            ends.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(ends)

    async with running(**LOCAL, **{variable: str(pipe)}) as gateway:
        await until(is_read, "it reads", seconds=PATIENCE)
        ending = asyncio.create_task(gateway.end())
        while not ending.done():  # one that comes just before the read begins is seen after it
            with suppress(ProcessLookupError):
                gateway.signal(number)
            await asyncio.wait({ending}, timeout=0.5)
        code, _, errors = await ending
    os.close(ends[0])
    assert (code, errors) == (-number, "")


async def test_sighup_is_one_line_of_a_mock_model_and_no_end() -> None:
    async with running("mock_model", **LOCAL, CONTROL_PORT="0") as program:
        await program.up()
        program.signal(signal.SIGHUP)
        await until(lambda: "SIGHUP is ignored" in program.errors.read_text(), "it says so", seconds=PATIENCE)
        async with dial(program.url) as wire:
            await wire.send(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
            assert (await wire.answer()).status == 200
        program.signal(signal.SIGTERM)
        code, _, errors = await program.end()
    assert code == 0
    assert errors.count("SIGHUP") == 1


async def test_sighup_has_a_gateway_read_its_configuration_and_its_keys_anew(tmp_path: Path) -> None:
    file, keys = tmp_path / "gateway.yaml", tmp_path / "keys"

    def write(model: str) -> None:
        file.write_text(
            'backends: {a: {url: "http://127.0.0.1:1", probe: false}}\n'
            f"routes: [{{model: {model}, targets: [{{backend: a}}]}}]"
        )

    async def asked(key: str) -> tuple[int, bytes]:
        async with dial(gateway.url) as wire:
            await wire.send(b"GET /v1/models HTTP/1.1\r\nhost: a\r\nx-api-key: %s\r\n\r\n" % key.encode())
            answer = await wire.answer()
            return answer.status, answer.body

    write("first")
    keys.write_text("one")
    environment = {**LOCAL, "GATEWAY_CONFIG": str(file), "GATEWAY_API_KEYS_FILE": str(keys)}
    async with running(**environment) as gateway:
        await gateway.up()
        assert b"first" in (await asked("one"))[1]

        def says(words: str) -> Callable[[], bool]:
            return lambda: words in gateway.errors.read_text()

        for _ in range(2):
            gateway.signal(signal.SIGHUP)
        await until(says("generation 1 stays: nothing has changed"), seconds=PATIENCE)
        write("second")
        keys.write_text("two")
        gateway.signal(signal.SIGHUP)
        await until(says("generation 2 is in force: 1 backend replica(s), 1 gateway key(s)"), seconds=PATIENCE)

        async def both_are_new() -> bool:  # who reads between two writes has read one of them
            return (await asked("one"))[0] == 401 and b"second" in (await asked("two"))[1]

        await until(both_are_new, seconds=PATIENCE)
        file.write_text("routes: [")
        gateway.signal(signal.SIGHUP)
        await until(says("the new configuration is not in force"), seconds=PATIENCE)
        assert b"second" in (await asked("two"))[1]
        gateway.signal(signal.SIGTERM)
        code, _, errors = await gateway.end()
    assert code == 0
    assert "Traceback" not in errors


async def test_a_second_signal_ends_the_grace(mock: MockModel) -> None:
    mock.set_faults([{"kind": "hang_before_headers"}])
    environment = {**LOCAL, "GATEWAY_BACKEND_URLS": mock.url, "GATEWAY_SHUTDOWN_GRACE": "500"}
    async with running(**environment) as gateway:
        await gateway.up()
        async with dial(gateway.url) as wire, dial(gateway.url) as other:
            await wire.send(post())
            await mock.called(1)
            gateway.signal(signal.SIGTERM)
            draining = False
            while not draining:
                await other.send(b"GET /health HTTP/1.1\r\nhost: gateway\r\nconnection: keep-alive\r\n\r\n")
                answer = await other.answer()
                draining = json.loads(answer.body)["draining"]
            assert gateway.running
            gateway.signal(signal.SIGINT)
            answer = await wire.answer()
            assert (answer.status, answer.error["code"]) == (503, "gateway_draining")
            code, _, errors = await gateway.end()
    assert code == 0, errors
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]


def has_ipv6() -> bool:
    """Whether this machine has an address of IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as there:
            there.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
async def test_host_of_two_colons_listens_on_both_families() -> None:
    async with running(HOST="::", PORT="0", GATEWAY_PROBE_INTERVAL="60") as gateway:
        await gateway.up()
        assert gateway.url.startswith("http://[::]:")
        port = int(gateway.url.rpartition(":")[2])
        for address in ("127.0.0.1", "::1"):
            reader, writer = await asyncio.open_connection(address, port)
            writer.write(b"GET /livez HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            await writer.wait_closed()
        code, output, errors = await run(HOST="::", PORT=str(port))
        assert (code, output) == (1, "")
        check_line(errors, [f"cannot listen on :::{port}", "in use"])
        gateway.signal(signal.SIGTERM)
        assert (await gateway.end())[0] == 0


@pytest.fixture
def pytests_own() -> Iterator[None]:
    """`main` sets up logs and signals of its own; afterwards they are pytest's again."""
    root, ours = logging.getLogger(), logging.getLogger("gateway")
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    handlers, level, our_level = root.handlers[:], root.level, ours.level
    root.handlers = []  # or `basicConfig` would close them
    output, errors = sys.stdout, sys.stderr
    yield
    sys.stdout, sys.stderr = output, errors
    logging.captureWarnings(capture=False)
    for number, handler in signals.items():
        signal.signal(number, handler)
    root.handlers = handlers
    root.setLevel(level)
    ours.setLevel(our_level)


async def test_what_stops_a_start_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text('backends:\n  one: {url: "http://127.0.0.1:1"}\nroutes:\n  - {model: m, target: one}\n')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            ({"PORT": "eight"}, 2, ["PORT='eight'", "a whole number"]),
            ({"GATEWAY_CONFIG": str(file)}, 2, [f"GATEWAY_CONFIG='{file}'", "line 4", "routes[0]: target", "targets"]),
            ({"PORT": port}, 1, [f"cannot listen on 127.0.0.1:{port}: Address already in use; HOST and PORT name"]),
        ]
        ends = await asyncio.gather(*(run(**{**LOCAL, **environment}) for environment, _, _ in cases))
    for (environment, code, words), (ended, output, errors) in zip(cases, ends, strict=True):
        assert ended == code, (environment, errors)
        assert output == ""
        check_line(errors, words)


def check_line(errors: str, words: list[str]) -> None:
    """One line, with all of these words."""
    assert errors.startswith("gateway: ")
    assert errors.count("\n") == 1, errors
    for word in words:
        assert word in errors


@pytest.mark.parametrize(
    ("name", "value", "code", "words"),
    [
        ("APP_MODE", "test", 2, ["dev or prod"]),
        ("GATEWAY_IDLE_TIMEOUT", "-1", 2, ["greater than 0"]),
        ("GATEWAY_BACKEND_URLS", "ftp://backend", 2, ["http:// or https://"]),
        ("GATEWAY_API_KEYS_FILE", "/nowhere/keys", 2, ["readable text file"]),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", 2, ["http/protobuf or grpc"]),
        ("GATEWAY_CONFIG", "/nowhere/gateway.yaml", 2, ["No such file", "readable YAML file"]),
        ("HOST", "no.such.host.invalid", 1, ["cannot listen on"]),
    ],
)
@pytest.mark.usefixtures("pytests_own")
def test_the_line_names_the_variable_its_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    name: str,
    value: str,
    code: int,
    words: list[str],
) -> None:
    monkeypatch.setenv("PORT", "0")
    monkeypatch.setenv(name, value)
    assert main() == code
    output, errors = capsys.readouterr()
    assert output == ""
    check_line(errors, [*words, value, *([name] if code == 2 else [])])


async def test_in_prod_all_that_is_written_is_json_with_ids_and_no_secret(recorder: Recorder, tmp_path: Path) -> None:
    recorder.pieces = [b'{"choices": [{"message": {"content": "an answer nobody may read"}}]}']
    keys, backend_key = tmp_path / "keys", tmp_path / "backend-key"
    keys.write_text("gw-key-1\ngw-key-2\n")
    backend_key.write_text("backend-key\n")
    environment = {
        **LOCAL,
        "APP_MODE": "prod",
        "LOG_LEVEL": "debug",
        "GATEWAY_API_KEYS_FILE": str(keys),
        "GATEWAY_BACKEND_API_KEY_FILE": str(backend_key),
        "GATEWAY_BACKEND_URLS": recorder.url.replace("//", "//me:pass-word@"),
    }
    answers = []
    async with running(**environment) as gateway:
        await gateway.up()
        async with dial(gateway.url) as wire:
            for key, body in (("gw-key-2", BODY), ("wrong-key", BODY), ("gw-key-1", b"[" + BODY), ("gw-key-1", BODY)):
                await wire.send(post(body, {"authorization": f"Bearer {key}"}))
                answers.append(await wire.answer())
            recorder.status = 500
            await wire.send(post(BODY, {"authorization": "Bearer gw-key-1", "x-request-id": "mine"}))
            answers.append(await wire.answer())
            await wire.send(f"{SECRET}\r\n\r\n".encode())
            answers.append(await wire.answer())
        gateway.signal(signal.SIGTERM)
        code, output, errors = await gateway.end()

    assert code == 0, errors
    assert [answer.status for answer in answers] == [200, 401, 400, 200, 500, 400]
    assert {seen.header("authorization") for seen in recorder.seen} == {"Bearer backend-key"}
    lines = [json.loads(line) for line in (output + errors).splitlines()]
    assert all({"time", "level", "message"} <= set(line) for line in lines)
    requests = [line for line in lines if line["message"] == "request"]
    assert [line["status"] for line in requests] == [200, 401, 400, 200, 500, 400]
    for line, answer in zip(requests, answers, strict=True):
        assert line["trace_id"] == answer.headers["x-trace-id"]
        assert line["request_id"] == answer.headers["x-request-id"]
    assert requests[4]["request_id"] == "mine"
    for word in (SECRET, "nobody may read", "gw-key", "wrong-key", "backend-key", "pass-word"):
        assert word not in output + errors


async def test_in_dev_each_request_is_a_readable_line_and_a_tree(mock: MockModel) -> None:
    mock.set_faults([{"kind": "status", "with": {"status": 500}, "times": 1}])
    async with running(**LOCAL, GATEWAY_BACKEND_URLS=mock.url, GATEWAY_BACKOFF_INITIAL="0.01") as gateway:
        await gateway.up()
        async with dial(gateway.url) as wire:
            await wire.send(post(BODY, {"x-request-id": "mine"}))
            answer = await wire.answer()
        gateway.signal(signal.SIGINT)
        code, output, errors = await gateway.end()
    assert code == 0, errors
    trace = answer.headers["x-trace-id"]
    tree = output[output.index(f"trace {trace}\n") :].splitlines()
    assert re.fullmatch(r"  \|#{30}\| +[0-9.]+ ms  POST /v1/chat/completions: 200 ok", tree[1])
    assert re.search(r"\|[ #]{30}\| +[0-9.]+ ms +attempt 1 at backend-1: status_500 -> retry", tree[2])
    assert re.search(r"\|[ #]{30}\| +[0-9.]+ ms +attempt 2 at backend-1: ok -> answered", tree[3])
    (line,) = [line for line in output.splitlines() if f"trace={trace}" in line]
    assert "200 POST /v1/chat/completions" in line
    assert "request=mine" in line
    assert SECRET not in output + errors


async def test_with_an_endpoint_spans_go_there_and_no_tree_is_printed(mock: MockModel, recorder: Recorder) -> None:
    recorder.headers = [("content-type", "application/x-protobuf")]
    recorder.pieces = [b""]
    environment = {**LOCAL, "GATEWAY_BACKEND_URLS": mock.url, "OTEL_EXPORTER_OTLP_ENDPOINT": recorder.url}
    async with running(**environment) as gateway:
        await gateway.up()
        async with dial(gateway.url) as wire:
            await wire.send(post(BODY))
            answer = await wire.answer()
        await until(lambda: len(recorder.seen) > 0)
        gateway.signal(signal.SIGTERM)
        code, output, errors = await gateway.end()
    assert code == 0, errors
    assert {"/v1/traces"} <= {seen.path for seen in recorder.seen} <= {"/v1/traces", "/v1/metrics"}
    sent = b"".join(seen.body for seen in recorder.seen)
    assert bytes.fromhex(answer.headers["x-trace-id"]) in sent
    assert SECRET.encode() not in sent
    assert f"trace {answer.headers['x-trace-id']}\n" not in output


class Unread:
    """A pipe that is full, and that nobody reads: a terminal after Ctrl-S, a log driver that hangs."""

    def __init__(self) -> None:
        self._reading, self.writing = os.pipe()

    def __enter__(self) -> int:
        os.set_blocking(self.writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(self.writing, b"." * 4096)
        os.set_blocking(self.writing, True)
        return self.writing

    def __exit__(self, *_: object) -> None:
        os.close(self._reading)
        os.close(self.writing)


@asynccontextmanager
async def writing_to(
    output: int, errors: int, *command: str, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a command with these outputs; it is killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=output, stderr=errors, env={**os.environ, **environment}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def status_of(url: str, **options: Any) -> int:  # noqa: ANN401 - as of `ask`
    """The status of an answer; 0 while nobody listens."""
    try:
        return (await ask(url, **options)).status
    except OSError:
        return 0


@pytest.mark.parametrize("mode", ["dev", "prod"])
async def test_logs_that_nobody_reads_stop_neither_a_request_nor_the_end(mock: MockModel, mode: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {**LOCAL, "PORT": str(port), "GATEWAY_BACKEND_URLS": mock.url, "APP_MODE": mode}
    mock.set_faults([{"kind": "status", "with": {"status": 500}, "times": 12}])
    with Unread() as output, Unread() as errors:
        async with writing_to(output, errors, *python("gateway"), **environment, GATEWAY_NO_SUCH="warns") as gateway:
            await until(lambda: status_of(f"{url}/readyz"), seconds=50)
            statuses = [
                await status_of(f"{url}/v1/chat/completions", method="POST", body=CHAT | {"user": str(number)})
                for number in range(20)  # breakers and cooldowns write to stderr
            ]
            assert set(statuses) <= {200, 500, 503}
            gateway.send_signal(signal.SIGTERM)
            async with asyncio.timeout(50):
                assert await gateway.wait() == 0


async def test_a_start_that_fails_ends_though_nobody_reads_why() -> None:
    with Unread() as errors:
        async with writing_to(errors, errors, *python("gateway"), PORT="a") as gateway, asyncio.timeout(50):
            assert await gateway.wait() == 2


async def test_a_mock_model_whose_log_nobody_reads_answers_and_ends() -> None:
    port = free_port()
    environment = {"PORT": str(port), "CONTROL_PORT": "0", "LOG_LEVEL": "DEBUG"}
    with Unread() as errors:
        async with writing_to(errors, errors, *python("mock_model"), **environment) as model:
            await until(lambda: status_of(f"http://127.0.0.1:{port}/health"), seconds=50)
            model.send_signal(signal.SIGTERM)
            async with asyncio.timeout(50):
                assert await model.wait() == 0
        async with writing_to(errors, errors, *python("mock_model"), PORT="a") as model, asyncio.timeout(50):
            assert await model.wait() == 2


@pytest.mark.parametrize("how", ["closed", "full disk", "broken pipe"])
async def test_a_terminal_that_takes_nothing_is_told_in_one_line(mock: MockModel, tmp_path: Path, how: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {**LOCAL, "PORT": str(port), "GATEWAY_BACKEND_URLS": mock.url, "APP_MODE": "dev"}
    command = python("gateway")
    if how == "closed":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    reading, broken = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    with (tmp_path / "errors").open("w") as errors:
        output = broken if how == "broken pipe" else full
        async with writing_to(output, errors.fileno(), *command, **environment) as gateway:
            await until(lambda: status_of(f"{url}/readyz"), seconds=50)
            for _ in range(3):
                assert await status_of(f"{url}/v1/chat/completions", method="POST", body=CHAT) == 200
                await asyncio.sleep(0.3)  # so that each has a line and a tree of its own

            async def lost(stream: str = "stdout") -> float:
                found = Exposition.parse((await ask(f"{url}/metrics")).body.decode())
                return found.value("gateway_log_lines_dropped_total", stream=stream)

            if how == "closed":
                assert await lost() == 0
            else:
                await until(lost, "lines are lost")
            assert await lost("stderr") == 0
            gateway.send_signal(signal.SIGTERM)
            async with asyncio.timeout(50):
                assert await gateway.wait() == 0
    os.close(broken)
    os.close(full)

    told = (tmp_path / "errors").read_text()
    assert told.count("stdout takes no lines") == (0 if how == "closed" else 1)
    assert "Traceback" not in told
