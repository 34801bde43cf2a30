"""llama.cpp's own server behind the gateway: nobody gets less than from the server itself."""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from testkit.http import Answer, ask
from testkit.polling import until
from testkit.servers import Gateway
from tests.real.conftest import StartGateway, StartLlama
from tests.real.servers import PATIENCE, SLOW_TO_LOAD, TEXT, Llama

pytestmark = pytest.mark.asyncio(loop_scope="session")

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": TEXT}]
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "cache_prompt": False}
"""Answered alike each time, probabilities included."""
SAME: dict[str, Any] = {"model": "tiny", "messages": MESSAGES} | GREEDY
ENDLESS: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30_000, "ignore_eos": True}
"""Would take a slot for the better part of a minute."""
IMAGE: Any = {
    "model": "tiny",
    "messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]}
    ],
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}},
    "required": ["city"],
    "additionalProperties": False,
}
NEVER_TWICE = frozenset(
    """
    id item_id created created_at completed_at timings cached_tokens cache_read_input_tokens input_tokens
    """.split()  # noqa: SIM905
)
"""Fields that differ between two answers to the same request: of a prompt seen before less is read anew."""


async def post(url: str, body: object, path: str = CHAT, **headers: str) -> Answer:
    return await ask(url + path, method="POST", body=body, headers=headers, seconds=PATIENCE)


def compared(document: Any) -> Any:  # noqa: ANN401
    """What must be the same in two answers."""
    if isinstance(document, dict):
        return {name: compared(value) for name, value in document.items() if name not in NEVER_TWICE}
    return [compared(item) for item in document] if isinstance(document, list) else document


def documents(answer: Answer) -> Any:  # noqa: ANN401
    return compared(answer.events if answer.headers["content-type"].startswith("text/event-stream") else answer.json)


async def backend_of(gateway: Gateway) -> dict[str, Any]:
    (backend,) = (await gateway.health())["downstream"]["backends"]
    return dict(backend)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, SAME),
        (CHAT, SAME | {"n": 2}),
        (CHAT, SAME | {"logprobs": True, "top_logprobs": 2}),
        (CHAT, SAME | {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}}}),
        ("/v1/completions", {"model": "tiny", "prompt": "Say"} | GREEDY),
        ("/v1/completions", {"model": "tiny", "prompt": ["Say", "it"]} | GREEDY),
        ("/v1/responses", {"model": "tiny", "input": "Say something.", "max_output_tokens": 8} | GREEDY),
        ("/v1/messages", SAME),
    ],
    ids=["chat", "choices", "logprobs", "structured", "completion", "prompts", "responses", "messages"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_answer_is_the_servers(
    through: Gateway, llama: Llama, path: str, body: dict[str, Any], *, stream: bool
) -> None:
    asked = body | {"stream": stream}

    direct, answer = await post(llama.url, asked, path), await post(through.url, asked, path)

    assert (answer.status, answer.attempts, answer.cut) == (200, 1, False)
    assert by_choice(documents(answer)) == by_choice(documents(direct))
    assert answer.headers["content-type"] == direct.headers["content-type"]


def by_choice(documents: Any) -> Any:  # noqa: ANN401
    """The events of several choices come in any order: sort them by choice."""
    if not isinstance(documents, list):
        return documents

    def index(event: Any) -> int:  # noqa: ANN401
        choices = event.get("choices") if isinstance(event, dict) else None
        return int(choices[0]["index"]) if choices else -1

    return sorted(documents, key=index)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (IMAGE, 500),
        (SAME | {"messages": [{"role": "user", "content": "word " * 20_000}]}, 400),
        (SAME | {"messages": [{"role": "nobody"}]}, 400),
        (SAME | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}, 400),
    ],
    ids=["image", "too long", "message", "schema"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_error_answer_is_the_servers(
    through: Gateway,
    llama: Llama,
    body: dict[str, Any],
    status: int,
    *,
    stream: bool,
) -> None:
    asked = body | {"stream": stream}

    direct, answer = await post(llama.url, asked), await post(through.url, asked)

    assert (direct.status, answer.status) == (status, status)
    assert answer.json == direct.json
    assert status == 500 or answer.attempts == 1


async def test_an_error_answer_to_a_message_is_the_servers(through: Gateway, llama: Llama) -> None:
    asked = SAME | {"messages": [{"role": "user", "content": "word " * 20_000}]}

    direct, answer = [await post(url, asked, "/v1/messages") for url in (llama.url, through.url)]

    assert (direct.status, answer.status, answer.attempts) == (400, 400, 1)
    assert answer.json == direct.json


async def test_what_a_server_was_not_started_for_costs_one_attempt_and_no_breaker(
    through: Gateway, llama: Llama
) -> None:
    for number in range(6):
        body = {"model": "tiny", "input": f"text {number}"}
        answer = await post(through.url, body, "/v1/embeddings")

        assert (answer.status, answer.attempts) == (501, 1)
        assert answer.json == (await post(llama.url, body, "/v1/embeddings")).json

    assert (await backend_of(through))["status"] == "ok"


async def test_a_prompt_that_the_server_answers_with_500_is_its_senders_trouble_alone(
    start_gateway: StartGateway, llama: Llama
) -> None:
    gateway = await start_gateway(llama.url)

    for number in range(6):
        bad = await post(gateway.url, IMAGE | {"seed": number // 3})
        good = await post(gateway.url, SAME)

        assert (bad.status, good.status, good.attempts) == (500, 200, 1)
        assert "image input is not supported" in bad.error["message"]
    backend = await backend_of(gateway)
    assert (backend["status"], backend["breaker"]) == ("ok", "closed")


async def test_embeddings_are_the_servers_and_a_text_too_long_is_its_senders_trouble(
    start_llama: StartLlama, start_gateway: StartGateway
) -> None:
    server = await start_llama(embedding=True, pooling_type="LLAMA_POOLING_TYPE_MEAN", n_batch=128, n_ubatch=128)
    gateway = await start_gateway(server.url)
    good, bad = ({"model": "tiny", "input": text} for text in (["a text", "another"], "word " * 100))

    for number in range(3):
        refused, direct = [await post(url, bad, "/v1/embeddings") for url in (gateway.url, server.url)]
        answer = await post(gateway.url, good, "/v1/embeddings")

        assert (refused.status, refused.json) == (direct.status, direct.json)
        assert direct.status == 500
        assert number == 0 or refused.attempts == 1
        assert documents(answer) == documents(await post(server.url, good, "/v1/embeddings"))
    assert (await backend_of(gateway))["breaker"] == "closed"


async def test_a_prompt_too_long_for_one_server_goes_to_another(
    start_llama: StartLlama, start_gateway: StartGateway, tmp_path: Path
) -> None:
    small, large = await start_llama(n_ctx=1024), await start_llama()
    file = tmp_path / "gateway.yaml"
    targets = [{"backend": "small"}, {"backend": "large"}]
    backends = {"small": {"url": small.url}, "large": {"url": large.url}}
    file.write_text(json.dumps({"backends": backends, "routes": [{"model": "*", "targets": targets}]}))
    gateway = await start_gateway(GATEWAY_CONFIG=str(file))
    long = SAME | {"messages": [{"role": "user", "content": "word " * 400}]}

    first, second = await post(gateway.url, SAME), await post(gateway.url, long)

    assert (first.status, first.headers["x-gateway-backend"]) == (200, "small")
    assert (second.status, second.headers["x-gateway-backend"]) == (200, "large")
    assert second.outcomes == ["small status_400", "large ok"]
    assert documents(second) == documents(await post(large.url, long))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_server_stops_computing_when_the_caller_has_left(
    through: Gateway,
    llama: Llama,
    *,
    stream: bool,
) -> None:
    before = llama.cancelled
    asking = asyncio.create_task(post(through.url, ENDLESS | {"stream": stream}))
    await until(llama.busy, "the server computes")
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking

    # Not asked of its slots at first: while anybody asks for anything more than once a second, llama.cpp does not look
    # whether the caller of an unstreamed answer is still there.
    await until(lambda: llama.cancelled > before, "the server is told to stop", seconds=PATIENCE)
    await until(lambda: idle(llama), "the server has stopped")


async def test_callers_wait_while_a_killed_server_comes_back_and_loads_its_model(
    start_llama: StartLlama, start_gateway: StartGateway
) -> None:
    server = await start_llama(chat_template=SLOW_TO_LOAD)
    gateway = await start_gateway(server.url, GATEWAY_OUTAGE_WAIT=str(PATIENCE))
    before = await post(gateway.url, SAME)
    await server.kill()
    asking = [asyncio.create_task(post(gateway.url, SAME | {"stream": stream})) for stream in (False, True) * 3]
    await until(lambda: all_waiting(gateway, 6), "all are with the gateway")

    await server.start(wait=False)
    loading: set[str] = set()
    await until(lambda: loads(server, loading), "the server loads its model", seconds=PATIENCE)
    answers = await asyncio.gather(*asking)

    assert loading == {"Loading model"}
    assert [answer.status for answer in (before, *answers)] == [200] * 7
    assert {answer.text for answer in answers} == {before.text}
    assert all(answer.attempts > 1 and answer.waits("bridging") for answer in answers)
    await until(lambda: status_is(gateway, "ok"), "the backend is well")


async def idle(server: Llama) -> bool:
    return await server.busy() == 0


async def all_waiting(gateway: Gateway, count: int) -> bool:
    return bool((await gateway.health())["in_flight"] == count)


async def loads(server: Llama, said: set[str]) -> bool:
    with contextlib.suppress(OSError, TimeoutError):
        answer = await ask(f"{server.url}/health")
        if answer.status == 503:
            said.add(answer.error["message"])
    return bool(said)


async def status_is(gateway: Gateway, status: str) -> bool:
    return bool((await backend_of(gateway))["status"] == status)


async def test_a_cold_server_is_told_as_it_is(start_llama: StartLlama, start_gateway: StartGateway) -> None:
    server = await start_llama(chat_template=SLOW_TO_LOAD)
    await server.kill()
    await server.start(wait=False)
    await until(lambda: loads(server, set()), "the server loads its model", seconds=PATIENCE)
    gateway = await start_gateway(server.url, GATEWAY_OUTAGE_WAIT="0")

    statuses = set()
    while 200 not in statuses:
        answer = await post(gateway.url, SAME)
        statuses.add(answer.status)
        if answer.status == 503 and "x-gateway-backend" in answer.headers:
            assert answer.error["message"] == "Loading model"

    assert statuses <= {200, 503}


async def test_a_stream_whose_server_is_killed_ends_with_an_error_and_the_next_is_whole(
    start_llama: StartLlama, start_gateway: StartGateway
) -> None:
    server = await start_llama()
    gateway = await start_gateway(server.url, GATEWAY_OUTAGE_WAIT=str(PATIENCE))
    sdk = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
    words = 0

    async def read() -> None:
        nonlocal words
        endless = await sdk.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, max_tokens=30_000, extra_body={"ignore_eos": True}
        )
        async for event in endless:
            words += bool(event.choices and event.choices[0].delta.content)
            if words == 3:
                await server.kill()

    with pytest.raises(openai.APIError) as failed:
        await read()
    next_one = asyncio.create_task(post(gateway.url, SAME))
    await until(lambda: all_waiting(gateway, 1), "the next one is with the gateway")
    await server.start()
    answer = await next_one

    assert words >= 3
    assert failed.value.code == "backend_invalid_response"
    assert (answer.status, documents(answer)) == (200, documents(await post(server.url, SAME)))
    await sdk.close()


async def test_health_follows_the_server(start_llama: StartLlama, start_gateway: StartGateway) -> None:
    server = await start_llama()
    gateway = await start_gateway(server.url, GATEWAY_PROBE_INTERVAL="0.1", GATEWAY_OUTAGE_WAIT="0")
    await until(lambda: status_is(gateway, "ok"), "the backend is well")

    await server.kill()
    await until(lambda: status_is(gateway, "down"), "its end is seen")
    down = await ask(f"{gateway.url}/health")
    await server.start()
    await until(lambda: status_is(gateway, "ok"), "its return is seen")

    assert (down.status, down.json["status"]) == (503, "down")
    assert (await post(gateway.url, SAME)).status == 200


async def test_a_long_prompt_is_waited_for_while_the_server_gives_signs_of_life(
    start_llama: StartLlama, start_gateway: StartGateway
) -> None:
    timer = 3.0
    server = await start_llama(n_batch=16, n_ubatch=1, sse_ping_interval=1)
    gateway = await start_gateway(server.url, GATEWAY_FIRST_TOKEN_TIMEOUT=str(timer))

    for words in (
        400,
        640,
        1000,
        1600,
        2600,
        4200,
        6000,
    ):  # until it takes longer than the timer, on a fast machine too
        long = SAME | {"stream": True, "messages": [{"role": "user", "content": "word " * words}]}
        answer = await post(gateway.url, long)
        assert (answer.status, answer.attempts, answer.events[-1]) == (200, 1, "[DONE]")
        if answer.seconds > 1.5 * timer:
            break

    assert answer.seconds > 1.5 * timer
    assert (await backend_of(gateway))["consecutive_failures"] == 0
