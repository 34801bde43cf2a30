"""One line per request and one per change of a breaker; no texts, no keys, and no flood when everything is down."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from gateway.record import Record
from gateway.telemetry.logs import OWN_PER_SECOND, JsonFormatter, RateLimit, RequestLog, setup_logs
from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.polling import until
from tests.integration.gateways import Gateway, StartGateway, patient

LONG = 3600.0
SECRET = "a secret nobody may read"
KEY = "sk-gateway-key"
BACKEND_KEY = "sk-backend-key"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def start_gateway(start_gateway: StartGateway) -> StartGateway:
    return patient(start_gateway)


async def lines(gateway: Gateway, count: int) -> list[dict[str, Any]]:
    """The request lines, once there are so many."""
    await until(lambda: gateway.log.getvalue().count("\n") >= count, gateway.log.getvalue)
    return [json.loads(line) for line in gateway.log.getvalue().splitlines()]


async def test_a_request_is_one_line_that_tells_all(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_backoff_initial=0.01)
    mock.set_faults([{"kind": "status", "with": {"status": 500}, "times": 1}])
    answer = await gateway.chat(headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"})
    (line,) = await lines(gateway, 1)
    await until(lambda: len(gateway.spans()) >= 3)
    server = next(
        span
        for span in gateway.spans()
        if span.name.startswith("POST") and "gen_ai.provider.name" in (span.attributes or {})
    )

    seconds = line.pop("seconds")
    (first, second) = line["attempts"]
    assert 0 <= first.pop("seconds") + second["backoff_seconds"] + second.pop("seconds") <= seconds + 1e-5
    assert second.pop("backoff_seconds") >= 0
    assert line.pop("time").endswith("Z")
    usage = json.loads(answer.body)["usage"]
    assert server.context is not None
    assert line == {
        "level": "info",
        "message": "request",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "outcome": "ok",
        "queued_seconds": 0.0,
        "stream": False,
        "route": "*",
        "model": "demo-model",
        "backend": "backend-1",
        "attempts": [
            {
                "backend": "backend-1",
                "outcome": "status_500",
                "backoff_seconds": 0.0,
                "decision": "retry",
                "request_id": "mine",
            },
            {"backend": "backend-1", "outcome": "ok", "decision": "answered", "request_id": "mine"},
        ],
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "config_generation": 1,
        "request_id": "mine",
        "trace_id": TRACE,
        "span_id": f"{server.context.span_id:016x}",
    }


async def test_every_end_of_a_request_is_one_line(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_attempts=1, gateway_breaker_failures=100)
    close = {"connection": "close"}
    await gateway.chat(headers=close)
    await gateway.chat(headers=close, stream=True)
    mock.set_faults([{"kind": "cut", "with": {"after_events": 4}}])
    await gateway.chat(headers=close, stream=True)
    mock.set_faults([{"kind": "status", "with": {"status": 503}}])
    await gateway.chat(headers=close)
    await gateway.chat(headers=close, messages=1)
    await gateway.chat(headers=close, path="/nothing")
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.client.port)
    writer.write(b"this is no HTTP\r\n\r\n")
    await reader.read()
    writer.close()
    mock.set_faults([{"kind": "hang_before_headers"}])
    async with aiohttp.ClientSession() as session:
        posting = asyncio.create_task(session.post(f"{gateway.url}/v1/chat/completions", json=CHAT))
        await mock.called(5)
        posting.cancel()
        await asyncio.gather(posting, return_exceptions=True)
    for path in ("/health", "/livez", "/readyz", "/metrics"):
        async with gateway.client.get(path) as response:
            assert response.status == 200
    found = await lines(gateway, 8)

    assert [(line["status"], line["outcome"], line["level"], len(line["attempts"])) for line in found] == [
        (200, "ok", "info", 1),
        (200, "ok", "info", 1),
        (200, "backend_invalid_response", "warning", 1),
        (503, "backend_error", "warning", 1),
        (400, "invalid_request", "info", 0),
        (404, "not_found", "info", 0),
        (400, "invalid_request", "info", 0),
        (499, "client_closed_request", "info", 1),
    ]
    assert found[2]["stop_reason"] == "committed"
    assert found[2]["error"]
    assert found[3]["attempts"][0]["decision"] == "gave up: attempts"
    assert found[7]["attempts"][0]["outcome"] == "cancelled"
    assert len({line["trace_id"] for line in found}) == len({line["request_id"] for line in found}) == 8


async def test_no_key_and_no_text_is_logged(
    mock: MockModel, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    gateway = await start_gateway(
        mock,
        gateway_api_keys=[KEY],
        gateway_backend_api_key=BACKEND_KEY,
        gateway_max_attempts=1,
        gateway_capture_content=True,
    )
    prompt = {"messages": [{"role": "user", "content": SECRET}], "headers": {"authorization": f"Bearer {KEY}"}}
    answer = await gateway.chat(**prompt)
    mock.set_faults(
        [{"kind": "status", "with": {"status": 401, "body": {"error": {"message": f"{SECRET} {BACKEND_KEY}"}}}}]
    )
    await gateway.chat(**prompt)
    await gateway.chat(**{**prompt, "headers": {"authorization": f"Bearer {KEY}x"}})
    await gateway.chat(**{**prompt, "messages": SECRET})
    await lines(gateway, 4)

    text = json.loads(answer.body)["choices"][0]["message"]["content"]
    logged = gateway.log.getvalue() + "\n".join(
        record.getMessage() for record in caplog.records if record.name != "asyncio"
    )
    for secret in (SECRET, KEY, BACKEND_KEY, text):
        assert secret not in logged


async def test_a_long_name_of_a_model_is_cut(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    await gateway.chat(model="m" * 512)
    (line,) = await lines(gateway, 1)

    assert line["model"] == "m" * 128


async def test_a_change_of_a_breaker_is_one_line(
    mock: MockModel, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gateway")
    gateway = await start_gateway(
        mock, gateway_breaker_failures=2, gateway_breaker_open_seconds=0.2, gateway_max_attempts=1
    )
    mock.set_faults([{"kind": "status", "with": {"status": 500}, "times": 2}])
    for number in range(2):
        await gateway.chat(user=str(number))
    (replica,) = gateway.parts.pool.replicas
    await until(lambda: replica.breaker.state == "half_open")
    await gateway.chat()

    changes = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "gateway"]
    assert changes == [
        ("WARNING", "breaker of backend-1: closed -> open"),
        ("WARNING", "breaker of backend-1: open -> half_open"),
        ("INFO", "breaker of backend-1: half_open -> closed"),
    ]


async def test_a_total_outage_logs_requests_and_nothing_else_of_each(
    start_gateway: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await start_gateway(
        "http://127.0.0.1:1", gateway_breaker_open_seconds=LONG, gateway_breaker_open_max=LONG
    )
    answers = [await gateway.chat() for _ in range(50)]
    found = await lines(gateway, 50)

    assert {answer.status for answer in answers} <= {502, 503}
    assert [line["request_id"] for line in found] == [answer.headers["x-request-id"] for answer in answers]
    others = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    probed = "probe of backend-1: failed: backend-1 refused the connection."
    assert [line for line in others if line != probed] == ["breaker of backend-1: closed -> open"]
    assert others.count(probed) <= 1


async def test_a_backend_that_fails_its_probes_is_told_once_and_when_it_is_back(
    mock: MockModel, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gateway")
    mock.set_faults([{"kind": "status", "with": {"status": 500}, "match": {"path": "/health"}, "times": 4}])
    await start_gateway(mock, gateway_probe_interval=0.02)
    await until(lambda: "probe of backend-1: good" in caplog.text)

    told = [record.getMessage() for record in caplog.records if record.name == "gateway"]
    assert told == ["probe of backend-1: failed: backend-1 answered 500.", "probe of backend-1: good"]


# The forms, and the limits.


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The logger that `setup_logs` changes, as it was afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("gateway")
    handlers, level, own_level = root.handlers[:], root.level, ours.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(own_level)
    logging.captureWarnings(capture=False)


def a_line(name: str, second: int, message: str = "line") -> logging.LogRecord:
    record = logging.LogRecord(name, logging.WARNING, __file__, 1, message, None, None)
    record.created = float(second)
    return record


@pytest.mark.parametrize(
    ("name", "allowed"), [("gateway", OWN_PER_SECOND), ("opentelemetry.exporter", 1), ("urllib3", 1)]
)
def test_a_logger_gets_a_few_lines_a_second_and_tells_what_it_left_out(name: str, allowed: int) -> None:
    limit = RateLimit()
    passed = [limit.filter(a_line(name, 7)) for _ in range(100)]
    later = a_line(name, 8)

    assert passed.count(True) == allowed <= 20
    assert passed[:allowed] == [True] * allowed
    assert limit.filter(later)
    assert later.getMessage() == f"line ({100 - allowed} lines left out before)"


def test_each_logger_has_its_own_limit() -> None:
    limit = RateLimit()
    for _ in range(100):
        limit.filter(a_line("urllib3", 7))

    assert limit.filter(a_line("gateway", 7))
    assert limit.filter(a_line("opentelemetry.exporter", 7))


def test_libraries_speak_from_warnings_on_and_in_json(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logs("INFO", as_json=True)
    logging.getLogger("urllib3").info("chatter")
    logging.getLogger("urllib3").warning('a "quoted" line\nof two')
    logging.getLogger("gateway").info("ours")
    logging.getLogger("gateway").debug("details")
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    assert [(line["logger"], line["level"], line["message"]) for line in found] == [
        ("urllib3", "warning", 'a "quoted" line\nof two'),
        ("gateway", "info", "ours"),
    ]


def test_an_exception_is_one_line() -> None:
    error = ValueError("broken")
    record = logging.LogRecord("gateway", logging.ERROR, __file__, 1, "failed", None, (ValueError, error, None))
    line = JsonFormatter().format(record)

    assert "\n" not in line
    assert "ValueError: broken" in json.loads(line)["exception"]


@pytest.fixture
def a_finished_record() -> Record:
    record = Record(
        "POST", "/v1/chat/completions", trace_id=1, span_id=2, request_id="req-1", started=5.0, started_ns=0
    )
    record.ended, record.status = 5.25, 200
    return record


async def test_a_record_that_cannot_be_written_costs_its_line_and_not_the_answer(
    mock: MockModel, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start_gateway(mock)
    log = gateway.parts.telemetry._log
    with monkeypatch.context() as patch:
        patch.setattr(log, "_form", refuse)
        spoiled = await gateway.chat()
    good = await gateway.chat()
    (line,) = await lines(gateway, 1)

    assert (spoiled.status, good.status) == (200, 200)
    assert line["request_id"] == good.headers["x-request-id"]
    assert [entry.getMessage() for entry in caplog.records if "telemetry failed" in entry.getMessage()] == [
        f"telemetry failed for trace {spoiled.headers['x-trace-id']}"
    ]


def refuse(_record: Record) -> str:
    raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")


@pytest.mark.parametrize(("level", "count"), [("INFO", 1), ("DEBUG", 1), ("WARNING", 0)])
def test_request_lines_are_of_level_info(a_finished_record: Record, level: str, count: int) -> None:
    stream = io.StringIO()
    RequestLog(level=level, as_json=True, stream=stream).write(a_finished_record)

    assert stream.getvalue().count("\n") == count


def test_people_get_a_readable_line(a_finished_record: Record) -> None:
    stream = io.StringIO()
    RequestLog(level="INFO", as_json=False, stream=stream).write(a_finished_record)

    assert " 200 POST /v1/chat/completions 250.0 ms ok request=req-1 trace=" in stream.getvalue()
