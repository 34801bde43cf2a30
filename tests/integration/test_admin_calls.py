"""Who may look into the gateway: with an admin key whoever has it, without one only this machine, by its name."""

import asyncio
import json

import pytest

from gateway.server.admin import MAX_SESSIONS, SESSION_SECONDS
from mock_model.serve import MockModel
from testkit.http import Answer
from tests.integration.gateways import KEY, Gateway, StartGateway, get
from tests.integration.wire import send

ADMIN = "admin-key-of-the-tests"
LOGIN = "/ui/login"


async def login(gateway: Gateway, body: str | None = None, **headers: str) -> Answer:
    """Sign in, with the right key unless `body` says otherwise."""
    kinds = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    data = json.dumps({"key": ADMIN}) if body is None else body
    async with gateway.client.post(LOGIN, data=data, headers=kinds, skip_auto_headers=("Content-Type",)) as response:
        answer = await Answer.of(response)
    gateway.client.session.cookie_jar.clear()  # what goes with a call, each test says
    return answer


def request(*headers: str, version: str = "1.1", target: str = LOGIN) -> bytes:
    """A login with a wrong body as it stands on the wire, with these headers beside the necessary ones."""
    lines = [f"POST {target} HTTP/{version}", *headers, "content-type: application/json", "content-length: 11"]
    return "\r\n".join([*lines, "", '{"key": 12}']).encode()


async def test_without_an_admin_key_this_machine_may_ask(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=[KEY])
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000"):
        assert (await send(gateway, request(f"host: {host}"))).status == 400  # it was read


@pytest.mark.parametrize(
    "headers",
    [
        ("host: rebound.example",),
        ("host: rebound.example:8000",),
        ("host: localhost.rebound.example",),
        ("host: 127.0.0.1.rebound.example",),
        ("host: localhost@rebound.example",),
        ("host: 127.0.0.2",),
        ("host: 0.0.0.0",),
        ("host: localhost:8000:1",),
        ("host: localhost", "x-forwarded-for: 203.0.113.7"),
        ("host: localhost", "X-Forwarded-Host: gateway.example"),
        ("host: localhost", "x-forwarded-proto: https"),
        ("host: localhost", "forwarded: for=203.0.113.7"),
        ("host: localhost", "via: 1.1 proxy"),
        ("host: localhost", "x-real-ip: 203.0.113.7"),
    ],
    ids=" ".join,
)
async def test_rebound_names_and_proxies_learn_no_more_than_of_a_path_that_does_not_exist(
    mock: MockModel, start_gateway: StartGateway, headers: tuple[str, ...]
) -> None:
    gateway = await start_gateway(mock)

    hidden, unknown = [await send(gateway, request(*headers, target=target)) for target in (LOGIN, "/nothing")]
    assert hidden.status == unknown.status == 404
    assert hidden.body == unknown.body
    assert {name.lower() for name in hidden.headers} == {name.lower() for name in unknown.headers}


async def test_a_proxy_that_adds_nothing_but_speaks_http_1_0_is_one(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock)
    assert (await send(gateway, request("host: localhost", version="1.0"))).status == 404
    assert (await send(gateway, request("host: localhost", target=f"http://rebound.example{LOGIN}"))).status == 404


async def test_other_methods_are_hidden_as_well(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    for method in ("GET", "OPTIONS", "DELETE"):
        async with gateway.client.request(method, LOGIN) as seen:
            assert (seen.status, seen.headers["allow"]) == (405, "POST")
        async with gateway.client.request(method, LOGIN, headers={"host": "rebound.example"}) as hidden:
            assert hidden.status == 404
            assert "allow" not in hidden.headers


async def test_with_an_admin_key_only_that_key_signs_in(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=[KEY], gateway_admin_key=ADMIN)
    for wrong in ("", KEY, ADMIN + " ", ADMIN.upper(), "ü"):
        answer = await login(gateway, json.dumps({"key": wrong}))
        assert answer.status == 401
        assert json.loads(answer.body)["error"]["code"] == "invalid_api_key"
        assert "set-cookie" not in {name.lower() for name in answer.headers}
    answer = await login(gateway, host="gateway.example", x_forwarded_for="203.0.113.7")
    assert answer.status == 204  # with a key it matters neither whence nor by which name
    cookie = answer.headers["set-cookie"]
    assert {part.strip().lower() for part in cookie.split(";")[1:]} == {
        "httponly", "max-age=43200", "path=/", "samesite=strict",
    }  # fmt: skip
    assert ADMIN not in cookie
    assert cookie != (await login(gateway)).headers["set-cookie"]


async def test_a_session_of_a_page_by_https_is_for_https_alone(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_admin_key=ADMIN)
    answer = await login(gateway, host="gateway.example", origin="https://gateway.example")
    assert answer.status == 204
    assert "Secure" in answer.headers["set-cookie"]


@pytest.mark.parametrize("key", [None, ADMIN])
async def test_no_page_of_another_origin_makes_a_call(
    mock: MockModel, start_gateway: StartGateway, key: str | None
) -> None:
    gateway = await start_gateway(mock, gateway_admin_key=key)
    own = gateway.url
    assert (await login(gateway, origin=own)).status == 204
    assert (await login(gateway, origin=own, sec_fetch_site="same-origin")).status == 204
    for origin in ("http://evil.example", "null", "http://localhost:3000", f"{own}.evil.example", "http://127.0.0.1"):
        assert (await login(gateway, origin=origin)).status == 400
    for site in ("cross-site", "same-site"):
        assert (await login(gateway, sec_fetch_site=site)).status == 400
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert (await login(gateway, content_type=kind)).status == 415


async def test_a_body_that_is_no_login_is_refused(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_admin_key=ADMIN)
    for body, status in (("", 400), ("{", 400), ("[]", 400), ('{"key": 1}', 400), ("[" * 4000, 400), ("x" * 5000, 413)):
        assert (await login(gateway, body)).status == status


async def test_sessions_are_bounded_and_a_new_key_ends_them(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_admin_key=ADMIN)
    for _ in range(MAX_SESSIONS + 3):
        await login(gateway)
    sessions = gateway.parts.admin._sessions
    assert len(sessions) == MAX_SESSIONS
    gateway.parts.admin.set_key(ADMIN)
    assert len(sessions) == MAX_SESSIONS
    gateway.parts.admin.set_key("another")
    assert not sessions


async def test_admin_calls_are_neither_traced_nor_counted(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    assert (await login(gateway)).status == 204
    assert (await get(gateway, LOGIN)).status == 405
    assert "login" not in gateway.log.getvalue()
    assert not gateway.spans()


# What is looked at


async def test_an_admin_key_opens_the_requests_as_bearer_or_by_a_session(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=[KEY], gateway_admin_key=ADMIN)
    refused = await get(gateway, "/requests")
    assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
    assert refused.headers["www-authenticate"].startswith("Bearer")
    assert (await get(gateway, "/requests", authorization=f"Bearer {ADMIN}")).status == 200
    for wrong in (f"Bearer {KEY}", f"Basic {ADMIN}", ADMIN, "Bearer", f"Bearer {ADMIN} {ADMIN}"):
        assert (await get(gateway, "/requests", authorization=wrong)).status == 401
    for headers in ({"x-api-key": ADMIN}, {"api-key": ADMIN}, {"cookie": f"llm-gateway-admin={ADMIN}"}):
        assert (await get(gateway, "/requests", **headers)).status == 401
    assert (await get(gateway, f"/requests?key={ADMIN}")).status == 401
    cookie = (await login(gateway)).headers["set-cookie"].partition(";")[0]
    answer = await get(gateway, "/requests", cookie=cookie)
    assert answer.status == 200
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert not any(name.lower().startswith("access-control") for name in answer.headers)
    assert (await get(gateway, "/requests", cookie=cookie + "x")).status == 401
    gateway.parts.admin.set_key("another")
    assert (await get(gateway, "/requests", cookie=cookie)).status == 401
    gateway.parts.admin.set_key(None)
    assert (await get(gateway, "/requests")).status == 200


async def test_a_session_ends_after_twelve_hours(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_admin_key=ADMIN)
    cookie = (await login(gateway)).headers["set-cookie"].partition(";")[0]
    assert (await get(gateway, "/requests", cookie=cookie)).status == 200
    sessions = gateway.parts.admin._sessions
    for session in sessions:
        sessions[session] -= SESSION_SECONDS
    assert (await get(gateway, "/requests", cookie=cookie)).status == 401


@pytest.mark.parametrize("key", [None, ADMIN])
async def test_a_page_of_another_origin_reads_nothing_though_the_cookie_comes_with_it(
    mock: MockModel, start_gateway: StartGateway, key: str | None
) -> None:
    gateway = await start_gateway(mock, gateway_admin_key=key)
    session = (await login(gateway)).headers.get("set-cookie", "").partition(";")[0] if key else "a=b"
    for site in ("same-site", "cross-site"):
        fetch = {"cookie": session, "sec-fetch-site": site, "sec-fetch-mode": "cors"}
        assert (await get(gateway, "/requests", **fetch)).status == 400
    link = {"cookie": session, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert (await get(gateway, "/requests", **link)).status == 200
    assert (await get(gateway, "/requests", **link, **{"sec-fetch-dest": "document"})).status == 200
    for dest in ("iframe", "frame", "object", "embed"):  # stands on the page, and would hold a stream of snapshots
        for path in ("/requests", "/ui", "/ui/live"):
            assert (await get(gateway, path, **link, **{"sec-fetch-dest": dest})).status == 400
    own = {"cookie": session, "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}
    assert (await get(gateway, "/requests", **own)).status == 200


async def test_a_rebound_page_and_a_proxy_read_nothing(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    answer = await gateway.chat(headers={"x-request-id": "mine"})
    assert answer.status == 200
    for path in ("/requests", "/requests/mine"):
        assert (await get(gateway, path)).status == 200
        for headers in ({"host": "rebound.example"}, {"x-forwarded-for": "203.0.113.7"}, {"via": "1.1 x"}):
            hidden = await get(gateway, path, **headers)
            assert (hidden.status, hidden.error["code"]) == (404, "not_found")
            assert "mine" not in hidden.body.decode()


async def test_admin_calls_take_no_slot_and_are_not_kept(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_max_queue=0)
    mock.set_faults([{"kind": "hang_before_headers"}])
    task = asyncio.create_task(gateway.chat())
    await mock.called(1)
    assert (await get(gateway, "/requests?outcome=in_flight")).status == 200
    await mock.reset()
    await task
    document = json.loads((await get(gateway, "/requests")).body)
    assert [each["path"] for each in document["requests"]] == ["/v1/chat/completions"]
    async with gateway.client.head("/requests") as head:
        assert head.status == 200
    async with gateway.client.options("/requests") as options:
        assert (options.status, options.headers["allow"]) == (405, "GET,HEAD")
