"""Lists of models: what the backends of a `*` route list is what callers can pick from."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway import model_lists
from testkit.completions import CHAT
from testkit.polling import until
from tests.integration.backends_raw import StartRaw
from tests.integration.gateways import KEY, REFUSED, Gateway, StartGateway, StartMock, config, get, listed
from tests.integration.recorder import Recorder

NAMES = ["org/small", "qwen3:8b", "models/gemini-2.5-pro", "with space", "50%", "ä"]


class Lister:
    """A backend that lists models; `answer` makes its answers. `asked`: how often it was; `seen`: the latest time."""

    def __init__(self, answer: Callable[[], web.Response]) -> None:
        self.answer = answer
        self.asked = 0
        self.url = ""
        self.seen: web.Request

    async def list_models(self, request: web.Request) -> web.Response:
        """Count and answer."""
        self.asked += 1
        self.seen = request
        return self.answer()


@asynccontextmanager
async def listing(answer: Callable[[], web.Response], path: str = "/v1") -> AsyncIterator[Lister]:
    lister = Lister(answer)
    app = web.Application()
    app.router.add_get(f"{path}/models", lister.list_models)
    async with TestServer(app, host="127.0.0.1") as server:
        lister.url = str(server.make_url("")).rstrip("/")
        yield lister


def these(*names: str, **more: Any) -> Callable[[], web.Response]:  # noqa: ANN401
    return lambda: web.json_response({"object": "list", "data": [{"id": name} for name in names], **more})


async def names(gateway: Gateway) -> list[str]:
    return [model["id"] for model in json.loads((await get(gateway, "/v1/models")).body)["data"]]


async def asked_again(backend: Lister) -> None:
    asked = backend.asked
    await until(lambda: backend.asked > asked + 3)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask all the time."""
    monkeypatch.setattr(model_lists, "INTERVAL", 0.02)


async def test_with_urls_alone_callers_can_pick_what_the_replicas_list(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    first, second = await start_mock(model_name="qwen3:8b"), await start_mock(model_name="org/small")
    gateway = await start_gateway(first, second)
    await listed(gateway)

    assert await names(gateway) == ["qwen3:8b", "org/small"]
    async with gateway.sdk as sdk:
        for model in [each.id async for each in sdk.models.list()]:
            assert (await sdk.models.retrieve(model)).id == model
            answer = await sdk.chat.completions.create(model=model, messages=CHAT["messages"])
            assert answer.model == model


async def test_a_request_that_names_no_model_is_for_the_first_that_is_listed(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    mock = await start_mock(model_name="qwen3:8b")
    gateway = await start_gateway(mock)
    await listed(gateway)
    prompt = {"messages": CHAT["messages"]}
    async with gateway.client.post("/v1/chat/completions", json=prompt) as response:
        assert response.status == 200

    assert mock.journal.calls[0].model == "qwen3:8b"
    assert json.loads((await get(gateway, "/")).body)["model"] == "qwen3:8b"


async def test_until_something_is_listed_there_is_the_usual_model(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(REFUSED)

    assert await names(gateway) == ["demo-model"]
    assert json.loads((await get(gateway, "/")).body)["model"] == "demo-model"


async def test_every_listed_name_can_be_asked_for(start_gateway: StartGateway) -> None:
    async with listing(these(*NAMES)) as backend:
        gateway = await start_gateway(backend.url)
        await listed(gateway)
        assert await names(gateway) == NAMES
        async with gateway.sdk as sdk:
            assert [(await sdk.models.retrieve(name)).id for name in NAMES] == NAMES
        for path in ("org/small", "org%2Fsmall", "qwen3%3A8b", "qwen3:8b", "with%20space", "50%25", "%C3%A4"):
            assert (await get(gateway, f"/v1/models/{path}")).status == 200
        unknown = await get(gateway, "/v1/models/org")
        assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")


async def test_a_list_is_asked_for_as_a_prompt_would_be(
    recorder: Recorder, start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "s3cret")
    file = config(
        tmp_path,
        f"""
backends:
  one: {{url: "{recorder.url}/base/openai", api_key_env: A_KEY, headers: {{x-title: app}}, query: {{api-version: "1"}}}}
routes: [{{model: "*", targets: [{{backend: one}}]}}]
""",
    )
    await start_gateway(gateway_config=file)
    await until(lambda: bool(recorder.listed))

    (seen,) = recorder.listed
    assert seen.path == "/base/openai/models?api-version=1"
    assert (seen.header("authorization"), seen.header("x-title")) == ("Bearer s3cret", "app")
    assert seen.header("traceparent") is None


async def test_only_targets_of_a_route_for_all_that_keep_the_callers_name_are_asked(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        backends = {name: await stack.enter_async_context(listing(these(f"of-{name}"))) for name in "abcd"}
        urls = "\n".join(f'  {name}: {{url: "{backend.url}"}}' for name, backend in backends.items())
        file = config(
            tmp_path,
            f"""
backends:
{urls}
routes:
  - {{model: named, targets: [{{backend: a}}]}}
  - {{model: "of-*", targets: [{{backend: b}}]}}
  - {{model: "*", targets: [{{backend: c, model: tiny}}, {{backend: d}}]}}
""",
        )
        gateway = await start_gateway(gateway_config=file, model_name="usual")
        await listed(gateway)
        assert await names(gateway) == ["named", "usual", "of-d"]
        assert {name: backend.asked for name, backend in backends.items()} == {"a": 0, "b": 0, "c": 0, "d": 1}


async def test_a_request_that_names_no_model_goes_to_a_backend_of_the_route_for_all(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    paid = await start_mock()
    local = await start_mock(model_name="gpt-4", mock_models=["*", "llama"])
    file = config(
        tmp_path,
        f"""
backends: {{local: {{url: "{local.url}"}}, paid: {{url: "{paid.url}"}}}}
routes: [{{model: "gpt-*", targets: [{{backend: paid}}]}}, {{model: "*", targets: [{{backend: local}}]}}]
""",
    )
    gateway = await start_gateway(gateway_config=file)
    await listed(gateway)
    assert await names(gateway) == ["llama", "gpt-4"]
    for path, body in (
        ("/v1/chat/completions", {"messages": CHAT["messages"]}),
        ("/v1/audio/speech", {"input": "x", "voice": "y"}),
    ):
        async with gateway.client.post(path, json=body) as response:
            assert response.status == 200

    assert [each.model for each in local.journal.calls] == ["llama", "llama"]
    assert paid.journal.total == 0


WRONG = {
    "404": lambda: web.json_response({"detail": "Not Found"}, status=404),
    "a page": lambda: web.Response(text="<html>", content_type="text/html"),
    "an error inside": lambda: web.json_response({"error": {"message": "no"}}),
    "another key": lambda: web.Response(status=401),
    "elsewhere": lambda: web.Response(status=307, headers={"location": "/v1/other"}),
    "too many values": lambda: web.Response(body=b'{"data":[%b1]}' % (b"1," * 200_000)),
    "too large": lambda: web.Response(body=b" " * (model_lists.MAX_LIST + 1)),
    "large when decoded": lambda: _packed(b" " * (model_lists.MAX_LIST + 1)),
}


def _packed(body: bytes) -> web.Response:
    response = web.Response(body=body)
    response.enable_compression(web.ContentCoding.gzip)
    return response


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("wrong", WRONG)
async def test_the_last_good_list_stays_and_the_wrong_one_is_told_once(
    start_gateway: StartGateway, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway")
    async with listing(these("first")) as backend:
        gateway = await start_gateway(backend.url)
        await until(lambda: gateway.parts.pool.models == ("first",))
        for answer in (WRONG[wrong], these("second")):
            backend.answer = answer
            await asked_again(backend)
            if answer is WRONG[wrong]:
                assert await names(gateway) == ["first"]
        assert await names(gateway) == ["second"]
        (replica,) = (await gateway.health())["downstream"]["backends"]
    told = [record.getMessage() for record in caplog.records if "no list of models" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("no list of models from backend-1: ")
    assert (replica["breaker"], replica["consecutive_failures"], replica["last_error"]) == ("closed", 0, None)
    assert gateway.parts.byte_budget.held == 0


@pytest.mark.usefixtures("often")
async def test_names_stay_while_their_backend_is_down(start_gateway: StartGateway) -> None:
    async with listing(these("first")) as backend:
        gateway = await start_gateway(backend.url)
        await until(lambda: gateway.parts.pool.models == ("first",))
    await asyncio.sleep(0.1)

    assert await names(gateway) == ["first"]


async def test_a_backend_that_starts_late_is_soon_asked_again(
    start_mock: StartMock, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_lists, "EAGER_INTERVAL", 0.02)
    mock = await start_mock(model_name="late")
    await mock.refuse(3600)
    gateway = await start_gateway(mock)
    await asyncio.sleep(0.1)
    assert await names(gateway) == ["demo-model"]
    await mock.revive()
    await listed(gateway)

    assert await names(gateway) == ["late"]


async def test_a_backend_that_is_still_loading_is_soon_asked_again(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_lists, "EAGER_INTERVAL", 0.02)
    loading = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    async with listing(lambda: web.json_response(loading, status=503)) as backend:
        gateway = await start_gateway(backend.url)
        await asked_again(backend)
        backend.answer = these("loaded")
        await listed(gateway)

        assert await names(gateway) == ["loaded"]


async def test_a_list_that_does_not_come_delays_neither_start_nor_stop(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway")
    hanging: list[asyncio.StreamWriter] = []

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hanging.append(writer)

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as there:
        gateway = await start_gateway(f"http://127.0.0.1:{there.sockets[0].getsockname()[1]}", gateway_probe_path="")
        await until(lambda: bool(hanging))
        assert (await get(gateway, "/readyz")).status == 200
        await asyncio.wait_for(gateway.client.close(), model_lists.TIMEOUT / 2)

        monkeypatch.setattr(model_lists, "TIMEOUT", 0.1)
        await start_gateway(f"http://127.0.0.1:{there.sockets[0].getsockname()[1]}", gateway_probe_path="")
        await until(lambda: "no list of models from backend-1: It did not come" in caplog.text)
        for writer in hanging:
            writer.close()


async def test_a_key_is_needed_for_what_backends_list(start_mock: StartMock, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(await start_mock(model_name="inner"), gateway_api_keys=[KEY])
    await listed(gateway)

    assert (await get(gateway, "/v1/models/inner")).status == 401
    assert (await get(gateway, "/v1/models/inner", authorization=f"Bearer {KEY}")).status == 200


async def test_backends_without_a_list_are_asked_without_harm(
    start_raw: StartRaw, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway")
    backend = await start_raw(lambda call: call.answer())
    gateway = await start_gateway(backend.url)
    await until(lambda: "no list of models from backend-1: The answer is 404." in caplog.text)

    assert (await gateway.chat()).status == 200
    assert (len(backend.lists), len(backend.calls)) == (1, 1)
    assert logging.ERROR not in [record.levelno for record in caplog.records]
