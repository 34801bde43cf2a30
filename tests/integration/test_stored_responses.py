"""Stored responses: what names one by its id goes to the replica that made it."""

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from yarl import URL

from gateway.policy import response_homes
from mock_model.serve import MockModel
from testkit.exposition import Exposition
from testkit.http import Answer
from testkit.polling import until
from tests.integration.backends_raw import END, STREAM_HEAD, RawCall, StartRaw
from tests.integration.gateways import KEY, Gateway, StartGateway, StartMock, config, get, listed

PATH = "/v1/responses"
UNKNOWN = "resp_0000"


@pytest.fixture
async def two(start_mock: StartMock) -> list[MockModel]:
    return [await start_mock(), await start_mock()]


async def call(gateway: Gateway, method: str, path: str, body: Any = None, **headers: str) -> Answer:  # noqa: ANN401
    async with gateway.client.request(method, path, json=body, headers=headers) as response:
        return await Answer.of(response)


async def made(gateway: Gateway, text: str = "Hello", *, headers: dict[str, str] | None = None, **more: Any) -> Answer:  # noqa: ANN401
    answer = await call(gateway, "POST", PATH, {"model": "m", "input": text, **more}, **(headers or {}))
    assert answer.status == 200, answer.body
    return answer


def id_of(answer: Answer) -> str:
    response_id: str = json.loads(answer.body)["id"]
    return response_id


def home_of(answer: Answer) -> str:
    return answer.headers["x-gateway-backend"]


def name_of(gateway: Gateway, id_: str) -> str:
    """What the replica with this id is called."""
    return next(replica.name for replica in gateway.parts.pool.replicas if replica.id == id_)


def forget_all(gateway: Gateway) -> None:
    """As after a restart of the gateway."""
    homes = gateway.parts.pool.responses
    for each in list(homes._homes):
        homes.forget(each)


def busy(gateway: Gateway, replica: str) -> None:
    """Make every other replica more attractive."""
    for each in gateway.parts.pool.replicas:
        each.in_flight = 1000 if each.name == replica else 0


def idle(gateway: Gateway) -> None:
    for each in gateway.parts.pool.replicas:
        each.in_flight = 0


async def test_chains_over_two_replicas_are_all_whole(two: list[MockModel], start_gateway: StartGateway) -> None:
    gateway = await start_gateway(*two)
    async with gateway.sdk as sdk:

        async def chain(number: int) -> set[str]:
            backends = set()
            previous: str | None = None
            for step in range(4):
                answer = await sdk.responses.with_raw_response.create(
                    model="m", input=f"{number}-{step}", previous_response_id=previous
                )
                previous = answer.parse().id
                backends.add(answer.headers["x-gateway-backend"])
                assert answer.headers["x-gateway-attempts"] == "1"
            return backends

        homes = [await chain(number) for number in range(20)]
    assert all(len(home) == 1 for home in homes)
    assert {"backend-1", "backend-2"} == set.union(*homes)  # one in 2 ** 19 runs has all chains at one


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_chain_stays_where_its_first_response_was_made(
    two: list[MockModel],
    start_gateway: StartGateway,
    streamed: bool,  # noqa: FBT001
) -> None:
    gateway = await start_gateway(*two)
    async with gateway.sdk as sdk:
        if streamed:
            events = [event async for event in await sdk.responses.create(model="m", input="Hello", stream=True)]
            previous = events[0].response.id  # type: ignore[union-attr]
            found = gateway.parts.pool.responses.of(previous)
            assert found is not None
            home = name_of(gateway, found.replica)
        else:
            first = await sdk.responses.with_raw_response.create(model="m", input="Hello")
            previous, home = first.parse().id, first.headers["x-gateway-backend"]
        busy(gateway, home)
        second = await sdk.responses.with_raw_response.create(model="m", input="And?", previous_response_id=previous)
    assert (second.headers["x-gateway-backend"], second.headers["x-gateway-attempts"]) == (home, "1")


async def test_a_response_is_read_streamed_again_cancelled_and_deleted_where_it_was_made(
    two: list[MockModel], start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(*two)
    async with gateway.sdk as sdk:
        stream = await sdk.responses.create(model="m", input="Hello", stream=True)
        events = [event async for event in stream]
        last = events[-1].response  # type: ignore[union-attr]
        home = gateway.parts.pool.responses.of(last.id)
        assert home is not None
        busy(gateway, name_of(gateway, home.replica))

        read = await sdk.responses.with_raw_response.retrieve(last.id)
        assert (read.parse(), read.headers["x-gateway-backend"]) == (last, name_of(gateway, home.replica))
        again = [event async for event in await sdk.responses.retrieve(last.id, stream=True, starting_after=2)]
        assert again == events[3:]
        with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
            await sdk.responses.cancel(last.id)
        await sdk.responses.delete(last.id)
        assert gateway.parts.pool.responses.of(last.id) is None
        with pytest.raises(openai.NotFoundError, match="not found"):
            await sdk.responses.retrieve(last.id)
    calls = {mock.url: [(each.method, each.path) for each in mock.journal.calls] for mock in two}
    asked = sorted(len(each) for each in calls.values())
    assert asked == [1, 6]  # the replica that did not make it was asked once: when nobody knew it any more


async def test_a_background_response_is_polled_and_cancelled(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    slow = [await start_mock(mock_ttft=3600), await start_mock(mock_ttft=3600)]
    gateway = await start_gateway(*slow)
    async with gateway.sdk as sdk:
        first = await sdk.responses.with_raw_response.create(model="m", input="Hello", background=True)
        response, home = first.parse(), first.headers["x-gateway-backend"]
        busy(gateway, home)
        assert response.status in {"queued", "in_progress"}
        for _ in range(3):
            assert (await sdk.responses.retrieve(response.id)).status in {"queued", "in_progress"}
        cancelled = await sdk.responses.with_raw_response.cancel(response.id)
        assert (cancelled.parse().status, cancelled.headers["x-gateway-backend"]) == ("cancelled", home)


async def test_a_stream_that_is_cut_off_goes_on_by_the_id_of_its_first_event(
    two: list[MockModel], start_gateway: StartGateway
) -> None:
    for mock in two:
        mock.set_faults([{"kind": "cut", "with": {"after_events": 8, "how": "reset"}, "match": {"path": PATH}}])
    gateway = await start_gateway(*two)
    async with gateway.sdk as sdk:
        seen = []
        stream = await sdk.responses.create(model="m", input="Hello", stream=True)
        with suppress(openai.APIError):
            async for event in stream:
                seen.append(event)  # noqa: PERF401
        assert seen[-1].type != "response.completed"
        response_id = seen[0].response.id  # type: ignore[union-attr]
        last = seen[-1].sequence_number
        home = gateway.parts.pool.responses.of(response_id)
        assert home is not None
        busy(gateway, name_of(gateway, home.replica))
        rest = [event async for event in await sdk.responses.retrieve(response_id, stream=True, starting_after=last)]
    numbers = [event.sequence_number for event in (*seen, *rest)]
    assert numbers == list(range(len(numbers)))
    assert rest[-1].type == "response.completed"


@pytest.mark.parametrize("heartbeat", [0, 3600])
async def test_nothing_may_be_left_of_a_stream(mock: MockModel, start_gateway: StartGateway, heartbeat: float) -> None:
    gateway = await start_gateway(mock, gateway_heartbeat=heartbeat)
    async with gateway.sdk as sdk:
        events = [event async for event in await sdk.responses.create(model="m", input="Hello", stream=True)]
        stream = await sdk.responses.retrieve(events[0].response.id, stream=True, starting_after=len(events))  # type: ignore[union-attr]
        assert [event async for event in stream] == []
    assert mock.journal.total == 2


async def test_the_home_alone_is_asked_and_its_failure_is_the_answer(
    two: list[MockModel], start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(*two, gateway_backoff_initial=0.001, gateway_breaker_failures=3)
    first = await made(gateway)
    names = [replica.name for replica in gateway.parts.pool.replicas]
    home, other = (two if home_of(first) == names[0] else two[::-1])[:2]
    before = other.journal.total
    home.die()
    for _ in range(3):
        answer = await call(gateway, "GET", f"{PATH}/{id_of(first)}")
        assert answer.status in {502, 503}
    chained = await call(gateway, "POST", PATH, {"model": "m", "input": "x", "previous_response_id": id_of(first)})
    assert (chained.status, chained.error["code"], chained.attempts) == (503, "backend_unavailable", 0)
    assert int(chained.headers["retry-after"]) >= 1
    assert other.journal.total == before
    assert (await made(gateway, "something else")).headers["x-gateway-backend"] != home_of(first)


async def test_a_home_that_restarts_costs_no_chain_an_error_while_others_use_its_sibling(
    two: list[MockModel], start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(*two, gateway_outage_wait=30, gateway_probe_path="")
    first = await made(gateway)
    home, other = two if home_of(first) == "backend-1" else two[::-1]
    home.set_faults([{"kind": "status", "with": {"status": 503}}])
    asking = asyncio.create_task(made(gateway, "And?", previous_response_id=id_of(first)))

    def asked() -> int:
        return sum(call.path == PATH for call in home.journal.calls)

    await until(lambda: asked() > 1)
    before = other.journal.total
    while asked() < 6:  # the first answer, three attempts, and trials after that
        assert (await gateway.chat()).status == 200
        await asyncio.sleep(0.01)
    assert other.journal.total > before
    home.set_faults([])
    answer = await asking
    assert home_of(answer) == home_of(first)
    assert answer.waits("bridging")


async def test_a_home_that_fails_once_is_asked_again(two: list[MockModel], start_gateway: StartGateway) -> None:
    gateway = await start_gateway(*two, gateway_backoff_initial=0.001)
    first = await made(gateway)
    for mock in two:
        mock.set_faults([{"kind": "status", "with": {"status": 500}, "times": 1}])
    read = await call(gateway, "GET", f"{PATH}/{id_of(first)}")
    assert (read.status, read.attempts, home_of(read)) == (200, 2, home_of(first))


async def test_after_a_restart_what_is_not_known_is_found_by_trying(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    """More replicas than attempts, and no budget for retries."""
    mocks = [await start_mock() for _ in range(6)]
    gateway = await start_gateway(*mocks, gateway_retry_budget=0, gateway_retry_floor=0)
    answers = [await made(gateway, str(number)) for number in range(8)]
    forget_all(gateway)
    for answer in answers:
        read = await call(gateway, "GET", f"{PATH}/{id_of(answer)}")
        assert (read.status, home_of(read), id_of(read)) == (200, home_of(answer), id_of(answer))
        assert (await call(gateway, "GET", f"{PATH}/{id_of(answer)}")).attempts == 1  # it is known now
    forget_all(gateway)
    for answer in answers:
        following = await made(gateway, "And?", previous_response_id=id_of(answer))
        assert home_of(following) == home_of(answer)
        assert (await made(gateway, "And then?", previous_response_id=id_of(following))).attempts == 1
    forget_all(gateway)
    for answer in answers:
        deleted = await call(gateway, "DELETE", f"{PATH}/{id_of(answer)}")
        assert (deleted.status, home_of(deleted)) == (200, home_of(answer))
    backends = (await gateway.health())["downstream"]["backends"]
    assert {(each["status"], each["consecutive_failures"], each["cooling_seconds"]) for each in backends} == {
        ("ok", 0, None)
    }


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"{PATH}/{UNKNOWN}"),
        ("DELETE", f"{PATH}/{UNKNOWN}"),
        ("POST", f"{PATH}/{UNKNOWN}/cancel"),
        ("POST", PATH),
    ],
)
async def test_what_nobody_knows_is_the_last_replicas_404(
    start_mock: StartMock, start_gateway: StartGateway, method: str, path: str
) -> None:
    mocks = [await start_mock() for _ in range(5)]
    gateway = await start_gateway(*mocks)
    body = {"model": "m", "input": "x", "previous_response_id": UNKNOWN} if path == PATH else None
    answer = await call(gateway, method, path, body)
    assert (answer.status, answer.attempts) == (404, 5)
    assert UNKNOWN in answer.error["message"]
    assert [mock.journal.total for mock in mocks] == [1] * 5
    assert "x-should-retry" not in answer.headers
    assert {replica.status for replica in gateway.parts.pool.replicas} == {"ok"}


@pytest.mark.parametrize(
    ("method", "path"), [("GET", f"{PATH}/{UNKNOWN}"), ("DELETE", f"{PATH}/{UNKNOWN}"), ("POST", PATH)]
)
async def test_what_one_that_could_not_be_asked_may_know_is_not_said_to_be_nowhere(
    two: list[MockModel], start_gateway: StartGateway, method: str, path: str
) -> None:
    gateway = await start_gateway(*two, gateway_probe_path="", gateway_breaker_failures=1, gateway_outage_wait=0)
    two[0].set_faults([{"kind": "status", "with": {"status": 500}, "times": 1}])
    busy(gateway, "backend-2")
    assert (await gateway.chat()).status == 200  # answered by the other one
    body = {"model": "m", "input": "x", "previous_response_id": UNKNOWN} if path == PATH else None
    before = two[0].journal.total
    answer = await call(gateway, method, path, body)
    assert (answer.status, answer.error["code"], answer.attempts) == (503, "backend_unavailable", 1)
    assert int(answer.headers["retry-after"]) >= 1
    assert "x-should-retry" not in answer.headers
    assert two[0].journal.total == before


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_the_failure_of_one_that_may_know_it_is_the_answer_whoever_was_asked_last(
    mock: MockModel, start_raw: StartRaw, start_gateway: StartGateway, tmp_path: Path, method: str
) -> None:
    own = b'{"error": {"message": "out of memory", "type": "server_error", "param": null, "code": "oom"}}'
    primary = await start_raw(lambda raw: raw.answer(own, status="500 Internal Server Error"))
    file = config(
        tmp_path,
        f"""
backends: {{primary: {{url: "{primary.url}"}}, secondary: {{url: "{mock.url}"}}}}
routes: [{{model: "*", targets: [{{backend: primary}}, {{backend: secondary}}]}}]
""",
    )
    gateway = await start_gateway(gateway_config=file, gateway_max_attempts=1)
    body = {"model": "m", "input": "x", "previous_response_id": UNKNOWN} if method == "POST" else None
    answer = await call(gateway, method, PATH if body else f"{PATH}/{UNKNOWN}", body)
    assert (answer.status, answer.body, answer.headers["x-should-retry"]) == (500, own, "false")
    assert (answer.attempts, answer.headers["x-gateway-backend"]) == (2, "primary")
    assert mock.journal.total == 1


async def test_openais_400_for_a_previous_response_is_tried_elsewhere(
    start_raw: StartRaw, start_mock: StartMock, start_gateway: StartGateway
) -> None:
    error = {
        "message": f"Previous response with id '{UNKNOWN}' not found.",
        "type": "invalid_request_error",
        "param": "previous_response_id",
        "code": "previous_response_not_found",
    }

    async def refuse(raw: RawCall) -> None:
        await raw.answer(json.dumps({"error": error}).encode(), status="400 Bad Request")

    backends = [await start_raw(refuse) for _ in range(3)]
    gateway = await start_gateway(*(backend.url for backend in backends))
    answer = await call(gateway, "POST", PATH, {"model": "m", "input": "x", "previous_response_id": UNKNOWN})
    assert (answer.status, answer.attempts, answer.error) == (400, 3, error)


async def test_a_failed_response_is_read_as_it_is(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    failed = {
        "id": "resp_1",
        "object": "response",
        "status": "failed",
        "error": {"code": "server_error", "message": "x"},
    }
    body = json.dumps(failed).encode()
    backend = await start_raw(lambda raw: raw.answer(body))
    gateway = await start_gateway(backend.url)
    read = await call(gateway, "GET", f"{PATH}/resp_1")
    assert (read.status, read.body, read.attempts) == (200, body, 1)


async def test_a_response_of_a_fallback_goes_on_there_with_its_model(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    primary, secondary = await start_mock(), await start_mock()
    file = config(
        tmp_path,
        f"""
backends:
  primary: {{url: "{primary.url}"}}
  secondary: {{url: "{secondary.url}"}}
routes:
  - model: m
    targets:
      - {{backend: primary, model: big}}
      - {{backend: secondary, model: small}}
      - {{backend: secondary, model: tiny}}
""",
    )
    gateway = await start_gateway(gateway_config=file, gateway_max_attempts=1)
    primary.set_faults([{"kind": "status", "with": {"status": 500}, "times": 1}])
    secondary.set_faults([{"kind": "status", "with": {"status": 500}, "times": 1, "match": {"model": "small"}}])
    first = await made(gateway)
    assert (home_of(first), first.attempts) == ("secondary", 3)
    second = await made(gateway, "And?", previous_response_id=id_of(first))
    assert (home_of(second), second.attempts) == ("secondary", 1)
    assert [each.model for each in secondary.journal.calls] == ["small", "tiny", "tiny"]
    read = await call(gateway, "GET", f"{PATH}/{id_of(second)}")
    assert (read.status, home_of(read)) == (200, "secondary")
    forget_all(gateway)
    read = await call(gateway, "GET", f"{PATH}/{id_of(second)}")
    assert (read.status, home_of(read), read.attempts) == (200, "secondary", 2)


async def test_a_model_that_does_not_go_to_the_home_goes_by_its_route(
    two: list[MockModel], start_gateway: StartGateway, tmp_path: Path
) -> None:
    file = config(
        tmp_path,
        f"""
backends: {{a: {{url: "{two[0].url}"}}, b: {{url: "{two[1].url}"}}}}
routes: [{{model: m, targets: [{{backend: a}}]}}, {{model: n, targets: [{{backend: b}}]}}]
""",
    )
    gateway = await start_gateway(gateway_config=file)
    first = await made(gateway)
    answer = await call(gateway, "POST", PATH, {"model": "n", "input": "x", "previous_response_id": id_of(first)})
    assert (answer.status, home_of(answer)) == (404, "b")


async def test_a_response_of_another_key_is_not_there(two: list[MockModel], start_gateway: StartGateway) -> None:
    gateway = await start_gateway(*two, gateway_api_keys=[KEY, "gw-key-2"])
    mine, other = {"authorization": f"Bearer {KEY}"}, {"authorization": "Bearer gw-key-2"}
    first = await made(gateway, headers=mine)
    total = sum(mock.journal.total for mock in two)
    path = f"{PATH}/{id_of(first)}"
    for method, place in (("GET", path), ("DELETE", path), ("POST", f"{path}/cancel")):
        answer = await call(gateway, method, place, **other)
        assert (answer.status, answer.error["code"], answer.attempts) == (404, "not_found", 0)
        assert (await call(gateway, method, place)).status == 401
        assert (await call(gateway, method, place.removeprefix("/v1"))).status == 401
    body = {"model": "m", "input": "x", "previous_response_id": id_of(first)}
    answer = await call(gateway, "POST", PATH, body, **other)
    assert (answer.status, answer.error["param"]) == (404, "previous_response_id")
    assert sum(mock.journal.total for mock in two) == total
    assert (await call(gateway, "GET", path, **mine)).status == 200

    forget_all(gateway)  # whoever finds it does not own it
    assert (await call(gateway, "GET", path, **other)).status == 200
    assert (await call(gateway, "GET", path, **mine)).status == 200


TWO_BACKENDS = """
backends: {{a: {{url: "{a}"}}, b: {{url: "{b}"}}}}
routes: [{{model: of-b, targets: [{{backend: b}}]}}, {{model: "*", targets: [{{backend: a}}, {{backend: b}}]}}]
"""


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_backend_takes_over_no_response_of_another_nor_a_key_of_another_key(
    start_raw: StartRaw,
    start_gateway: StartGateway,
    tmp_path: Path,
    streamed: bool,  # noqa: FBT001
) -> None:
    async def play(raw: RawCall) -> None:
        if b'"stream": true' not in raw.body and b'"stream":true' not in raw.body:
            await raw.answer(json.dumps(RESPONSE).encode())
            return
        await raw.send(STREAM_HEAD)
        event = {"type": "response.completed", "sequence_number": 0, "response": RESPONSE}
        await raw.events(b"event: response.completed\ndata: %b\n\n" % json.dumps(event).encode())
        await raw.send(END)

    a, b = await start_raw(play), await start_raw(play)  # b answers with the id that a has made
    file = config(tmp_path, TWO_BACKENDS.format(a=a.url, b=b.url))
    gateway = await start_gateway(gateway_config=file, gateway_api_keys=[KEY, "gw-key-2"])
    mine, other = {"authorization": f"Bearer {KEY}"}, {"authorization": "Bearer gw-key-2"}
    assert home_of(await made(gateway, headers=mine)) == "a"
    for headers in (mine, other):
        assert (await made(gateway, headers=headers, model="of-b", stream=streamed)).attempts == 1
    asked = len(b.calls)

    following = await made(gateway, "secret", headers=mine, previous_response_id="resp_1")
    read = await call(gateway, "GET", f"{PATH}/resp_1", **mine)
    assert (home_of(following), home_of(read), read.status) == ("a", "a", 200)
    assert (await call(gateway, "GET", f"{PATH}/resp_1", **other)).status == 404
    assert (await call(gateway, "DELETE", f"{PATH}/resp_1", **other)).status == 404
    assert (len(a.calls), len(b.calls)) == (3, asked)

    assert (await call(gateway, "DELETE", f"{PATH}/resp_1", **mine)).status == 200
    assert home_of(await made(gateway, headers=other, model="of-b")) == "b"
    assert home_of(await call(gateway, "GET", f"{PATH}/resp_1", **other)) == "b"


async def test_however_many_responses_a_key_makes_those_of_others_stay_theirs(
    two: list[MockModel], start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start_gateway(*two, gateway_api_keys=[KEY, "gw-key-2"])
    monkeypatch.setattr(gateway.parts.pool.responses, "_most", 3)
    mine, other = {"authorization": f"Bearer {KEY}"}, {"authorization": "Bearer gw-key-2"}
    first = await made(gateway, headers=mine)
    for number in range(6):
        await made(gateway, str(number), headers=other)

    assert len(gateway.parts.pool.responses) == 3
    assert (await call(gateway, "DELETE", f"{PATH}/{id_of(first)}", **other)).status == 404
    read = await call(gateway, "GET", f"{PATH}/{id_of(first)}", **mine)
    assert (read.status, home_of(read), read.attempts) == (200, home_of(first), 1)


async def test_no_more_homes_are_kept_than_the_bound(
    two: list[MockModel], start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start_gateway(*two)
    monkeypatch.setattr(gateway.parts.pool.responses, "_most", 3)
    answers = [await made(gateway, str(number)) for number in range(5)]
    homes = gateway.parts.pool.responses
    assert len(homes) == 3
    assert [homes.of(id_of(answer)) is not None for answer in answers] == [False, False, True, True, True]
    assert (await call(gateway, "GET", f"{PATH}/{id_of(answers[0])}")).status == 200


ODD_IDS = [
    *(
        "..",
        ".",
        "%2e%2e",
        "a%2Fb",
        "..%2f..%2fmodels",
        "..%2Fmodels",
        "%252e%252e%252fmodels",
        "a%5Cb",
        "a%3Fb",
        "a%23b",
    ),
    *("a%20b", "a%0d%0ax:%20y", "%00", "%ff", "ä", "x" * (response_homes.MAX_ID + 1)),
]


@pytest.mark.parametrize("odd", ODD_IDS)
async def test_an_id_leads_nowhere_else(mock: MockModel, start_gateway: StartGateway, odd: str) -> None:
    gateway = await start_gateway(mock)
    await listed(gateway)
    for method, path in (("GET", f"{PATH}/{odd}"), ("DELETE", f"/responses/{odd}"), ("POST", f"{PATH}/{odd}/cancel")):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.client.port)
        writer.write(f"{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode())
        raw = await reader.read()
        writer.close()
        assert raw.split(b" ")[1] in {b"400", b"404"}, raw
        assert b"x-gateway-attempts: 0" in raw.lower()
    assert mock.journal.total == 0


@pytest.mark.parametrize("path", ["/responses/a%2Fb", "/responses/a%2Fcancel", "/responses/..%2f..", "/responses/%ff"])
async def test_no_form_of_an_id_goes_without_a_key(mock: MockModel, start_gateway: StartGateway, path: str) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=[KEY])
    for method in ("GET", "DELETE"):
        async with aiohttp.request(method, URL(gateway.url + path, encoded=True)) as response:
            assert response.status == 401


async def test_an_id_goes_on_as_it_is(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    lines = []

    async def note(raw: RawCall) -> None:
        lines.append(raw.line)
        await raw.answer(b'{"id": "x", "object": "response"}')

    backend = await start_raw(note)
    gateway = await start_gateway(f"{backend.url}/base")
    odd = "resp_bGl0ZWxsbTo+==:a.b~c"
    async with gateway.sdk as sdk:
        await sdk.responses.retrieve(odd, include=["reasoning.encrypted_content"])
        await sdk.responses.cancel(odd)
        await sdk.responses.delete(odd)
    await call(gateway, "GET", f"/responses/{odd}?x=%5B2")
    place = f"/base/responses/{odd}"
    assert lines == [
        f"GET {place}?include%5B%5D=reasoning.encrypted_content HTTP/1.1",
        f"POST {place}/cancel HTTP/1.1",
        f"DELETE {place} HTTP/1.1",
        f"GET {place}?x=%5B2 HTTP/1.1",
    ]
    assert all("content-type" not in raw.headers and raw.body == b"" for raw in backend.calls)


async def test_what_is_told_of_these_calls_holds_no_id(two: list[MockModel], start_gateway: StartGateway) -> None:
    gateway = await start_gateway(*two)
    first = await made(gateway)
    total = Exposition.parse(await gateway.metrics()).by("gateway_tokens_total", "direction")
    for method, path in (("GET", ""), ("POST", "/cancel"), ("DELETE", ""), ("GET", "")):
        await call(gateway, method, f"{PATH}/{id_of(first)}{path}")
    document = await gateway.metrics()
    assert id_of(first) not in document
    assert Exposition.parse(document).by("gateway_tokens_total", "direction") == total
    assert f'route="{PATH}/{{id}}"' in document
    assert f'route="{PATH}/{{id}}/cancel"' in document
    assert id_of(first) not in gateway.log.getvalue()
    await until(lambda: sum(span.name.startswith("DELETE") for span in gateway.spans()) >= 2)
    spans = {span.name for span in gateway.spans()}
    assert {f"GET {PATH}/{{id}}", f"DELETE {PATH}/{{id}}", f"POST {PATH}/{{id}}/cancel"} <= spans
    for span in gateway.spans():
        assert id_of(first) not in str((span.attributes or {}).get("url.full"))


async def test_other_calls_below_responses_are_as_ever(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    assert (await get(gateway, f"{PATH}/resp_1/input_items")).error["code"] == "not_found"
    assert (await get(gateway, f"{PATH}/resp_1/cancel")).error["code"] == "method_not_allowed"
    assert (await get(gateway, f"{PATH}/")).error["code"] == "not_found"
    assert (await call(gateway, "PUT", f"{PATH}/resp_1")).error["code"] == "method_not_allowed"
    twice = await get(gateway, f"{PATH}/resp_1?stream=true&stream=false")
    assert (twice.status, twice.error["param"]) == (400, "stream")
    assert mock.journal.total == 0


@pytest.mark.parametrize("previous", [7, ["resp_1"], True])
async def test_a_previous_response_is_named_by_a_text(
    mock: MockModel, start_gateway: StartGateway, previous: object
) -> None:
    gateway = await start_gateway(mock)
    answer = await call(gateway, "POST", PATH, {"model": "m", "input": "x", "previous_response_id": previous})
    assert (answer.status, answer.error["param"]) == (400, "previous_response_id")
    for body in (
        b'{"input": "x", "previous_response_id": "a", "previous_response_id": "b"}',
        b'{"Previous_response_id": "a"}',
    ):
        async with gateway.client.post(PATH, data=body, headers={"content-type": "application/json"}) as response:
            answer = await Answer.of(response)
        assert (answer.status, answer.error["param"]) == (400, "previous_response_id")
    assert mock.journal.total == 0


async def test_chats_leave_nothing_behind(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    assert (await gateway.chat()).status == 200
    assert (await gateway.chat(stream=True)).status == 200
    assert len(gateway.parts.pool.responses) == 0


RESPONSE = {"id": "resp_1", "object": "response", "model": "m", "status": "completed", "output": []}
FAILED = RESPONSE | {"status": "failed", "error": {"code": "server_error", "message": "the model crashed"}}


@pytest.mark.parametrize("query", ["", "?stream=true", "?stream=true&starting_after=0"])
async def test_that_a_response_has_failed_is_no_failure_of_reading_it(
    start_raw: StartRaw, start_gateway: StartGateway, query: str
) -> None:
    events = (
        {"type": "response.created", "sequence_number": 0, "response": RESPONSE | {"status": "in_progress"}},
        {"type": "response.failed", "sequence_number": 1, "response": FAILED},
    )

    async def play(raw: RawCall) -> None:
        if not query:
            await raw.answer(json.dumps(FAILED).encode())
            return
        await raw.send(STREAM_HEAD)
        for event in events["starting_after" in query :]:
            await raw.events(b"event: %b\ndata: %b\n\n" % (str(event["type"]).encode(), json.dumps(event).encode()))
        await raw.send(END)

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url)
    for _ in range(6):
        answer = await call(gateway, "GET", f"{PATH}/resp_1{query}")
        assert (answer.status, answer.attempts, answer.cut) == (200, 1, False)
        assert b"the model crashed" in answer.body
    (replica,) = (await gateway.health())["downstream"]["backends"]
    assert (replica["breaker"], replica["consecutive_failures"]) == ("closed", 0)


@pytest.mark.parametrize("cools", ["POST", "GET"])
async def test_a_cooldown_of_generation_is_none_of_reading_and_the_reverse(
    start_raw: StartRaw, start_gateway: StartGateway, cools: str
) -> None:
    limited = {"error": {"message": "Rate limit reached", "type": "rate_limit_error", "param": None, "code": None}}

    async def play(raw: RawCall) -> None:
        if raw.number > 1 and raw.line.startswith(cools):
            await raw.answer(
                json.dumps(limited).encode(), status="429 Too Many Requests", headers="retry-after: 60\r\n"
            )
        else:
            await raw.answer(json.dumps(RESPONSE).encode())

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url)
    await made(gateway)
    create = {"model": "m", "input": "x"}
    cooling = await (call(gateway, "POST", PATH, create) if cools == "POST" else call(gateway, "GET", f"{PATH}/resp_1"))
    assert cooling.status == 429
    if cools == "GET":
        assert (await call(gateway, "POST", PATH, create)).status == 200
    else:
        assert (await call(gateway, "GET", f"{PATH}/resp_1")).status == 200
        assert (await call(gateway, "DELETE", f"{PATH}/resp_1")).status == 200
    assert (await call(gateway, "POST", PATH, create | {"model": "other"})).status == (200 if cools == "GET" else 429)


async def test_a_deletion_may_be_answered_without_content(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    async def play(raw: RawCall) -> None:
        if raw.line.startswith("DELETE"):
            await raw.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        else:
            await raw.answer(json.dumps(RESPONSE).encode())

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url)
    await made(gateway)
    answer = await call(gateway, "DELETE", f"{PATH}/resp_1")

    assert (answer.status, answer.body, answer.attempts) == (204, b"", 1)
    assert "content-type" not in answer.headers
    assert len(backend.calls) == 2


@pytest.mark.parametrize("path", ["/v1/responses/resp_1", "/responses/resp_1"])
async def test_only_get_and_delete_ask_for_a_response(
    two: list[MockModel], start_gateway: StartGateway, path: str
) -> None:
    gateway = await start_gateway(*two)
    async with gateway.client.head(path) as answer:
        assert (answer.status, answer.headers["allow"]) == (405, "DELETE,GET")
    assert [mock.journal.total for mock in two] == [0, 0]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>",
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
    ],
    ids=["500", "503", "a page", "no stream"],
)
async def test_what_is_said_about_invented_ids_opens_no_breaker(
    start_raw: StartRaw, start_gateway: StartGateway, answer: bytes
) -> None:
    async def play(raw: RawCall) -> None:
        await (raw.send(answer) if "/responses/" in raw.line else raw.answer())

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_outage_wait=0)
    for number in range(8):
        for method, path in (("GET", "?stream=true"), ("DELETE", ""), ("POST", "/cancel")):
            await call(gateway, method, f"{PATH}/resp_{number}{path}")
    (replica,) = (await gateway.health())["downstream"]["backends"]

    assert (replica["status"], replica["breaker"], replica["consecutive_failures"]) == ("ok", "closed", 0)
    assert (await gateway.chat()).attempts == 1


async def test_a_key_searches_only_at_backends_of_models_that_it_may_use(
    two: list[MockModel], start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ALL_KEY", "SOME_KEY", "NONE_KEY"):
        monkeypatch.setenv(name, name.lower())
    file = config(
        tmp_path,
        f"""
backends: {{a: {{url: "{two[0].url}"}}, b: {{url: "{two[1].url}"}}}}
routes: [{{model: m, targets: [{{backend: a}}]}}, {{model: secret, targets: [{{backend: b}}]}}]
keys:
  - {{name: all, key_env: ALL_KEY}}
  - {{name: some, key_env: SOME_KEY, models: [m]}}
  - {{name: none, key_env: NONE_KEY, models: [x]}}
""",
    )
    gateway = await start_gateway(gateway_config=file)
    everything, some, none = ({"authorization": f"Bearer {name}_key"} for name in ("all", "some", "none"))
    answer = await call(gateway, "POST", PATH, {"model": "secret", "input": "x"}, **everything)
    path = f"{PATH}/{id_of(answer)}"
    forget_all(gateway)

    assert (await call(gateway, "GET", path, **some)).status == 404
    assert [mock.journal.total for mock in two] == [1, 1]
    assert (await call(gateway, "GET", path, **none)).own_error["code"] == "not_found"
    assert (await call(gateway, "GET", path, **everything)).status == 200, "found by trying"
    asked = [mock.journal.total for mock in two]
    assert (await call(gateway, "GET", path, **some)).status == 404
    assert two[1].journal.total == asked[1]
