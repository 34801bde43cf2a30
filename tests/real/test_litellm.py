"""LiteLLM's proxy behind the gateway, before llama.cpp's server."""

from typing import Any

import pytest
import pytest_asyncio

from testkit.http import Answer, ask
from testkit.polling import until
from testkit.servers import Gateway
from tests.real.conftest import StartGateway
from tests.real.servers import PATIENCE, LiteLlm

pytestmark = pytest.mark.asyncio(loop_scope="session")

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "Say something."}]
SAME: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}


@pytest_asyncio.fixture(loop_scope="session")
async def gateway(start_gateway: StartGateway, litellm: LiteLlm) -> Gateway:
    return await start_gateway(litellm.url, GATEWAY_BACKEND_API_KEY=litellm.key, GATEWAY_PROBE_TIMEOUT="30")


async def post(url: str, body: object, path: str = CHAT, **headers: str) -> Answer:
    return await ask(url + path, method="POST", body=body, headers=headers, seconds=PATIENCE)


async def direct(litellm: LiteLlm, body: object, path: str = CHAT) -> Answer:
    return await post(litellm.url, body, path, authorization=f"Bearer {litellm.key}")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_answer_is_the_proxys(gateway: Gateway, litellm: LiteLlm, *, stream: bool) -> None:
    asked = SAME | {"stream": stream}

    answer, expected = await post(gateway.url, asked), await direct(litellm, asked)

    assert (answer.status, answer.attempts, answer.cut) == (200, 1, False)
    assert answer.text
    assert answer.text == expected.text
    if stream:
        assert answer.events[-1] == expected.events[-1] == "[DONE]"
        assert len(answer.events) == len(expected.events)


async def test_a_stream_of_two_choices_is_whole_though_one_has_no_finish_reason(
    gateway: Gateway, litellm: LiteLlm
) -> None:
    asked = SAME | {"stream": True, "n": 2}

    answer, expected = await post(gateway.url, asked), await direct(litellm, asked)

    assert (answer.status, answer.attempts, answer.cut) == (200, 1, False)
    assert (answer.events[-1], expected.events[-1]) == ("[DONE]", "[DONE]")
    assert len(answer.events) == len(expected.events)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_several_prompts_are_answered_as_by_the_proxy(
    gateway: Gateway,
    litellm: LiteLlm,
    *,
    stream: bool,
) -> None:
    asked = {"model": "tiny", "prompt": ["Say", "it"], "max_tokens": 4, "temperature": 0, "stream": stream}

    answer = await post(gateway.url, asked, "/v1/completions")
    expected = await direct(litellm, asked, "/v1/completions")

    assert (answer.status, answer.attempts, answer.cut) == (200, 1, False)
    assert expected.status == 200
    if stream:
        assert len(answer.events) == len(expected.events)
    else:
        texts = [[choice["text"] for choice in one.json["choices"]] for one in (answer, expected)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "body",
    [SAME | {"model": "nobody"}, SAME | {"messages": [{"role": "user", "content": "word " * 20_000}]}],
    ids=["model", "too long"],
)
async def test_an_error_answer_is_the_proxys(gateway: Gateway, litellm: LiteLlm, body: object) -> None:
    answer, expected = await post(gateway.url, body), await direct(litellm, body)

    assert 400 <= expected.status < 500
    assert (answer.status, answer.json) == (expected.status, expected.json)
    assert answer.attempts == 1
    (backend,) = (await gateway.health())["downstream"]["backends"]
    assert (backend["status"], backend["consecutive_failures"]) == ("ok", 0)


async def test_a_wrong_key_gets_the_proxys_own_words(start_gateway: StartGateway, litellm: LiteLlm) -> None:
    gateway = await start_gateway(litellm.url, GATEWAY_BACKEND_API_KEY="sk-wrong")

    answer = await post(gateway.url, SAME)

    assert (answer.status, answer.error["message"], answer.attempts) == (400, "No connected db.", 1)


async def test_a_probe_without_a_key_is_good_and_asks_no_model(gateway: Gateway, litellm: LiteLlm) -> None:
    assert (await ask(f"{litellm.url}/health", seconds=PATIENCE)).status == 401

    async def probed() -> bool:
        (backend,) = (await gateway.health())["downstream"]["backends"]
        return backend["probe"]["ok"] is not None

    await until(probed, "the gateway has made its first probe", seconds=PATIENCE)
    (backend,) = (await gateway.health())["downstream"]["backends"]

    assert (backend["status"], backend["probe"]["ok"]) == ("ok", True)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_it_can_stand_before_the_gateway_as_well(through: Gateway, litellm: LiteLlm, *, stream: bool) -> None:
    asked = SAME | {"stream": stream}

    answer, expected = await direct(litellm, asked | {"model": "behind-a-gateway"}), await post(through.url, asked)

    assert (answer.status, answer.cut, answer.text) == (200, False, expected.text)
