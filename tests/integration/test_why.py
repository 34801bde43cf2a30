"""Ask why: for each way in which a backend fails and a request ends, the sentence that sums it up; the documents."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH
from testkit.http import Answer
from testkit.polling import until
from tests.integration.backends_raw import RawCall, StartRaw
from tests.integration.gateways import KEY, REFUSED, Gateway, StartGateway, StartMock, config, get, prefer, soon
from tests.integration.wire import dial, post, send

QUICK: dict[str, Any] = {"gateway_backoff_initial": 0.02, "gateway_backoff_max": 0.02}
HANG = {"kind": "hang_before_headers"}
SECRET = "the-words-of-the-prompt"
DURATION = re.compile(r"\b\d+(?:\.\d+)? (?:ms|s|min)\b(?: \d+ s)?")
TWICE = "no target gets more attempts than that"
NOBODY = "nobody else could be asked"
AFTER = "with part of the answer already sent"
RETRIED = (
    "Answered by backend-1 at the second attempt, in T (T in backoff, first token after T), "
    "after backend-1 answered 502."
)
BROKE_OFF = f"Broke off after T (first token after T), {AFTER}"
TOLD = "nothing can be retried at that point; the caller got the error as the last event"


def fault(kind: str, times: int | None = None, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"kind": kind, "with": parameters} | ({} if times is None else {"times": times})


async def document(gateway: Gateway, id_: str) -> dict[str, Any]:
    """What `GET /requests/{id}` says."""
    answer = await get(gateway, f"/requests/{id_}")
    assert answer.status == 200, answer.body
    assert SECRET.encode() not in answer.body
    found: dict[str, Any] = json.loads(answer.body)
    return found


async def why(gateway: Gateway, answer: Answer) -> str:
    """The sentence, with T in place of each duration."""
    text: str = (await document(gateway, answer.headers["x-request-id"]))["why"]
    return DURATION.sub("T", text)


async def listed(gateway: Gateway, query: str = "") -> list[dict[str, Any]]:
    answer = await get(gateway, f"/requests{query}")
    assert answer.status == 200, answer.body
    found: list[dict[str, Any]] = json.loads(answer.body)["requests"]
    return found


def failed(status: str, how: str, times: int = 2) -> str:
    """The sentence of a failure after so many attempts, and none for its kind."""
    attempts = f"after {times} attempts in T (T in backoff)" if times > 1 else "at the first attempt, in T"
    return f"Failed with {status} {attempts}: {how}."


def routes(folder: Path, targets: str, **backends: str) -> Path:
    lines = [f"  {name}: {{{text}}}" for name, text in backends.items()]
    text = "\n".join(["backends:", *lines, "routes:", f'  - {{model: "*", targets: [{targets}]}}', ""])
    return config(folder, text)


GOOD = "Answered by backend-1 at the first attempt, in T."
STREAMED = "Answered by backend-1 at the first attempt, in T (first token after T)."
INVALID = "502 (backend_invalid_response)"
TIMEOUT = "504 (backend_timeout)"


@pytest.mark.parametrize(
    ("faults", "whole", "streamed"),
    [
        ([], GOOD, STREAMED),
        *(
            (
                [fault("status", status=status)],
                *[failed(f"{status}", f"backend-1 answered {status} twice, and {TWICE}")] * 2,
            )
            for status in (408, 500, 502, 503, 504, 529)
        ),
        *(
            (
                [fault("status", status=status)],
                *[failed(f"{status}", f"backend-1 answered {status}, and asking again would not have changed that", 1)]
                * 2,
            )
            for status in (400, 413, 422, 501)
        ),
        (
            [fault("status", status=429, headers={"retry-after": "20"})],
            *[
                failed(
                    "429",
                    "backend-1 answered 429 and asked to be left alone for T, "
                    "and nobody else could answer in the time that a request may wait",
                    1,
                )
            ]
            * 2,
        ),
        (
            [fault("overload", capacity=0, queue=0, retry_after=30)],
            *[
                failed(
                    "503",
                    "backend-1 answered 503 and asked to be left alone for T, "
                    "and nobody else could answer in the time that a request may wait",
                    1,
                )
            ]
            * 2,
        ),
        *(
            (
                [fault("status", status=status)],
                *[
                    failed(
                        "502 (backend_auth_error)", f"backend-1 refused the gateway's key ({status}), and {NOBODY}", 1
                    )
                ]
                * 2,
            )
            for status in (401, 403)
        ),
        (
            [fault("status", 1, status=502)],
            "Answered by backend-1 at the second attempt, in T (T in backoff), after backend-1 answered 502.",
            RETRIED,
        ),
        (
            [fault("latency", delay=0.01)],
            GOOD,
            STREAMED,
        ),
        (
            [HANG],
            failed(TIMEOUT, f"backend-1 did not answer within T, and {NOBODY}", 1),
            failed(TIMEOUT, f"backend-1 sent no content within T, and {NOBODY}", 1),
        ),
        (
            [fault("hang_after_headers")],
            failed(TIMEOUT, f"backend-1 stopped in the middle of its answer for T, and {NOBODY}", 1),
            failed(TIMEOUT, f"backend-1 sent no content within T, and {NOBODY}", 1),
        ),
        (
            [fault("slow_first_token", delay=30)],
            failed(TIMEOUT, f"backend-1 stopped in the middle of its answer for T, and {NOBODY}", 1),
            failed(TIMEOUT, f"backend-1 sent no content within T, and {NOBODY}", 1),
        ),
        (
            [fault("stall", after_events=3)],
            failed(TIMEOUT, f"backend-1 stopped in the middle of its answer for T, and {NOBODY}", 1),
            f"{BROKE_OFF}: backend-1 stopped in the middle of its answer for T, and {TOLD}.",
        ),
        *(
            (
                [fault("cut", after_events=5, how=how, where=where)],
                failed(INVALID, f"backend-1's answer was {unread} (twice), and {TWICE}"),
                f"{BROKE_OFF}: backend-1's {what} was cut off, and {TOLD}.",
            )
            for how, where, unread, what in (
                ("reset", "between", "cut off", "answer"),
                ("reset", "inside_event", "cut off", "answer"),
                ("end", "between", "not JSON", "stream"),
            )
        ),
        (
            [fault("cut", after_events=0, how="end")],
            failed(INVALID, f"backend-1's answer was not JSON (twice), and {TWICE}"),
            failed(INVALID, f"backend-1's stream was cut off (twice), and {TWICE}"),
        ),
        ([fault("no_done")], GOOD, STREAMED),
        (
            [fault("malformed_event", after_events=4)],
            GOOD,
            f"{BROKE_OFF}: backend-1 sent an event whose data was not JSON, and {TOLD}.",
        ),
        (
            [fault("error_event", after_events=4)],
            GOOD,
            f"{BROKE_OFF}: backend-1 sent an error event, and {TOLD}.",
        ),
        (
            [fault("error_event", after_events=0)],
            GOOD,
            failed("502", f"backend-1 sent an error (502) inside a 200 (twice), and {TWICE}"),
        ),
        *(
            (
                [fault(kind, None, **({"value": "text/html"} if kind == "content_type" else {}))],
                failed(INVALID, f"backend-1's answer was not {whole} (twice), and {TWICE}"),
                failed(INVALID, f"backend-1's answer was not text/event-stream (twice), and {TWICE}"),
            )
            for kind, whole in (
                ("html", "application/json"),
                ("content_type", "application/json"),
                ("not_json", "JSON"),
            )
        ),
        (
            [fault("short_body", bytes=10)],
            *[failed(INVALID, f"backend-1's answer was cut off (twice), and {TWICE}")] * 2,
        ),
        ([fault("drip", bytes=200, interval=0.001)], GOOD, STREAMED),
        ([fault("pings", count=2, interval=0.01)], GOOD, STREAMED),
        (
            [fault("reset")],
            *[
                failed(
                    "502 (backend_connection_error)",
                    f"backend-1 closed the connection before answering (twice), and {TWICE}",
                )
            ]
            * 2,
        ),
    ],
    ids=lambda value: (
        value[0]["kind"] + str(value[0]["with"].get("status", "")) if value and "with" in value[0] else ""
    ),
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_each_fault_is_told_in_one_sentence(
    start_mock: StartMock,
    start_gateway: StartGateway,
    faults: list[dict[str, Any]],
    whole: str,
    streamed: str,
    *,
    stream: bool,
) -> None:
    mock = await start_mock(mock_token_interval=0.005)
    limits = soon(faults[0]["kind"], stream=stream) if faults else {}
    gateway = await start_gateway(mock, gateway_max_attempts=2, **QUICK, **limits)
    mock.set_faults(faults)
    answer = await gateway.chat(stream=stream, messages=[{"role": "user", "content": SECRET}])
    assert await why(gateway, answer) == (streamed if stream else whole)


async def test_a_refused_connection_and_a_name_without_an_address(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(REFUSED, **QUICK)
    told = "after 3 attempts in T (T in backoff): backend-1 refused the connection (three times)"
    text = await why(gateway, await gateway.chat())
    assert text == f"Failed with 502 (backend_connection_error) {told}, and no target gets more attempts than that."
    gateway = await start_gateway("http://nowhere.invalid", gateway_max_attempts=1)
    text = await why(gateway, await gateway.chat())
    assert "the host name of backend-1 could not be resolved, and no target gets more attempts than that." in text


async def test_a_fallback_names_who_failed_and_how(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    primary, secondary = await start_mock(), await start_mock()
    file = routes(
        tmp_path,
        "{backend: primary}, {backend: secondary, model: small}, {backend: third}",
        primary=f'url: "{primary.url}", timeouts: {{answer: 0.3}}',
        secondary=f'url: "{secondary.url}"',
        third=f'url: "{REFUSED}"',
    )
    gateway = await start_gateway(gateway_config=file, **QUICK)
    primary.set_faults([fault("status", 1, status=502), HANG])
    answer = await gateway.chat()
    assert await why(gateway, answer) == (
        "Answered by secondary at the third attempt, in T (T in backoff), "
        "after primary answered 502, then did not answer within T."
    )
    found = await document(gateway, answer.headers["x-trace-id"])
    assert [(each["backend"], each["model"], each["tried"], each["why_not"]) for each in found["targets"]] == [
        ("primary", "demo-model", True, None),
        ("secondary", "small", True, None),
        ("third", "demo-model", False, "not needed"),
    ]
    assert [entry["kind"] for entry in found["timeline"]] == ["attempt", "backoff", "attempt", "attempt"]
    assert [each["decision"] for each in found["attempts_made"]] == ["retry", "fallback", "answered"]


async def test_an_open_breaker_is_told_of_targets_and_of_replicas(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    first, second, spare = await start_mock(), await start_mock(), await start_mock()
    file = routes(
        tmp_path,
        "{backend: primary}, {backend: spare}",
        primary=f'urls: ["{first.url}", "{second.url}"]',
        spare=f'url: "{spare.url}"',
    )
    settings = QUICK | {"gateway_breaker_failures": 1, "gateway_breaker_open_seconds": 60, "gateway_probe_path": ""}
    gateway = await start_gateway(gateway_config=file, **settings)
    first.set_faults([fault("status", status=502)])
    prefer(gateway, "primary-1")
    assert (await gateway.chat()).status == 200
    for replica in gateway.parts.pool.replicas:
        replica.in_flight = 0
    answer = await gateway.chat()
    assert await why(gateway, answer) == (
        "Answered by primary-2 at the first attempt, in T; "
        "primary-1 was passed over because its circuit breaker was open."
    )
    replicas = (await document(gateway, answer.headers["x-request-id"]))["targets"][0]["replicas"]
    assert [(each["name"], each["why_not"]) for each in replicas] == [("primary-1", "breaker"), ("primary-2", None)]
    second.set_faults([fault("status", status=502)])
    assert (await gateway.chat()).status == 200
    assert await why(gateway, await gateway.chat()) == (
        "Answered by spare at the first attempt, in T; primary was passed over because its circuit breaker was open."
    )
    spare.set_faults([fault("status", status=502)])
    await gateway.chat()
    assert await why(gateway, await gateway.chat()) == (
        "Refused with 503 (backend_unavailable) after T, without an attempt: "
        "primary and spare were passed over because their circuit breakers were open."
    )


async def test_a_draw_by_weight_is_told(start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path) -> None:
    mock = await start_mock()
    backends = dict.fromkeys(("old", "new"), f'url: "{mock.url}"')
    targets = "{backend: old, weight: 0}, {backend: new, weight: 3}"
    gateway = await start_gateway(gateway_config=routes(tmp_path, targets, **backends))
    answer = await gateway.chat()
    assert await why(gateway, answer) == (
        "Answered by new at the first attempt, in T; new was drawn first, by its weight of 3."
    )
    found = await document(gateway, answer.headers["x-request-id"])
    assert [(each["backend"], each["weight"], each["drawn"], each["why_not"]) for each in found["targets"]] == [
        ("new", 3, True, None),
        ("old", 0, False, "weight"),
    ]


async def test_waits_for_the_end_of_an_outage_and_of_a_cooldown_are_told(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_outage_wait=5, **QUICK)
    mock.set_faults([fault("status", 4, status=503)])
    text = await why(gateway, await gateway.chat())
    assert text == (
        "Answered by backend-1 at the fifth attempt, in T "
        "(T waiting for the end of backend's outage, T in backoff), after backend-1 answered 503 four times."
    )
    mock.set_faults([fault("status", 1, status=429, headers={"retry-after-ms": "50"})])
    text = await why(gateway, await gateway.chat(user="another"))
    assert text == (
        "Answered by backend-1 at the second attempt, in T (T waiting for the end of backend's cooldown), "
        "after backend-1 answered 429 and asked to be left alone for T."
    )
    mock.set_faults([fault("status", status=429, headers={"retry-after": "60"})])
    await gateway.chat(user="a third")
    assert await why(gateway, await gateway.chat(user="a fourth")) == (
        "Refused with 429 (backend_rate_limited) after T, without an attempt: "
        "backend was passed over because it had asked to be left alone."
    )


async def test_a_target_that_only_repeats_a_refusal_comes_last_which_is_told(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    first, second = await start_mock(), await start_mock()
    backends = {"first": f'url: "{first.url}"', "second": f'url: "{second.url}"'}
    file = routes(tmp_path, "{backend: first}, {backend: second}", **backends)
    gateway = await start_gateway(gateway_config=file, gateway_max_attempts=1)
    first.set_faults([fault("status", status=429, body={"error": {"code": "insufficient_quota"}})])
    assert await why(gateway, await gateway.chat()) == (
        "Answered by second at the second attempt, in T, after first answered 429 (the account's quota was spent)."
    )
    answer = await gateway.chat()
    reason = "because it had failed or refused requests a short time before"
    assert await why(gateway, answer) == (
        f"Answered by second at the first attempt, in T; first was passed over {reason}."
    )
    found = await document(gateway, answer.headers["x-request-id"])
    assert [(each["backend"], each["why_not"]) for each in found["targets"]] == [("first", "avoided"), ("second", None)]
    second.set_faults([fault("status", status=502)])
    text = await why(gateway, await gateway.chat())
    assert text.endswith(f"; first was passed over at first {reason}."), text


@pytest.mark.parametrize(
    ("status", "error", "meaning"),
    [
        (400, {"code": "context_length_exceeded"}, "the prompt was too long for the model"),
        (404, {"code": "model_not_found", "type": "invalid_request_error"}, "it had no such model"),
        (404, None, "it had no such path"),
        (402, {"message": "Payment required"}, "the account's quota was spent"),
    ],
    ids=["context", "model", "path", "quota"],
)
async def test_what_an_error_answer_means_is_told_where_that_decided_what_followed(
    mock: MockModel, start_gateway: StartGateway, status: int, error: dict[str, str] | None, meaning: str
) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([fault("status", status=status, body={"error": error} if error else {"detail": "x"})])
    assert f": backend-1 answered {status} ({meaning}), and " in await why(gateway, await gateway.chat())


async def test_a_cooldown_that_used_up_the_attempts_is_not_said_to_last_too_long(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_max_attempts=2)
    mock.set_faults([fault("status", status=429, headers={"retry-after-ms": "20"})])
    assert await why(gateway, await gateway.chat()) == (
        "Failed with 429 after 2 attempts in T (T waiting for the end of backend's cooldown): "
        f"backend-1 answered 429 and asked to be left alone for T (twice), and {TWICE}."
    )


async def test_the_queue_a_full_gateway_and_a_full_backend_are_told(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_max_queue=1, gateway_queue_timeout=60)
    mock.set_faults([HANG])
    first = asyncio.create_task(gateway.chat(headers={"x-request-id": "first"}))
    await mock.called(1)
    second = asyncio.create_task(gateway.chat(headers={"x-request-id": "second"}))
    await until(lambda: gateway.parts.admission.queued == 1)
    assert DURATION.sub("T", (await document(gateway, "first"))["why"]) == (
        "Under way for T: backend-1 has been asked T ago and has not answered yet."
    )
    found = await document(gateway, "second")
    assert DURATION.sub("T", found["why"]) == "Under way for T: it waits in the queue."
    assert (found["outcome"], found["status"]) == ("in_flight", None)
    assert {each["request_id"] for each in await listed(gateway, "?outcome=in_flight")} == {"first", "second"}
    text = await why(gateway, await gateway.chat())
    assert text == (
        "Refused with 503 (gateway_overloaded) after T, without an attempt: "
        "every slot was taken, and the queue was full."
    )
    await mock.reset()
    await asyncio.gather(first, second)
    assert DURATION.sub("T", (await document(gateway, "second"))["why"]) == (
        "Answered by backend-1 at the first attempt, in T (T in the queue)."
    )
    targets, backend = "{backend: small}", f'url: "{mock.url}", max_in_flight: 1'
    gateway = await start_gateway(gateway_config=routes(tmp_path, targets, small=backend), gateway_queue_timeout=0.05)
    mock.set_faults([HANG])
    before = mock.journal.total
    first = asyncio.create_task(gateway.chat())
    await mock.called(before + 1)
    assert await why(gateway, await gateway.chat()) == (
        "Refused with 503 (gateway_overloaded) after T (T waiting for a free place at small), without an attempt: "
        "every backend that could answer was full (max_in_flight)."
    )
    await mock.reset()
    await first


async def test_the_deadline_is_told_wherever_it_passed(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_queue_timeout=60, **QUICK)
    mock.set_faults([fault("status", 1, status=502), HANG])
    first = asyncio.create_task(gateway.chat(headers={"x-request-timeout": "3"}))
    await mock.called(2)
    queued = await gateway.chat(headers={"x-request-timeout": "0.5"})
    assert await why(gateway, queued) == (
        "Failed with 504 (deadline_exceeded) after T (T in the queue), without an attempt: "
        "the deadline passed while the request was queued."
    )
    assert await why(gateway, await first) == (
        "Failed with 504 (deadline_exceeded) after 2 attempts in T (T in backoff): backend-1 answered 502, "
        "and then the deadline passed while backend-1 was being asked."
    )


async def test_limits_of_a_key_are_told_by_its_name(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM_KEY", KEY)
    text = f"""
backends: {{backend: {{url: "{mock.url}"}}}}
routes: [{{model: "*", targets: [{{backend: backend}}]}}]
keys: [{{name: team-a, key_env: TEAM_KEY, models: [demo-model], limits: {{requests_per_minute: 2, max_in_flight: 1}}}}]
"""
    gateway = await start_gateway(gateway_config=config(tmp_path, text), gateway_queue_timeout=20)
    key = {"authorization": f"Bearer {KEY}"}
    mock.set_faults([HANG])
    first = asyncio.create_task(gateway.chat(headers=key))
    await mock.called(1)
    second = asyncio.create_task(gateway.chat(headers=key | {"x-request-id": "second"}))
    await until(lambda: gateway.parts.admission.queued == 1)
    found = await document(gateway, "second")
    assert (
        DURATION.sub("T", found["why"])
        == "Under way for T: it waits in the queue for the limit max_in_flight of its key."
    )
    assert [(entry["kind"], entry["end"]) for entry in found["timeline"]] == [("limit", None)]
    await mock.reset()
    await asyncio.gather(first, second)
    found = await document(gateway, "second")
    assert (found["caller"], found["limit"]) == ("team-a", "max_in_flight")
    third = await gateway.chat(headers=key)
    assert await why(gateway, third) == (
        "Refused with 429 (rate_limit_exceeded) after T: "
        "of team-a's requests_per_minute (2) 0 were left, and this request needed 1."
    )
    other = await gateway.chat(headers=key, model="gpt-9")
    assert (await why(gateway, other)).startswith(
        "Refused with 403 (model_not_allowed), and not forwarded: this key may not use the model 'gpt-9'"
    )
    stranger = await gateway.chat(headers={"authorization": "Bearer another"})
    assert await why(gateway, stranger) == "Refused with 401 (invalid_api_key): it carried no valid gateway key."
    assert {each["request_id"] for each in await listed(gateway, "?caller=team-a&outcome=ok")} == {
        (await first).headers["x-request-id"],
        "second",
    }


async def test_the_callers_own_mistakes_are_told(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    for answer, text in (
        (await gateway.chat(messages=7), "Refused with 400 (invalid_request), and not forwarded: "),
        (await send(gateway, post(b"{")), "Refused with 400 (invalid_json), and not forwarded: the body is not"),
        (
            await get(gateway, "/v1/models/none"),
            "Refused with 404 (model_not_found), and not forwarded: there is no model",
        ),
        (
            await get(gateway, CHAT_PATH),
            "Refused with 405 (method_not_allowed), and not forwarded: this path allows POST.",
        ),
        (
            await get(gateway, "/nothing"),
            "Refused with 404 (not_found), and not forwarded: there is nothing at this path",
        ),
    ):
        low = {name.lower(): value for name, value in answer.headers.items()}
        found = await document(gateway, low["x-request-id"])
        assert found["why"].startswith(text), found["why"]
    assert await why(gateway, await get(gateway, "/v1/models")) == "Answered by the gateway itself, in T."


async def test_a_caller_who_left_is_told(start_mock: StartMock, start_gateway: StartGateway) -> None:
    mock = await start_mock(mock_token_interval=30)
    gateway = await start_gateway(mock)

    async def leave(name: str, *, stream: bool) -> str:
        async with dial(gateway.url) as caller:
            body = json.dumps(CHAT | {"stream": stream}).encode()
            await caller.send(post(body, {"x-request-id": name}))
            if stream:
                await caller.head()
                await caller.some(20)
            else:
                await mock.called(mock.journal.total + 1)
        await until(lambda: bool(gateway.parts.kept_requests.find(name)))
        return DURATION.sub("T", (await document(gateway, name))["why"])

    mock.set_faults([HANG])
    assert await leave("silent", stream=False) == "The caller left after T, while backend-1 was being asked."
    mock.set_faults([])
    text = await leave("streaming", stream=True)
    assert text == "The caller left after T (first token after T), while backend-1 was sending its answer."
    gateway = await start_gateway(mock, gateway_backoff_initial=60, gateway_backoff_max=60)
    mock.set_faults([fault("status", status=502)])
    async with dial(gateway.url) as caller:
        await caller.send(post(headers={"x-request-id": "in-backoff"}))
        await until(lambda: any(each.attempts and each.attempt.ended for each in gateway.parts.in_flight))
    await until(lambda: bool(gateway.parts.kept_requests.find("in-backoff")))
    assert DURATION.sub("T", (await document(gateway, "in-backoff"))["why"]) == (
        "The caller left after T, before the request was sent again, after backend-1 answered 502."
    )


async def test_a_stop_is_told(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([HANG])
    task = asyncio.create_task(gateway.chat())
    await mock.called(1)
    gateway.parts.in_flight.cut_off()
    assert await why(gateway, await task) == (
        "Failed with 503 (gateway_draining) at the first attempt, in T: "
        "the gateway was stopped while backend-1 was being asked."
    )
    gateway.parts.admission.drain()
    assert await why(gateway, await gateway.chat()) == (
        "Refused with 503 (gateway_draining) after T, without an attempt: the gateway was stopping."
    )


async def test_a_heartbeat_is_no_part_of_an_answer(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_heartbeat=0.05, gateway_first_token_timeout=1)
    mock.set_faults([HANG])
    assert await why(gateway, await gateway.chat(stream=True)) == (
        "Broke off after T, with only heartbeats already sent: backend-1 sent no content within T, "
        "and nobody else could be asked; the caller got the error as the last event."
    )


async def test_words_of_a_backend_and_of_the_prompt_are_nowhere(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_capture_content=True, gateway_max_attempts=1)
    mock.set_faults([fault("status", 1, status=500, body={"error": {"message": SECRET, "code": SECRET}})])
    messages = [{"role": "user", "content": SECRET}]
    for _ in range(2):
        answer = await gateway.chat(messages=messages)
        await document(gateway, answer.headers["x-request-id"])  # looks for the words
    assert all(kept.record.input_text is None for kept in gateway.parts.kept_requests.newest())
    await until(lambda: any(SECRET in str(span.attributes) for span in gateway.spans()))


async def test_the_list_is_filtered_and_paged(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    one, two = await start_mock(), await start_mock()
    text = f"""
backends: {{one: {{url: "{one.url}"}}, two: {{urls: ["{two.url}", "{two.url}/v1"]}}}}
routes: [{{model: small, targets: [{{backend: one}}]}}, {{model: "*", targets: [{{backend: two, model: large}}]}}]
"""
    gateway = await start_gateway(gateway_config=config(tmp_path, text))
    names = [f"number-{number}" for number in range(7)]
    for number, name in enumerate(names):
        model = "small" if number % 2 else "other"
        assert (await gateway.chat(model=model, headers={"x-request-id": name})).status == 200
    one.set_faults([fault("status", status=400)])
    await gateway.chat(model="small", headers={"x-request-id": "wrong"})

    async def ids(query: str) -> list[str]:
        return [each["request_id"] for each in await listed(gateway, query)]

    assert await ids("") == ["wrong", *reversed(names)]
    assert await ids("?outcome=&route=&limit=3") == ["wrong", "number-6", "number-5"]
    assert await ids("?outcome=backend_error") == ["wrong"]
    assert await ids("?route=small") == ["wrong", "number-5", "number-3", "number-1"]
    assert await ids("?model=large") == await ids("?route=*") == await ids("?backend=two")
    assert await ids("?backend=one&outcome=ok") == ["number-5", "number-3", "number-1"]
    assert sorted(await ids("?backend=two-1") + await ids("?backend=two-2")) == names[::2]
    assert await ids("?slower_than=100") == await ids("?caller=team-a") == []
    assert len(await ids("?slower_than=0")) == 8
    started = {each["request_id"]: each["started"] for each in await listed(gateway)}
    assert len(await ids("?since=2026-01-01")) == 8
    assert await ids("?since=2126-01-01T00:00:00%2B01:00") == []
    assert set(await ids(f"?since={started['number-4']}")) >= {"number-5", "number-6", "wrong"}
    seen, page = [], "?limit=3"
    while page:
        document = json.loads((await get(gateway, f"/requests{page}")).body)
        assert document["kept"] == 8
        seen += [each["request_id"] for each in document["requests"]]
        page = f"?limit=3&before={document['next']}" if document["next"] else ""
    assert seen == ["wrong", *reversed(names)]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("limit=-1", "limit"),
        ("limit=%D9%A3", "limit"),
        ("before=x", "before"),
        ("before=" + "9" * 5000, "before"),
        ("slower_than=x", "slower_than"),
        ("slower_than=nan", "slower_than"),
        ("slower_than=-1", "slower_than"),
        ("since=yesterday", "since"),
        ("since=10000-01-01", "since"),
        ("since=2026-01-01T99", "since"),
        ("key=secret", "key"),
        ("outcome=ok&outcome=ok", "outcome"),
    ],
)
async def test_a_wrong_filter_is_named(mock: MockModel, start_gateway: StartGateway, query: str, param: str) -> None:
    gateway = await start_gateway(mock)
    answer = await get(gateway, f"/requests?{query}")
    assert (answer.status, answer.error["param"]) == (400, param)


async def test_odd_ids_are_found_and_unknown_ones_are_not(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    for name in ("a/b/../c", "100%", "%2e%2e", "?x=1#y", "<script>", "a;b|c&d", "x" * 128):
        assert (await gateway.chat(headers={"x-request-id": name})).status == 200
        quoted = "".join(f"%{byte:02x}" for byte in name.encode())
        assert (await document(gateway, quoted))["request_id"] == name
    for name in ("unknown", "%00", "%ff", "..%2f..%2fetc", "y" * 4000):
        answer = await get(gateway, f"/requests/{name}")
        assert (answer.status, answer.error["code"]) == (404, "not_found")
    twice = [await gateway.chat(headers={"x-request-id": "twice"}) for _ in range(2)]
    found = await document(gateway, "twice")
    assert found["trace_id"] == twice[1].headers["x-trace-id"]
    assert [each["trace_id"] for each in found["others_with_this_id"]] == [twice[0].headers["x-trace-id"]]


async def test_what_is_passed_through_and_breaks_off_is_told(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    async def play(call: RawCall) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ncontent-length: 100\r\n\r\nsound")
        call.close()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_probe_path="")
    body = json.dumps({"model": "tts", "input": "hello", "voice": "x"}).encode()
    headers = {"x-request-id": "sound"}
    async with dial(gateway.url) as caller:
        await caller.send(post(body, headers).replace(CHAT_PATH.encode(), b"/v1/audio/speech"))
        await caller.rest()
    await until(lambda: bool(gateway.parts.kept_requests.find("sound")))
    assert DURATION.sub("T", (await document(gateway, "sound"))["why"]) == (
        f"Broke off after T, {AFTER}: backend-1's answer was cut off, and nothing can be retried at that point."
    )
