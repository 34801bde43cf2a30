"""`llm-gateway why ID`: the explanation as text for a terminal."""

import asyncio
import json
import os
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from gateway.admin_client import NotAnswered, ask
from mock_model.serve import MockModel
from testkit.processes import python, spawn
from tests.integration.gateways import REFUSED, StartGateway, config

ADMIN = "admin-key-of-the-tests"


async def command(*words: str, **environment: str) -> tuple[int | None, str, str]:
    """Exit code, and what was written to stdout and stderr."""
    process = await spawn(python("gateway", *words), env=os.environ | environment, stdout=PIPE, stderr=PIPE)
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_the_text_tells_the_sentence_and_a_waterfall(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_backoff_initial=0.02)
    mock.set_faults([{"kind": "status", "with": {"status": 502}, "times": 1}])
    answer = await gateway.chat(headers={"x-request-id": "a/b?c"})
    for id_ in (answer.headers["x-request-id"], answer.headers["x-trace-id"]):
        code, out, err = await command("why", id_, "--url", gateway.url, HTTP_PROXY=REFUSED, http_proxy=REFUSED)
        assert (code, err) == (0, "")
        told, heads, waterfall, tokens = (part.splitlines() for part in out.split("\n\n"))
        asked, ids = heads
        assert " ".join(told).startswith("Answered by backend-1 at the second attempt, in ")
        assert " ".join(told).endswith(", after backend-1 answered 502.")
        assert max(map(len, told)) <= 100
        assert asked == "/v1/chat/completions  model demo-model  route *  generation 1"
        assert answer.headers["x-trace-id"] in ids
        first, backoff, second = waterfall
        assert first.endswith("attempt 1 at backend-1: status_502 -> retry (breaker closed, 10 retries left)")
        assert backoff.endswith("backoff before attempt 2")
        assert second.endswith("attempt 2 at backend-1: ok -> answered (breaker closed, 9 retries left)")
        assert all(line.startswith("|") and line[31] == "|" for line in waterfall)
        assert [set(line[1:31]) - {" "} for line in waterfall] == [{"#"}, {"."}, {"#"}]
        assert tokens[0].startswith("tokens: ")


async def test_who_was_not_asked_is_told_with_the_reason(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    backends = {"first": {"url": mock.url}, "second": {"url": mock.url}}
    route = {"model": "*", "targets": [{"backend": "first"}, {"backend": "second", "model": "small"}]}
    gateway = await start_gateway(
        gateway_config=config(tmp_path, json.dumps({"backends": backends, "routes": [route]}))
    )
    answer = await gateway.chat()
    _, out, _ = await command("why", answer.headers["x-request-id"], "--url", gateway.url)
    assert "\nsecond (small) was not asked: another one answered\n" in out


async def test_the_admin_key_comes_from_the_environment(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_admin_key=ADMIN)
    answer = await gateway.chat()
    words = ("why", answer.headers["x-request-id"], "--url", gateway.url)
    assert (await command(*words, GATEWAY_ADMIN_KEY=ADMIN))[0] == 0
    code, out, err = await command(*words)
    assert (code, out) == (1, "")
    assert err.startswith("why: the gateway answered 401: Send the admin key")
    assert ADMIN not in (await command(*words, GATEWAY_ADMIN_KEY=ADMIN[:-1]))[2]


async def test_what_cannot_be_told_is_one_line(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    code, out, err = await command("why", "unknown", "--url", gateway.url)
    assert (code, out) == (1, "")
    assert err == "why: the gateway answered 404: No request with this id is under way or among the 0 that are kept.\n"
    for url, words in ((REFUSED, "no gateway answers at"), (mock.url, "the gateway answered 404"), ("x", "is needed")):
        with pytest.raises(NotAnswered, match=words):
            await asyncio.to_thread(ask, url, "/requests/x")
