"""Named keys: what each may use, what it has used, and that it shows everywhere by its name only."""

import asyncio
import json
import logging
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from random import Random, randrange
from time import monotonic
from typing import Any

import aiohttp
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from prometheus_client.parser import text_string_to_metric_families

from gateway.policy.limits import Limits
from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH
from testkit.http import Answer
from testkit.polling import until
from tests.integration.backends_raw import RawCall, StartRaw, chunk
from tests.integration.gateways import Gateway, StartGateway, config, get, patient
from tests.integration.recorder import Recorder

EPOCH = 1_800_000_000.0
SECRETS = {"team-a": "gw-secret-of-a", "team-b": "gw-secret-of-b"}
HANG = {"kind": "hang_before_headers"}


class Moved:
    """The clock of limits: it goes on by itself, and jumps when told to."""

    def __init__(self, limits: list[Limits]) -> None:
        self._limits = limits
        for each in limits:
            each.epoch = EPOCH - monotonic()

    def forward(self, seconds: float) -> None:
        for each in self._limits:
            each.epoch += seconds


Start = Callable[..., Any]


@pytest.fixture
def start(start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start a gateway before one backend whose keys have what is said of them: `start(mock, a="limits: {...}")`."""

    async def start_with_keys(backend: str | MockModel, *, a: str = "", b: str = "", **settings: Any) -> Gateway:  # noqa: ANN401
        url = backend if isinstance(backend, str) else backend.url
        monkeypatch.setenv("TEAM_A_KEY", SECRETS["team-a"])
        digest = sha256(SECRETS["team-b"].encode()).hexdigest()
        text = f"""
backends: {{backend: {{url: "{url}"}}}}
routes:
  - {{model: demo-model, targets: [{{backend: backend}}]}}
  - {{model: qwen-3, targets: [{{backend: backend}}]}}
  - {{model: "*", targets: [{{backend: backend}}]}}
keys:
  - {{name: team-a, key_env: TEAM_A_KEY{", " + a if a else ""}}}
  - {{name: team-b, key_sha256: "{digest}"{", " + b if b else ""}}}
"""
        return await patient(start_gateway)(gateway_config=config(tmp_path, text), **settings)

    return start_with_keys


def key(name: str = "team-a") -> dict[str, str]:
    return {"authorization": f"Bearer {SECRETS[name]}"}


async def ask(gateway: Gateway, name: str = "team-a", **changes: Any) -> Answer:  # noqa: ANN401
    return await gateway.chat(headers={**key(name), **changes.pop("headers", {})}, **changes)


def moved(gateway: Gateway) -> Moved:
    """Give the limits a clock that can be moved: nobody waits for a minute. A look inside."""
    return Moved([caller.limits for caller in gateway.parts.keys.callers if caller.limits is not None])


def used(gateway: Gateway, limit: str, name: str = "team-a") -> int:
    """What is used of a limit now, as the gateway has it."""
    (limits,) = (each.limits for each in gateway.parts.keys.callers if each.name == name and each.limits is not None)
    return next(now for known, _, now in limits.state() if known == limit)


async def samples(gateway: Gateway, metric: str) -> dict[tuple[str, ...], float]:
    """The values of a metric, by those of its labels."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(await gateway.metrics())
        for sample in family.samples
        if sample.name == metric
    }


async def lines(gateway: Gateway, count: int) -> list[dict[str, Any]]:
    await until(lambda: gateway.log.getvalue().count("\n") >= count, gateway.log.getvalue)
    return [json.loads(line) for line in gateway.log.getvalue().splitlines()]


def servers_of(gateway: Gateway) -> list[ReadableSpan]:
    return [span for span in gateway.spans() if "gateway.outcome" in (span.attributes or {})]


def idle(gateway: Gateway) -> bool:
    return not (len(gateway.parts.in_flight) or gateway.parts.admission.in_flight or gateway.parts.admission.queued)


# Who may use what


async def test_a_key_may_use_its_models_and_sees_no_others(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(mock, a='models: [demo-model, "llama*"]')
    for model in ("demo-model", "llama-3", "llama"):
        assert (await ask(gateway, model=model)).status == 200
    for stream in (False, True):
        answer = await ask(gateway, model="qwen-3", stream=stream)
        assert (answer.status, answer.own_error["code"], answer.own_error["param"]) == (
            403,
            "model_not_allowed",
            "model",
        )
        assert answer.own_error["type"] == "invalid_request_error"
        assert answer.attempts == 0
    assert mock.journal.total == 3
    assert (await ask(gateway, "team-b", model="qwen-3")).status == 200

    listed = [(await get(gateway, "/v1/models", **key(name))).json["data"] for name in SECRETS]
    assert [[model["id"] for model in data] for data in listed] == [["demo-model"], ["demo-model", "qwen-3"]]
    assert (await get(gateway, "/v1/models/qwen-3", **key())).status == 404
    assert (await get(gateway, "/v1/models/qwen-3", **key("team-b"))).status == 200


async def test_a_key_that_may_not_use_the_default_model_must_name_one(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(mock, a="models: [qwen-3]")
    async with gateway.client.post(CHAT_PATH, json={"messages": CHAT["messages"]}, headers=key()) as response:
        assert response.status == 403
    assert mock.journal.total == 0


async def test_with_keys_in_the_file_those_of_the_environment_open_nothing(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(mock, gateway_api_keys="another")
    assert (await gateway.chat(headers={"authorization": "Bearer another"})).status == 401
    assert (await gateway.chat()).status == 401
    assert (await ask(gateway)).status == (await ask(gateway, "team-b")).status == 200


async def test_the_name_of_a_key_shows_everywhere_and_the_key_nowhere(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(mock, a="limits: {requests_per_minute: 2, tokens_per_minute: 100000}")
    assert (await ask(gateway)).status == 200
    assert (await ask(gateway, stream=True)).status == 200
    assert (await ask(gateway)).status == 429
    assert (await ask(gateway, "team-b", model="none", stream=True)).status == 200
    assert (await get(gateway, "/v1/models", **key("team-b"))).status == 200
    refused = await gateway.chat(headers={"authorization": "Bearer wrong-key"})
    assert refused.status == 401

    told = await lines(gateway, 6)
    assert [line.get("key") for line in told] == ["team-a"] * 3 + ["team-b"] * 2 + [None]
    assert [line.get("key_tokens_source") for line in told] == ["reported", "counted"] + [None] * 4
    await until(lambda: len(servers_of(gateway)) == 6)
    by_key = [dict(span.attributes or {}).get("gateway.key") for span in servers_of(gateway)]
    assert sorted(map(str, by_key)) == ["None"] + ["team-a"] * 3 + ["team-b"] * 2
    (limited,) = [span for span in servers_of(gateway) if "gateway.key.limit" in (span.attributes or {})]
    assert (limited.attributes or {})["gateway.key.limit"] == "requests_per_minute"
    assert await samples(gateway, "gateway_key_requests_total") == {
        ("team-a", "ok"): 2,
        ("team-a", "rate_limit_exceeded"): 1,
        ("team-b", "ok"): 2,
    }
    assert await samples(gateway, "gateway_key_refused_total") == {("team-a", "requests_per_minute"): 1}
    assert (await samples(gateway, "gateway_key_limit"))["team-a", "requests_per_minute"] == 2
    assert (await samples(gateway, "gateway_key_limit_used"))["team-a", "requests_per_minute"] == 2

    everything = [gateway.log.getvalue(), await gateway.metrics(), repr(gateway.parts.keys.callers)]
    everything += [span.to_json() for span in gateway.spans()]
    everything += [json.dumps(await gateway.health()), str((await get(gateway, "/v1/models", **key())).headers)]
    for text in everything:
        for secret in (*SECRETS.values(), "wrong-key"):
            assert secret not in text
            assert sha256(secret.encode()).hexdigest() not in text


# What a limit does


async def test_of_a_hundred_parallel_calls_as_many_go_out_as_fit(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(mock, a="limits: {tokens_per_minute: 1000}")
    mock.set_faults([HANG])
    each = len(json.dumps(CHAT | {"max_tokens": 80})) // 4 + 80
    tasks = [asyncio.create_task(ask(gateway, max_tokens=80)) for _ in range(100)]
    await until(lambda: sum(task.done() for task in tasks) == 100 - 1000 // each)
    answers = [task.result() for task in tasks if task.done()]
    assert {(answer.status, answer.own_error["code"]) for answer in answers} == {(429, "rate_limit_exceeded")}
    assert {answer.own_error["type"] for answer in answers} == {"rate_limit_error"}
    await mock.called(1000 // each)
    assert mock.journal.total == 1000 // each
    assert used(gateway, "tokens_per_minute") == 1000 // each * each
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: idle(gateway))
    assert used(gateway, "tokens_per_minute") == 1000 // each * (each - 80), "the prompts of those who left"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limit", ["requests_per_minute: 2", "requests_per_day: 2", "tokens_per_minute: 180"])
async def test_a_retry_after_that_is_honoured_succeeds_and_the_headers_are_true(
    mock: MockModel, start: Start, limit: str, *, stream: bool
) -> None:
    gateway: Gateway = await start(mock, a=f"limits: {{{limit}}}")
    clock = moved(gateway)
    what = "tokens" if "tokens" in limit else "requests"
    most = int(limit.rpartition(" ")[2])
    statuses = []
    while 429 not in statuses:
        answer = await ask(gateway, stream=stream, max_tokens=60)
        statuses.append(answer.status)
        assert answer.headers[f"x-ratelimit-limit-{what}"] == str(most)
        if answer.status == 200 and not stream:
            assert answer.headers[f"x-ratelimit-remaining-{what}"] == str(
                max(0, most - used(gateway, limit.partition(":")[0]))
            )
    assert statuses.count(200) >= 2
    wait = int(answer.headers["retry-after"])
    assert 55 < wait <= 61 if "minute" in limit else 80_000 < wait <= 86_400 + 1_440
    assert "x-should-retry" not in answer.headers
    assert (await get(gateway, "/v1/models", **key())).headers[f"x-ratelimit-limit-{what}"] == str(most)
    clock.forward(wait - 5 if "minute" in limit else wait - 60)
    sent = mock.journal.total
    assert (await ask(gateway, stream=stream, max_tokens=60)).status == 429
    assert mock.journal.total == sent
    clock.forward(5 if "minute" in limit else 60)
    assert (await ask(gateway, stream=stream, max_tokens=60)).status == 200


async def test_a_key_without_limits_gets_the_backends_headers_and_one_with_limits_its_own(
    recorder: Recorder, start: Start
) -> None:
    recorder.headers += [("x-ratelimit-limit-requests", "77"), ("x-ratelimit-remaining-project", "1")]
    gateway: Gateway = await start(recorder.url, a="limits: {requests_per_minute: 5}")

    def told(answer: Answer) -> dict[str, str]:
        return {name: value for name, value in answer.headers.items() if name.startswith("x-ratelimit-")}

    assert told(await ask(gateway, "team-b")) == {
        "x-ratelimit-limit-requests": "77",
        "x-ratelimit-remaining-project": "1",
    }
    began = monotonic()
    own = told(await ask(gateway))
    took = monotonic() - began
    assert own.keys() == {f"x-ratelimit-{word}-requests" for word in ("limit", "remaining", "reset")}
    assert (own["x-ratelimit-limit-requests"], own["x-ratelimit-remaining-requests"]) == ("5", "4")
    reset = re.fullmatch(r"(?:(\d+)m)?(\d+)s", own["x-ratelimit-reset-requests"])
    assert reset is not None
    assert 60 - took <= int(reset[1] or 0) * 60 + int(reset[2]) <= 61
    recorder.status = 400
    assert told(await ask(gateway))["x-ratelimit-remaining-requests"] == "3"
    assert told(await ask(gateway, messages=1))["x-ratelimit-remaining-requests"] == "3", "it was not forwarded"


async def test_a_short_wait_for_a_limit_is_no_429(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(mock, a="limits: {requests_per_minute: 3}", gateway_queue_timeout=30)
    clock = moved(gateway)
    for _ in range(3):
        assert (await ask(gateway)).status == 200
    clock.forward(56)  # 4 s are left, even on a machine that stands still meanwhile
    answers = await asyncio.gather(*(ask(gateway) for _ in range(3)))
    assert [answer.status for answer in answers] == [200] * 3
    assert all(answer.timing[0][2] > 0 for answer in answers), "they were queued"
    assert mock.journal.total == 6


async def test_more_requests_at_once_than_a_key_may_have_wait_for_each_other(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(mock, a="limits: {max_in_flight: 2}", gateway_queue_timeout=30)
    mock.set_faults([{"kind": "latency", "with": {"delay": 0.05}}])
    tasks = [asyncio.create_task(ask(gateway)) for _ in range(10)]
    highest = 0
    while not all(task.done() for task in tasks):
        highest = max(highest, mock.in_flight)
        await asyncio.sleep(0.005)
    assert {task.result().status for task in tasks} == {200}
    assert 1 <= highest <= 2
    assert used(gateway, "max_in_flight") == 0


async def test_who_waits_in_vain_for_its_own_requests_is_told_so(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(mock, a="limits: {max_in_flight: 1}", gateway_queue_timeout=0.1)
    mock.set_faults([HANG])
    first = asyncio.create_task(ask(gateway))
    await mock.called(1)
    answer = await ask(gateway)
    assert (answer.status, answer.own_error["code"], answer.headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
    assert (await lines(gateway, 1))[0]["outcome"] == "rate_limit_exceeded"
    assert mock.journal.total == 1
    mock.set_faults([])
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await until(lambda: idle(gateway))
    assert (await ask(gateway)).status == 200


async def test_a_burst_of_one_key_does_not_push_another_out_of_the_queue(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(mock, gateway_max_in_flight=2, gateway_max_queue=4, gateway_queue_timeout=60)
    mock.set_faults([{**HANG, "match": {"model": "slow"}}])
    slots = [asyncio.create_task(ask(gateway, name, model="slow")) for name in SECRETS]
    await mock.called(2)
    burst = []
    for number in range(1, 5):
        burst.append(asyncio.create_task(ask(gateway, model="slow")))
        await until(lambda number=number: gateway.parts.admission.queued == number)  # type: ignore[misc]
    modest = asyncio.create_task(ask(gateway, "team-b"))
    refused = await burst[-1]
    assert (refused.status, refused.own_error["code"]) == (503, "gateway_overloaded")
    assert refused.headers["retry-after"] == "1"
    slots[1].cancel()
    assert (await modest).status == 200
    for task in (*slots, *burst):
        task.cancel()
    await asyncio.gather(*slots, *burst, return_exceptions=True)
    await until(lambda: idle(gateway))


# What a request has used


@pytest.mark.parametrize("seed", [1, randrange(1 << 32)], ids=["1", "another"])
async def test_what_is_charged_is_what_the_backends_reported_to_the_token(
    mock: MockModel, start: Start, seed: int
) -> None:
    print(f"seed {seed}")  # noqa: T201
    random = Random(seed)
    gateway: Gateway = await start(mock, a="limits: {tokens_per_minute: 1000000, tokens_per_day: 1000000}")

    async def one(name: str) -> int:
        path, body = random.choice(
            [
                (CHAT_PATH, CHAT | {"max_tokens": random.randint(1, 40)}),
                (CHAT_PATH, CHAT | {"stream": True, "stream_options": {"include_usage": True}}),
                ("/v1/completions", {"prompt": "word " * random.randint(1, 50)}),
                ("/v1/embeddings", {"input": ["one", "two words"]}),
                ("/v1/responses", {"input": "Say it."}),
                ("/v1/responses", {"input": "Say it.", "stream": True}),
            ]
        )
        async with gateway.client.post(path, json=body, headers=key(name)) as response:
            answer = await Answer.of(response)
        assert answer.status == 200
        if not body.get("stream"):
            return int(answer.json["usage"]["total_tokens"])
        events = [each for each in answer.events if isinstance(each, dict)]
        usage = next(u for each in events if (u := each.get("usage") or each.get("response", {}).get("usage")))
        return int(usage["total_tokens"])

    names = [random.choice(list(SECRETS)) for _ in range(60)]
    told = await asyncio.gather(*map(one, names))
    sums = {name: sum(tokens for who, tokens in zip(names, told, strict=True) if who == name) for name in SECRETS}
    await until(lambda: idle(gateway))
    assert mock.journal.total == 60
    assert used(gateway, "tokens_per_minute") == used(gateway, "tokens_per_day") == sums["team-a"]
    assert await samples(gateway, "gateway_key_tokens_total") == {(name, "reported"): sums[name] for name in SECRETS}
    charged = [line["key_tokens"] for line in await lines(gateway, 60) if line["key"] == "team-a"]
    assert sum(charged) == sums["team-a"]


async def test_a_stream_that_its_caller_leaves_is_paid_as_far_as_it_was_relayed(
    slow_mock: MockModel, start: Start
) -> None:
    gateway: Gateway = await start(slow_mock, a="limits: {tokens_per_minute: 100000}")
    body = CHAT | {"stream": True, "max_tokens": 5000}
    async with gateway.client.post(CHAT_PATH, json=body, headers=key()) as response:
        for _ in range(6):
            await response.content.readuntil(b"\n\n")
        assert used(gateway, "tokens_per_minute") == len(json.dumps(body)) // 4 + 5000
    await until(lambda: idle(gateway))
    await slow_mock.settled()
    (call,) = json.loads(slow_mock.journal.document())["calls"]
    assert call["ended"] == "caller_left"
    prompt = len(json.dumps(body)) // 4
    (line,) = await lines(gateway, 1)
    assert line["key_tokens_source"] == "counted"
    assert prompt + 5 <= line["key_tokens"] == used(gateway, "tokens_per_minute")
    assert line["key_tokens"] <= prompt + call["events_sent"] + 1
    assert await samples(gateway, "gateway_key_tokens_total") == {("team-a", "counted"): line["key_tokens"]}


@pytest.mark.parametrize("stream", [False, True])
async def test_what_its_caller_leaves_before_the_answer_costs_the_prompt(
    mock: MockModel, start: Start, *, stream: bool
) -> None:
    gateway: Gateway = await start(mock, a="limits: {tokens_per_minute: 100000}")
    mock.set_faults([HANG])
    body = CHAT | {"stream": stream, "messages": [{"role": "user", "content": "word " * 2000}]}
    task = asyncio.create_task(ask(gateway, **body))
    await mock.called(1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: idle(gateway))
    assert used(gateway, "tokens_per_minute") == len(json.dumps(body)) // 4
    late = await ask(gateway, headers={"x-request-timeout": "3"}, **body)
    assert late.status == 504
    assert used(gateway, "tokens_per_minute") == 2 * (len(json.dumps(body)) // 4)


@pytest.mark.parametrize(
    ("fault", "stream"),
    [
        ({"kind": "status", "with": {"status": 500}}, False),
        ({"kind": "status", "with": {"status": 400}}, True),
        ({"kind": "reset"}, False),
        ({"kind": "not_json"}, False),
        ({"kind": "cut", "with": {"after_events": 1}}, True),
        ({"kind": "html"}, True),
    ],
)
async def test_what_fails_before_its_answer_costs_no_tokens(
    mock: MockModel, start: Start, fault: dict[str, Any], *, stream: bool
) -> None:
    gateway: Gateway = await start(
        mock, a="limits: {tokens_per_minute: 100000, requests_per_minute: 5}", gateway_backoff_initial=0
    )
    mock.set_faults([fault])
    assert (await ask(gateway, stream=stream)).status >= 400
    assert used(gateway, "tokens_per_minute") == 0
    assert used(gateway, "requests_per_minute") == 1


async def test_a_stream_that_is_cut_costs_the_prompt_and_what_was_relayed(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(mock, a="limits: {tokens_per_minute: 100000}")
    mock.set_faults([{"kind": "cut", "with": {"after_events": 7}}])
    answer = await ask(gateway, stream=True, max_tokens=100)
    assert answer.cut
    prompt = len(json.dumps(CHAT | {"stream": True, "max_tokens": 100})) // 4
    assert prompt + 6 <= used(gateway, "tokens_per_minute") <= prompt + 8


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_without_usage_is_counted_by_its_bytes(
    start_raw: StartRaw, start: Start, *, stream: bool
) -> None:
    """A server that sends many tokens in one event pays for them as well."""
    words = "word " * 200

    async def play(call: RawCall) -> None:
        if stream:
            await call.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for piece in (chunk(), chunk("a"), chunk("b"), chunk(words), chunk(words), chunk(finish="stop")):
                await call.events(piece)
                await asyncio.sleep(0.05)
            await call.events(b"data: [DONE]\n\n")
            await call.send(b"0\r\n\r\n")
        else:
            message = {"role": "assistant", "content": words * 2}
            document = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
            await call.answer(json.dumps(document).encode())

    backend = await start_raw(play)
    gateway: Gateway = await start(backend.url, a="limits: {tokens_per_minute: 100000}")
    answer = await ask(gateway, stream=stream)
    assert answer.status == 200
    prompt = len(json.dumps(CHAT | {"stream": stream})) // 4
    assert prompt + 490 <= used(gateway, "tokens_per_minute") < prompt + 600
    assert (await lines(gateway, 1))[0]["key_tokens_source"] == "counted"


async def test_without_max_tokens_as_many_are_reserved_as_answers_had_before(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(mock, a="limits: {tokens_per_minute: 100000}")
    answer = await ask(gateway)
    usage = answer.json["usage"]
    before = used(gateway, "tokens_per_minute")
    mock.set_faults([HANG])
    task = asyncio.create_task(ask(gateway))
    await mock.called(2)
    assert used(gateway, "tokens_per_minute") - before == len(json.dumps(CHAT)) // 4 + usage["completion_tokens"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_image_is_reserved_a_thousand_tokens_whatever_its_size(recorder: Recorder, start: Start) -> None:
    recorder.pieces = [b'{"choices": []}']
    gateway: Gateway = await start(recorder.url, a="limits: {tokens_per_minute: 1000000}")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
    assert (await ask(gateway, messages=messages, max_tokens=10)).status == 200
    assert 1_000 < used(gateway, "tokens_per_minute") < 1_100


# Over a restart


async def test_limits_of_a_day_outlive_the_process_and_those_of_a_minute_do_not(
    mock: MockModel, start: Start, tmp_path: Path
) -> None:
    limits = "limits: {requests_per_day: 3, requests_per_minute: 100, tokens_per_day: 100000}"
    first: Gateway = await start(mock, a=limits, gateway_state_dir=tmp_path / "state")
    for _ in range(2):
        assert (await ask(first)).status == 200
    tokens = used(first, "tokens_per_day")
    await first.client.close()

    second: Gateway = await start(mock, a=limits, gateway_state_dir=tmp_path / "state")
    assert used(second, "requests_per_day") == 2
    assert used(second, "tokens_per_day") == tokens > 0
    assert used(second, "requests_per_minute") == 0
    assert (await ask(second)).headers["x-ratelimit-remaining-requests"] == "0"
    assert (await ask(second)).status == 429
    assert (await second.health())["limits"] == {"status": "ok"}
    kept = (tmp_path / "state" / "limits.sqlite").read_bytes()
    assert not [secret for secret in SECRETS.values() if secret.encode() in kept]


async def test_a_folder_that_cannot_be_used_hurts_no_request_and_shows_in_health(
    mock: MockModel, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway")
    (tmp_path / "state").write_text("a file")
    gateway: Gateway = await start(mock, a="limits: {requests_per_day: 2}", gateway_state_dir=tmp_path / "state")
    assert [(await ask(gateway)).status for _ in range(3)] == [200, 200, 429]
    health = await gateway.health()
    assert (health["limits"], health["status"]) == ({"status": "degraded"}, "degraded")
    (tmp_path / "state").unlink()

    async def is_well() -> bool:
        return bool((await gateway.health())["limits"] == {"status": "ok"})

    await until(is_well)
    said = [record.getMessage() for record in caplog.records if "limits of a day" in record.getMessage()]
    assert len(said) == 2
    assert "state" in said[0]
    assert (await gateway.health())["status"] == "ok"


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/embeddings", "/v1/rerank"])
async def test_a_usage_that_no_backend_can_have_is_more_than_any_limit_and_ends_no_record_of_others(
    recorder: Recorder, start: Start, tmp_path: Path, path: str
) -> None:
    most = 2**63 - 1
    usage = {"prompt_tokens": most, "completion_tokens": most, "total_tokens": most}
    recorder.pieces = [json.dumps({"choices": [], "usage": usage}).encode()]
    folder, limits = tmp_path / "state", "limits: {requests_per_day: 100, tokens_per_day: 999999999999}"
    first: Gateway = await start(recorder.url, a=limits, gateway_state_dir=folder)
    body = CHAT | {"input": "Hello", "query": "q", "documents": ["d"]}
    for status in (200, 429):
        async with first.client.post(path, json=body, headers=key()) as response:
            assert response.status == status
    await until(lambda: idle(first))
    tokens, requests = used(first, "tokens_per_day"), used(first, "requests_per_day")
    assert 999_999_999_999 < tokens < 2**42
    await first.client.close()
    second: Gateway = await start(recorder.url, a=limits, gateway_state_dir=folder)
    assert (used(second, "tokens_per_day"), used(second, "requests_per_day")) == (tokens, requests)


async def test_health_says_whether_there_are_limits(mock: MockModel, start: Start) -> None:
    assert (await (await start(mock)).health())["limits"] == {"status": "off"}
    assert (await (await start(mock, b="limits: {max_in_flight: 3}")).health())["limits"] == {"status": "ok"}


# At every API


@pytest.mark.parametrize("stream", [False, True])
async def test_messages_are_charged_as_reported_and_refused_in_their_own_form(
    mock: MockModel, start: Start, *, stream: bool
) -> None:
    gateway: Gateway = await start(
        mock, a="models: [demo-model], limits: {requests_per_minute: 1, tokens_per_minute: 100000}"
    )
    body = {"model": "demo-model", "max_tokens": 50, "messages": CHAT["messages"], "stream": stream}
    path, headers = "/v1/messages", {"x-api-key": SECRETS["team-a"]}
    async with gateway.client.post(path, json=body | {"model": "qwen-3"}, headers=headers) as response:
        assert response.status == 403
        assert (await response.json())["error"]["code"] == "model_not_allowed"
    async with gateway.client.post(path, json=body, headers=headers) as response:
        assert response.status == 200
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        await response.read()
    await until(lambda: idle(gateway))
    line = (await lines(gateway, 2))[1]
    assert line["key_tokens"] == line["input_tokens"] + line["output_tokens"] == used(gateway, "tokens_per_minute")
    assert line["key_tokens_source"] == "reported"
    async with gateway.client.post(path, json=body, headers=headers) as response:
        document = await response.json()
        assert (response.status, document["type"], document["error"]["type"]) == (429, "error", "rate_limit_error")
        assert document["error"]["code"] == "rate_limit_exceeded"
        assert 0 < int(response.headers["retry-after"]) <= 61
    assert mock.journal.total == 1


async def test_what_is_passed_through_counts_as_a_request_and_reserves_nothing(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(
        mock, a="models: [demo-model], limits: {requests_per_minute: 2, tokens_per_minute: 10}"
    )
    body = {"model": "demo-model", "input": "word " * 1000}
    statuses = []
    for model in ("demo-model", "demo-model", "qwen-3", "demo-model"):
        async with gateway.client.post("/v1/moderations", json=body | {"model": model}, headers=key()) as response:
            await response.read()
            statuses.append(response.status)
    assert statuses == [200, 200, 403, 429]
    assert (used(gateway, "requests_per_minute"), used(gateway, "tokens_per_minute")) == (2, 0)


SOUND = b"RIFF" + b"\x00\xff" * 50_000


def passed_through(path: str, **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """What is posted to a path: a form where it takes a sound or an image, else JSON."""
    if path.startswith("/v1/audio/t") or path == "/v1/images/edits":
        data = aiohttp.FormData()
        data.add_field("image" if "images" in path else "file", SOUND, filename="a", content_type="application/binary")
        for name, value in changes.items():
            data.add_field(name, value)
        return {"data": data}
    return {"json": changes}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/audio/transcriptions", {"model": "gpt-4o-transcribe"}),
        ("/v1/audio/transcriptions", {"model": "gpt-4o-transcribe", "stream": "true"}),
        ("/v1/images/generations", {"model": "m", "prompt": "A cat.", "n": 10}),
        ("/v1/images/edits", {"model": "m", "prompt": "A cat."}),
        ("/v1/rerank", {"model": "m", "query": "cat", "documents": ["a cat", "a dog " * 10_000]}),
        ("/v1/score", {"model": "m", "text_1": "cat", "text_2": ["a cat"] * 1_000}),
    ],
)
@pytest.mark.parametrize("commit", ["first_token", "complete"])
async def test_what_is_passed_through_is_charged_what_its_backend_reported(
    mock: MockModel, start: Start, path: str, body: dict[str, Any], commit: str
) -> None:
    gateway: Gateway = await start(mock, a="limits: {tokens_per_minute: 1000000}", b="limits: {max_in_flight: 9}")
    for name in SECRETS:
        headers = {**key(name), "x-gateway-commit": commit}
        async with gateway.client.post(path, headers=headers, **passed_through(path, **body)) as response:
            answer = await Answer.of(response)
        assert answer.status == 200
    last = answer.json if "stream" not in body else next(e for e in reversed(answer.events) if isinstance(e, dict))
    reported = last["usage"]["total_tokens"]
    await until(lambda: idle(gateway))
    assert used(gateway, "tokens_per_minute") == reported > 0
    told = {line["key"]: (line.get("key_tokens"), line.get("key_tokens_source")) for line in await lines(gateway, 2)}
    assert told == {"team-a": (reported, "reported"), "team-b": (None, None)}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/audio/transcriptions", {"model": "whisper-1"}),
        ("/v1/audio/transcriptions", {"model": "gpt-4o-transcribe", "response_format": "text"}),
        ("/v1/audio/speech", {"model": "m", "input": "hello", "voice": "alloy"}),
        ("/v1/moderations", {"model": "m", "input": "hello"}),
        ("/v1/messages/count_tokens", {"model": "m", "messages": CHAT["messages"]}),
        ("/tokenize", {"model": "m", "prompt": "hello"}),
    ],
)
async def test_what_is_passed_through_without_a_usage_in_tokens_costs_none(
    mock: MockModel, start: Start, path: str, body: dict[str, Any]
) -> None:
    gateway: Gateway = await start(mock, a="limits: {tokens_per_minute: 1000000}")
    async with gateway.client.post(path, headers=key(), **passed_through(path, **body)) as response:
        assert (response.status, await response.read() != b"") == (200, True)
    await until(lambda: idle(gateway))
    assert used(gateway, "tokens_per_minute") == 0


async def test_what_is_cut_while_it_is_passed_through_costs_no_tokens(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(mock, a="limits: {tokens_per_minute: 1000000}")
    mock.set_faults([{"kind": "short_body", "with": {"bytes": 1}}])
    body = {"model": "m", "prompt": "A cat."}
    with pytest.raises(aiohttp.ClientPayloadError):
        async with gateway.client.post("/v1/images/generations", json=body, headers=key()) as response:
            await response.read()
    await until(lambda: idle(gateway))
    assert used(gateway, "tokens_per_minute") == 0


async def test_a_usage_is_read_without_holding_anything_back(start_raw: StartRaw, start: Start) -> None:
    """Each piece reaches the caller before the backend sends the next one, the usage itself too."""
    pieces = [b'{"data":[{"b64_json":"', b"A" * 100_000, b'"}],"usage":{"input_tokens":3,', b'"output_tokens":4}', b"}"]
    came = asyncio.Queue[bytes]()

    async def play(call: RawCall) -> None:
        length = sum(map(len, pieces))
        await call.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % length)
        for piece in pieces:
            await call.send(piece)
            assert await came.get() == piece

    backend = await start_raw(play)
    gateway: Gateway = await start(backend.url, a="limits: {tokens_per_minute: 1000000}")
    body = {"model": "m", "prompt": "A cat."}
    async with gateway.client.post("/v1/images/generations", json=body, headers=key()) as response:
        for piece in pieces:
            came.put_nowait(await response.content.readexactly(len(piece)))
    await until(lambda: idle(gateway))
    assert used(gateway, "tokens_per_minute") == 7


async def test_a_stored_response_that_is_read_again_costs_its_tokens_once(mock: MockModel, start: Start) -> None:
    gateway: Gateway = await start(mock, a="limits: {requests_per_minute: 4, tokens_per_minute: 100000}")
    async with gateway.client.post(
        "/v1/responses", json={"model": "demo-model", "input": "Say it."}, headers=key()
    ) as response:
        made = await response.json()
    tokens = used(gateway, "tokens_per_minute")
    assert tokens == made["usage"]["total_tokens"]
    for _ in range(3):
        assert (await get(gateway, f"/v1/responses/{made['id']}", **key())).status == 200
    assert used(gateway, "tokens_per_minute") == tokens
    assert (await get(gateway, f"/v1/responses/{made['id']}", **key())).status == 429
    assert (await get(gateway, f"/v1/responses/{made['id']}", **key("team-b"))).status == 404
