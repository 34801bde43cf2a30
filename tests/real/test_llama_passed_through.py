"""llama.cpp's calls beside chat, passed through, and its list of models."""

from typing import Any

import pytest

from testkit.http import Answer, ask
from testkit.polling import until
from testkit.servers import Gateway
from tests.real.conftest import StartGateway, StartLlama
from tests.real.servers import PATIENCE, Llama

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def post(url: str, path: str, body: object) -> Answer:
    return await ask(url + path, method="POST", body=body, seconds=PATIENCE)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages/count_tokens", {"model": "tiny", "messages": [{"role": "user", "content": "Say something."}]}),
        ("/tokenize", {"content": "Say something."}),
        ("/detokenize", {"tokens": [104, 105]}),
    ],
)
async def test_a_call_beside_chat_is_answered_as_by_the_server(
    through: Gateway, llama: Llama, path: str, body: dict[str, Any]
) -> None:
    answer, direct = await post(through.url, path, body), await post(llama.url, path, body)

    assert (direct.status, answer.status, answer.attempts) == (200, 200, 1)
    assert answer.json == direct.json


async def test_documents_are_ranked_as_by_the_server(start_llama: StartLlama, start_gateway: StartGateway) -> None:
    server = await start_llama(embedding=True, pooling_type="LLAMA_POOLING_TYPE_RANK")
    gateway = await start_gateway(server.url)
    body = {"model": "tiny", "query": "a", "documents": ["a", "b"]}

    answer, direct = [await post(url, "/v1/rerank", body) for url in (gateway.url, server.url)]

    assert (direct.status, answer.status, answer.attempts) == (200, 200, 1)
    assert answer.json == direct.json


async def test_what_the_server_cannot_do_is_its_own_answer(through: Gateway, llama: Llama) -> None:
    for path, body in (
        ("/v1/rerank", {"model": "tiny", "query": "a", "documents": ["a", "b"]}),
        ("/v1/audio/speech", {"model": "tiny", "input": "Say", "voice": "nobody"}),
    ):
        answer, direct = await post(through.url, path, body), await post(llama.url, path, body)

        assert (answer.status, answer.json, answer.attempts) == (direct.status, direct.json, 1)
        assert direct.status >= 400


async def test_the_models_are_the_servers_and_one_is_taken_where_none_is_named(through: Gateway, llama: Llama) -> None:
    async def listed() -> list[str]:
        return [model["id"] for model in (await ask(f"{through.url}/v1/models")).json["data"]]

    async def known() -> bool:
        return await listed() != ["demo-model"]

    await until(known, "the gateway has asked the server for its models")
    there = [model["id"] for model in (await ask(f"{llama.url}/v1/models")).json["data"]]
    answer = await post(
        through.url, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Say"}], "max_tokens": 8}
    )

    assert there == await listed()
    assert answer.status == 200
