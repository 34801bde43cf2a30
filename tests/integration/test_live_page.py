"""The live page as its browser asks for it: document, stream of snapshots, buttons. In a browser: tests/chaos."""

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.backend.mock_control import ACTIONS
from gateway.server import live_page
from gateway.server.live_page import MAX_VIEWERS
from mock_model.serve import MockModel
from testkit.http import Answer, Body, ask
from testkit.polling import until
from testkit.sse import Event, read_events
from tests.integration.gateways import Gateway, StartGateway, config, get
from tests.integration.wire import dial, send

ADMIN = "admin-key-of-the-tests"
SIGNED_IN = {"authorization": f"Bearer {ADMIN}"}
LIVE = "/ui/live"
CALLS = (("GET", "/ui"), ("GET", LIVE), ("GET", "/ui/mock"), ("POST", "/ui/mock/heal"))


@asynccontextmanager
async def watching(gateway: Gateway) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of the stream, as long as somebody looks."""
    async with (
        asyncio.timeout(30),
        aiohttp.ClientSession() as session,  # with a connection of its own, which is closed afterwards
        session.get(gateway.url + LIVE) as response,
    ):
        assert response.status == 200, await response.text()
        assert response.headers["content-type"] == "text/event-stream"
        async with aclosing(read_events(Body(response))) as events:  # type: ignore[type-var]
            yield events


async def document(events: AsyncIterator[Event], name: str = "now") -> dict[str, Any]:
    """The next document of this name."""
    async for event in events:
        if event.name == name:
            found: dict[str, Any] = json.loads(event.data)
            return found
    raise AssertionError(f"the stream ended without {name}")


async def press(gateway: Gateway, action: str, **headers: str) -> Answer:
    """Press a button of the page."""
    kinds = {"content-type": "application/json"} | headers
    async with gateway.client.post(f"/ui/mock/{action}", data="{}", headers=kinds) as response:
        return await Answer.of(response)


async def test_the_document_runs_nothing_but_what_it_holds_and_loads_nothing(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    page = await get(await start_gateway(mock), "/ui")
    text = page.body.decode()
    policy = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for kind in ("script", "style"):
        (inline,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = b64encode(sha256(inline.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
        assert len(inline) > 1000
    assert (policy["default-src"], policy["connect-src"], policy["img-src"]) == ("'none'", "'self'", "data:")
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert (
        re.findall(r"\son\w+=|\sstyle=|\ssrc=|@import|innerHTML|insertAdjacentHTML|document\.write|eval\(", text) == []
    )
    assert set(re.findall(r"https?://[^\s'\"]+", text)) == {"http://www.w3.org/2000/svg"}


async def test_with_an_admin_key_the_document_asks_for_it_and_everything_else_needs_it(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_admin_key=ADMIN, gateway_ui_mock_control=mock.control_url)

    assert (await get(gateway, "/ui")).status == 200
    assert (await get(gateway, LIVE)).own_error["code"] == "invalid_api_key"
    assert (await get(gateway, "/ui/mock")).status == 401
    assert (await get(gateway, "/ui/mock", **SIGNED_IN)).json == {"faults": []}
    assert (await press(gateway, "errors")).status == 401
    assert (await ask(f"{mock.control_url}/faults")).json == []
    async with gateway.client.get(LIVE, headers=SIGNED_IN) as response:
        assert response.status == 200
        response.close()


async def test_without_one_there_is_no_page_for_others_than_this_machine(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_ui_mock_control=mock.control_url)
    for method, path in CALLS:
        lines = (f"{method} {path} HTTP/1.1", "host: rebound.example", "content-type: application/json")
        answer = await send(gateway, "\r\n".join((*lines, "content-length: 2", "", "{}")).encode())
        assert (answer.status, answer.own_error["code"]) == (404, "not_found")


async def test_the_stream_shows_what_the_gateway_does(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    text = f"""
backends: {{b: {{url: "{mock.url}"}}}}
routes: [{{model: "*", targets: [{{backend: b}}]}}]
keys:
  - name: team-a
    key_sha256: "{sha256(b"key-a").hexdigest()}"
    models: ["demo*"]
    limits: {{requests_per_minute: 10}}
  - {{name: team-b, key_sha256: "{sha256(b"key-b").hexdigest()}"}}
"""
    gateway = await start_gateway(gateway_config=config(tmp_path, text))
    async with watching(gateway) as events:
        hello = await document(events, "hello")
        before = await document(events)
        for key in ("key-a", "key-a", "key-b", "no-key"):
            await gateway.chat(headers={"authorization": f"Bearer {key}"}, stream=True)
        await get(gateway, "/v1/models", authorization="Bearer key-b")
        after = before
        while sum(after["requests"].values()) < 4:
            after = await document(events)

    assert hello["mock"] == []
    assert before["requests"] == {}
    assert after["requests"] == {"ok": 3, "invalid_api_key": 1}, "not those for /v1/models"
    assert after["attempts"] == {"b": 3}
    assert sum(after["latency"]) == 4
    assert sum(after["first_token"]) == 3
    assert len(after["latency"]) == len(after["seconds"]) + 1
    assert after["health"]["downstream"]["backends"][0]["url"] == mock.url
    assert [(caller["name"], caller["requests"], caller["failed"]) for caller in after["callers"]] == [
        ("team-a", 2, 0),
        ("team-b", 2, 0),  # of a key every call counts
    ]
    assert after["callers"][0]["limits"] == [{"name": "requests_per_minute", "limit": 10, "used": 2}]
    assert (after["callers"][0]["models"], after["callers"][1]["models"]) == (["demo*"], None)
    assert b"key-a" not in json.dumps(after).encode()


async def test_all_who_look_see_the_same_snapshot_and_nobody_costs_nothing(
    mock: MockModel, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start_gateway(mock)
    page, taken = gateway.parts.live_page, 0
    take = page.snapshot.document

    def counted() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return take()

    monkeypatch.setattr(page.snapshot, "document", counted)
    monkeypatch.setattr(live_page, "INTERVAL", 1000.0)
    async with watching(gateway) as first, watching(gateway) as second:
        assert await document(first) == await document(second)
    assert taken == 1
    monkeypatch.setattr(live_page, "INTERVAL", 0.01)
    page._taken_at = 0.0  # the next one is due
    async with watching(gateway) as events:
        await document(events)
        await document(events)
    assert taken > 2
    await until(lambda: page.viewers == 0)
    taken = 0
    await gateway.chat()
    await asyncio.sleep(0.1)  # of ten intervals
    assert taken == 0


async def test_the_stream_is_no_request_in_flight_and_leaves_no_trace(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock)
    async with watching(gateway) as events:
        seen = await document(events)
        assert (seen["health"]["in_flight"], len(gateway.parts.in_flight)) == (0, 0)
    await get(gateway, "/ui")
    await gateway.chat()
    await until(gateway.spans)
    assert {(span.attributes or {}).get("url.path") for span in gateway.spans()} <= {"/v1/chat/completions", None}
    assert "/ui" not in await gateway.metrics()
    assert "/ui" not in gateway.log.getvalue()


async def test_there_are_so_many_viewers_and_no_more(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    async with AsyncExitStack() as stack:
        for _ in range(MAX_VIEWERS):
            await document(await stack.enter_async_context(watching(gateway)), "hello")
        refused = await get(gateway, LIVE)
        assert (refused.status, refused.own_error["code"]) == (503, "gateway_overloaded")
        assert "close one of them" in refused.error["message"]
    await until(lambda: gateway.parts.live_page.viewers == 0)
    async with watching(gateway) as events:
        await document(events)


async def test_streams_end_when_the_gateway_stops_and_none_begins(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    async with watching(gateway) as events:
        await document(events)
        gateway.parts.admission.drain()
        assert await document(events, "bye") == {}
        assert [event async for event in events] == []
    refused = await get(gateway, LIVE)
    assert (refused.status, refused.own_error["code"]) == (503, "gateway_draining")


async def test_a_stop_does_not_wait_for_streams(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    async with watching(gateway) as events:
        await document(events)
        closing = asyncio.create_task(gateway.client.close())
        assert await document(events, "bye") == {}
        await closing


async def test_who_does_not_take_a_snapshot_in_time_is_cut_off(
    mock: MockModel, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start_gateway(mock)
    page = gateway.parts.live_page
    monkeypatch.setattr(live_page, "SLOW", 0.3)
    monkeypatch.setattr(page.snapshot, "document", lambda: {"at": "x" * 20_000_000})
    async with dial(gateway.url) as wire:
        await wire.send(b"GET /ui/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await until(lambda: page.viewers == 1)
        await until(lambda: page.viewers == 0)
        assert not (await wire.rest()).endswith(b"0\r\n\r\n")


async def test_the_buttons_break_the_mock_model_and_heal_it(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_ui_mock_control=mock.control_url)
    async with watching(gateway) as events:
        buttons = (await document(events, "hello"))["mock"]
    assert [button["name"] for button in buttons] == [action.name for action in ACTIONS]

    for action in ACTIONS:
        pressed = await press(gateway, action.name)
        assert pressed.json == {"faults": [fault["kind"] for fault in action.faults]}, action.name
    assert (await press(gateway, "errors")).status == 200
    assert (await gateway.chat()).status == 503
    assert (await press(gateway, "heal")).json == {"faults": []}
    assert (await gateway.chat()).status == 200
    assert (await press(gateway, "once")).status == 200
    assert (await gateway.chat()).attempts == 2
    assert (await get(gateway, "/ui/mock")).json == {"faults": []}, "it is used up"


async def test_only_fixed_actions_pass_and_only_from_the_page_itself(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_ui_mock_control=mock.control_url)

    assert (await press(gateway, "crash")).own_error["code"] == "not_found"
    assert (await press(gateway, "errors", origin="https://elsewhere.example")).status == 400
    assert (await press(gateway, "errors", **{"sec-fetch-site": "cross-site"})).status == 400
    assert (await press(gateway, "errors", **{"content-type": "text/plain"})).status == 415
    assert (await get(gateway, "/ui/mock/errors")).status == 405
    assert (await ask(f"{mock.control_url}/faults")).json == []


async def test_where_no_mock_model_is_known_or_there_is_none_the_page_is_told(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    without = await start_gateway(mock)
    assert (await press(without, "heal")).own_error["code"] == "not_found"
    gone = await start_gateway(mock, gateway_ui_mock_control="http://127.0.0.1:1")
    assert (await press(gone, "heal")).own_error["code"] == "backend_connection_error"
    another = await start_gateway(mock, gateway_ui_mock_control=mock.url)
    assert (await press(another, "heal")).status == 502
