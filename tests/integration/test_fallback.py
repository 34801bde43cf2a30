"""Routes: which backend is asked, for which model, and when the next target's turn comes."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.sse import Events
from tests.integration.backends_raw import RawCall, StartRaw
from tests.integration.gateways import StartGateway, StartMock, prefer

QUICK: dict[str, Any] = {"gateway_backoff_initial": 0.01, "gateway_backoff_max": 0.01}
FAIL = {"kind": "status", "with": {"status": 500}}
Urls = str | list[str]
WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    """Write a `GATEWAY_CONFIG`: backends by name with their urls, and routes with targets such as `primary:small`."""

    def write(backends: dict[str, Urls], routes: dict[str, list[str]]) -> Path:
        def target(text: str) -> dict[str, str]:
            name, _, model = text.partition(":")
            return {"backend": name, "model": model} if model else {"backend": name}

        document = {
            "backends": {
                name: {"url": urls} if isinstance(urls, str) else {"urls": urls} for name, urls in backends.items()
            },
            "routes": [
                {"model": model, "targets": [target(text) for text in targets]} for model, targets in routes.items()
            ],
        }
        path = tmp_path / "gateway.yaml"
        path.write_text(json.dumps(document))  # JSON is YAML
        return path

    return write


def models(mock: MockModel) -> list[str | None]:
    """The models that were asked for, in order."""
    return [call.model for call in mock.journal.calls]


@pytest.fixture
async def two(start_mock: StartMock) -> list[MockModel]:
    return [await start_mock(), await start_mock()]


# Routes


async def test_first_route_that_matches_wins(
    two: list[MockModel], start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    a, b = two
    config = write_config({"a": a.url, "b": b.url}, {"special": ["a"], "*": ["b"]})
    gateway = await start_gateway(gateway_config=config)
    answer = await gateway.chat(model="special")
    assert answer.headers["x-gateway-backend"] == "a"
    assert (models(a), models(b)) == (["special"], [])
    answer = await gateway.chat(model="anything-else")
    assert answer.headers["x-gateway-backend"] == "b"
    assert (models(a), models(b)) == (["special"], ["anything-else"])
    async with gateway.client.get("/v1/models") as response:
        listed = await response.json()
    assert [model["id"] for model in listed["data"]] == ["special", "demo-model"]


async def test_model_without_a_route_is_not_found(
    mock: MockModel, start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    gateway = await start_gateway(gateway_config=write_config({"a": mock.url}, {"special": ["a"]}))
    answer = await gateway.chat(model="other")
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert answer.error["type"] == "invalid_request_error"
    assert answer.attempts == 0
    assert mock.journal.total == 0


async def test_request_without_a_model_goes_where_the_default_goes(
    two: list[MockModel], start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    a, b = two
    config = write_config({"a": a.url, "b": b.url}, {"house-model": ["a"], "*": ["b"]})
    gateway = await start_gateway(gateway_config=config, model_name="house-model")
    prompt = {"messages": CHAT["messages"]}
    async with gateway.client.post("/v1/chat/completions", json=prompt) as response:
        assert response.status == 200
    assert (models(a), models(b)) == (["house-model"], [])


async def test_target_names_the_model_and_every_other_byte_stays(
    start_raw: StartRaw, start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    backend = await start_raw(lambda call: call.answer())
    gateway = await start_gateway(gateway_config=write_config({"a": backend.url}, {"*": ["a:tiny"]}))
    body = b'{ "temperature" : 1.0e0,\n"messages":[{"role":"user","content":"model"}] , "model":"big", "x": [1.50]}'
    async with gateway.client.post(
        "/v1/chat/completions", data=body, headers={"content-type": "application/json"}
    ) as response:
        assert response.status == 200
    assert backend.calls[0].body == body.replace(b'"big"', b'"tiny"')


async def test_url_with_and_without_v1_is_the_same(
    mock: MockModel, start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    for url in (mock.url, f"{mock.url}/", f"{mock.url}/v1", f"{mock.url}/v1/"):
        gateway = await start_gateway(gateway_config=write_config({"a": url}, {"*": ["a"]}))
        assert (await gateway.chat()).status == 200
    assert [call.path for call in mock.journal.calls] == ["/v1/chat/completions"] * 4


async def test_replicas_of_a_backend_share_the_load(
    start_mock: StartMock, start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    mocks = [await start_mock() for _ in range(3)]
    config = write_config({"a": [mock.url for mock in mocks]}, {"*": ["a"]})
    gateway = await start_gateway(gateway_config=config)
    names = [(await gateway.chat()).headers["x-gateway-backend"] for _ in range(60)]
    for number, mock in enumerate(mocks, 1):
        assert mock.journal.total == names.count(f"a-{number}") > 0


async def test_replica_with_less_in_flight_gets_the_request(
    two: list[MockModel], start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    config = write_config({"a": [mock.url for mock in two]}, {"*": ["a"]})
    gateway = await start_gateway(gateway_config=config)
    prefer(gateway, "a-2")
    for _ in range(10):
        assert (await gateway.chat()).headers["x-gateway-backend"] == "a-2"
    assert [mock.journal.total for mock in two] == [0, 10]


# Fallback


def fault(status: int, code: str | None = None) -> dict[str, Any]:
    body = {} if code is None else {"body": {"error": {"message": "no", "type": "oh", "param": None, "code": code}}}
    return {"kind": "status", "with": {"status": status, **body}}


SILENCE: dict[str, Any] = {"kind": "hang_before_headers"}
FALLS_BACK: dict[str, tuple[dict[str, Any], int]] = {
    "500": (FAIL, 3),
    "408": (fault(408), 3),
    "429": (fault(429), 1),
    "retry-after too long": ({"kind": "status", "with": {"status": 429, "headers": {"retry-after": "60"}}}, 1),
    "reset": ({"kind": "reset"}, 3),
    "html": ({"kind": "html"}, 3),
    "cut": ({"kind": "cut"}, 3),
    "silence": (SILENCE, 1),
    "401": (fault(401), 1),
    "403": (fault(403), 1),
    "quota": (fault(429, "insufficient_quota"), 1),
    "payment": (fault(402), 1),
    "context": (fault(400, "context_length_exceeded"), 1),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fault", "calls"), FALLS_BACK.values(), ids=FALLS_BACK.keys())
async def test_next_target_after_the_last_attempt_at_this_one(
    two: list[MockModel],
    start_gateway: StartGateway,
    write_config: WriteConfig,
    fault: dict[str, Any],
    calls: int,
    *,
    stream: bool,
) -> None:
    first, second = two
    config = write_config({"first": first.url, "second": second.url}, {"*": ["first", "second:small"]})
    # Short only where somebody is silent: on a busy machine an honest answer may take a second.
    settings = {"gateway_answer_timeout": 2, "gateway_first_token_timeout": 2} if fault is SILENCE else {}
    gateway = await start_gateway(gateway_config=config, **QUICK, **settings)
    first.set_faults([fault])
    answer = await gateway.chat(model="big", stream=stream)
    assert answer.status == 200
    assert answer.headers["x-gateway-backend"] == "second"
    assert answer.attempts == calls + 1
    assert models(first) == ["big"] * calls
    assert models(second) == ["small"]
    if stream:
        events = Events(answer.body)
        assert events.done == 1
        assert {document["model"] for document in events.documents} == {"small"}
    else:
        assert json.loads(answer.body)["model"] == "small"
    await second.settled()
    assert second.journal.calls[0].ended == "complete"


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_no_other_target_for_a_request_that_is_wrong(
    two: list[MockModel], start_gateway: StartGateway, write_config: WriteConfig, status: int
) -> None:
    first, second = two
    config = write_config({"first": first.url, "second": second.url}, {"*": ["first", "second"]})
    gateway = await start_gateway(gateway_config=config)
    first.set_faults([fault(status)])
    answer = await gateway.chat()
    assert answer.status == status
    assert (first.journal.total, second.journal.total) == (1, 0)


def lacking(*paths: str) -> Callable[[RawCall], Awaitable[None]]:
    """A server that has all paths but these."""

    async def answer(raw: RawCall) -> None:
        if raw.line.split()[1] in paths:
            await raw.answer(b'{"detail":"Not Found"}', status="404 Not Found")
        else:
            await raw.answer()

    return answer


ANSWERED = [("/tokenize", {"prompt": "x"}), ("/v1/responses", {"input": "x"}), ("/v1/chat/completions", CHAT)]


@pytest.mark.parametrize("as_replicas", [False, True])
@pytest.mark.parametrize(("path", "body"), ANSWERED)
async def test_a_path_that_a_server_lacks_moves_no_calls_for_other_paths(
    start_raw: StartRaw,
    start_gateway: StartGateway,
    write_config: WriteConfig,
    *,
    path: str,
    body: dict[str, Any],
    as_replicas: bool,
) -> None:
    first, second = await start_raw(lacking(path)), await start_raw(lacking())
    if as_replicas:
        config = write_config({"a": [first.url, second.url]}, {"*": ["a"]})
    else:
        config = write_config({"a": first.url, "b": second.url}, {"*": ["a", "b"]})
    gateway = await start_gateway(gateway_config=config, gateway_max_attempts=2)
    prefer(gateway, gateway.parts.pool.replicas[0].name)
    model = {"model": CHAT["model"]}

    async def ask(path: str, body: dict[str, Any]) -> None:
        async with gateway.client.post(path, json=model | body) as response:
            assert response.status == 200

    for _ in range(7):
        await ask(path, body)
    asked = len(first.calls)
    assert (asked, len(second.calls)) == (1, 7), "for this path it is not the first to be asked any more"
    for other, text in ANSWERED:
        if other != path:
            for _ in range(3):
                await ask(other, text)
    assert len(first.calls) >= asked + 6
    assert len(second.calls) == 7


async def test_refused_target(two: list[MockModel], start_gateway: StartGateway, write_config: WriteConfig) -> None:
    first, second = two
    config = write_config({"first": first.url, "second": second.url}, {"*": ["first", "second"]})
    gateway = await start_gateway(gateway_config=config, **QUICK)
    first.die()
    answer = await gateway.chat()
    assert answer.status == 200
    assert answer.attempts == 3 + 1
    assert second.journal.total == 1


async def test_fallback_costs_no_retry_budget(
    two: list[MockModel], start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    first, second = two
    config = write_config({"first": first.url, "second": second.url}, {"*": ["first", "second"]})
    gateway = await start_gateway(gateway_config=config, gateway_retry_budget=0, gateway_breaker_failures=100)
    first.set_faults([FAIL])
    for number in range(1, 11):
        answer = await gateway.chat()
        assert answer.status == 200
        assert (first.journal.total, second.journal.total) == (number, number)


async def test_spent_budget_goes_to_the_next_target(
    two: list[MockModel], start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    first, second = two
    config = write_config({"first": first.url, "second": second.url}, {"*": ["first", "second"]})
    gateway = await start_gateway(gateway_config=config, **QUICK, gateway_retry_floor=1, gateway_breaker_failures=100)
    first.set_faults([FAIL])
    attempts = [(await gateway.chat()).attempts for _ in range(4)]
    assert attempts == [1 + 1 + 1, 2, 2, 2]
    assert (first.journal.total, second.journal.total) == (5, 4)


async def test_target_whose_breaker_is_open_is_skipped(
    two: list[MockModel], start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    first, second = two
    config = write_config({"first": first.url, "second": second.url}, {"*": ["first", "second"]})
    gateway = await start_gateway(
        gateway_config=config,
        gateway_max_attempts=1,
        gateway_breaker_failures=2,
        gateway_breaker_open_seconds=60,
        gateway_breaker_open_max=60,
    )
    first.set_faults([FAIL])
    for number in range(2):
        assert (await gateway.chat(user=str(number))).attempts == 2
    answer = await gateway.chat()
    assert answer.status == 200
    assert answer.attempts == 1
    assert answer.headers["x-gateway-backend"] == "second"
    assert (first.journal.total, second.journal.total) == (2, 3)


async def test_all_breakers_open_is_unavailable_until_the_first_is_not(
    two: list[MockModel], start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    first, second = two
    config = write_config({"first": first.url, "second": second.url}, {"*": ["first", "second"]})
    gateway = await start_gateway(
        gateway_config=config,
        gateway_max_attempts=1,
        gateway_breaker_failures=1,
        gateway_breaker_open_seconds=20,
        gateway_breaker_open_max=20,
    )
    for mock in two:
        mock.set_faults([FAIL])
    assert (await gateway.chat()).attempts == 2
    waits = [replica.breaker.retry_in for replica in gateway.parts.pool.replicas]
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"], answer.attempts) == (503, "backend_unavailable", 0)
    assert int(answer.headers["retry-after"]) <= min(wait for wait in waits if wait is not None) + 1
    assert (first.journal.total, second.journal.total) == (1, 1)


async def test_the_last_targets_failure_is_what_the_caller_gets(
    two: list[MockModel], start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    first, second = two
    config = write_config({"first": first.url, "second": second.url}, {"*": ["first", "second"]})
    gateway = await start_gateway(gateway_config=config, **QUICK)
    first.set_faults([fault(401)])
    second.set_faults([fault(400, "context_length_exceeded")])
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert answer.headers["x-gateway-backend"] == "second"
    assert answer.attempts == 2
    assert (first.journal.total, second.journal.total) == (1, 1)


async def test_auth_error_alone_says_nothing_of_the_key(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_backend_api_key="sk-very-secret")
    mock.set_faults([fault(401, "invalid_api_key")])
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"]) == (502, "backend_auth_error")
    assert answer.headers["x-should-retry"] == "false"
    assert b"secret" not in answer.body
    assert mock.journal.total == 1


async def test_each_backend_gets_its_own_key_and_never_the_callers(
    start_raw: StartRaw, start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(call: RawCall) -> None:
        await call.answer(b"{}", status="401 No")

    first, second, third = await start_raw(fail), await start_raw(fail), await start_raw(lambda call: call.answer())
    monkeypatch.setenv("FIRST_KEY", "one")
    monkeypatch.setenv("SECOND_KEY", "two")
    config = tmp_path / "gateway.yaml"
    config.write_text(
        f"""
backends:
  first: {{url: "{first.url}", api_key_env: FIRST_KEY}}
  second: {{url: "{second.url}", api_key_env: SECOND_KEY}}
  third: {{url: "{third.url}"}}
routes:
  - model: "*"
    targets: [{{backend: first}}, {{backend: second}}, {{backend: third}}]
"""
    )
    gateway = await start_gateway(gateway_config=config)
    answer = await gateway.chat(headers={"authorization": "Bearer of-the-caller"})
    assert answer.status == 200
    assert first.calls[0].headers["authorization"] == "Bearer one"
    assert second.calls[0].headers["authorization"] == "Bearer two"
    assert "authorization" not in third.calls[0].headers


async def test_no_fallback_after_commit(
    two: list[MockModel], start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    first, second = two
    config = write_config({"first": first.url, "second": second.url}, {"*": ["first", "second"]})
    gateway = await start_gateway(gateway_config=config)
    first.set_faults([{"kind": "stall", "with": {"after_events": 4}}])
    answer = await gateway.chat(stream=True, headers={"x-request-timeout": "2"})
    assert Events(answer.body).only_error()["code"] == "deadline_exceeded"
    first.set_faults([{"kind": "cut", "with": {"after_events": 4, "how": "end"}}])
    answer = await gateway.chat(stream=True)
    assert Events(answer.body).only_error()["code"] == "backend_invalid_response"
    assert (first.journal.total, second.journal.total) == (2, 0)


async def test_no_fallback_with_less_left_than_the_connect_timeout(
    two: list[MockModel], start_gateway: StartGateway, write_config: WriteConfig
) -> None:
    first, second = two
    config = write_config({"first": first.url, "second": second.url}, {"*": ["first", "second"]})
    gateway = await start_gateway(gateway_config=config, gateway_connect_timeout=5)
    first.set_faults([fault(401)])
    answer = await gateway.chat(headers={"x-request-timeout": "4.9"})
    assert answer.error["code"] == "backend_auth_error"
    assert (first.journal.total, second.journal.total) == (1, 0)
