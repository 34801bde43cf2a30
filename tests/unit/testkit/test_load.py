"""The load: how calls are sent, what is made of their answers, and the worker behind it."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from chaos.load import Plan as TextPlan
from chaos.load import expecting
from mock_model.draws import fingerprint
from mock_model.text import Writer
from testkit.caller import Lag
from testkit.completions import CHAT_PATH, EMBEDDINGS_PATH
from testkit.load import Call, Load, Plan, good, sent_between, summary
from testkit.polling import until
from testkit.ports import free_port
from testkit.processes import ProcessError
from testkit.workers import Worker

Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[str]]
ECHO = "tests.unit.testkit.echo"
ANSWER = {"object": "chat.completion", "choices": [{"message": {"content": "words"}}]}
ERROR = {"error": {"message": "m", "type": "server_error", "param": None, "code": "backend_unavailable"}}


@pytest.fixture
async def serve(aiohttp_server: Callable[..., Awaitable[TestServer]]) -> Serve:
    """Serve every prompt by a handler; the url."""

    async def start(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> str:
        app = web.Application()
        app.router.add_post("/{path:.*}", handler)
        return str((await aiohttp_server(app)).make_url("")).rstrip("/")

    return start


def explained(request: web.Request, tries: str = 'attempt-1;desc="b ok";dur=1.0') -> dict[str, str]:
    attempts = str(tries.count("attempt-"))
    return {"x-request-id": request.headers["x-request-id"], "x-gateway-attempts": attempts, "server-timing": tries}


async def answer(request: web.Request) -> web.Response:
    return web.json_response(ANSWER, headers=explained(request))


async def loaded(*plans: Plan) -> list[Call]:
    """The calls of plans that end by themselves."""
    async with Load(*plans) as load:
        await load.all_sent(30)
    return load.calls


async def test_calls_are_sent_at_a_rate_and_each_is_told(serve: Serve) -> None:
    bodies: list[Any] = []

    async def keep(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        return await answer(request)

    plan = Plan(urls=[await serve(keep)], rate=50, seed=3, prefix="p", total=10, kinds=("answer",), characters=300)
    calls = await loaded(plan)
    assert sorted(call.id for call in calls) == [f"p-3-{number}" for number in range(10)]
    assert summary(calls) == {"200 ok": 10}
    assert all(call.flaw is None and call.seconds > 0 for call in calls)
    assert [(one.backend, one.outcome) for one in calls[0].tries] == [("b", "ok")]
    assert {len(body["messages"][0]["content"]) for body in bodies} == {300}
    due = sorted(call.started - call.late for call in calls)
    assert [at - due[0] for at in due] == pytest.approx([number / 50 for number in range(10)])
    assert min(call.late for call in calls) > -0.01, "the loop's timers are whole milliseconds"
    assert len(good(calls)) == 10
    started = sorted(call.started for call in calls)
    assert sent_between(calls, started[0], started[-1]) != calls


async def test_callers_make_one_call_after_the_other(serve: Serve) -> None:
    at_once = most = 0
    all_there = asyncio.Event()

    async def slowly(request: web.Request) -> web.Response:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        if at_once == 3:
            all_there.set()
        await all_there.wait()
        await asyncio.sleep(0.01)
        at_once -= 1
        return await answer(request)

    url = await serve(slowly)
    async with Load(Plan(urls=[url], callers=3, seed=1, kinds=("answer",), keep_alive=True)) as load:
        await load.until(lambda calls: len(calls) >= 30, 30)
    assert most == 3
    assert {call.outcome for call in load.calls} == {"ok"}


async def test_several_plans_are_sent_side_by_side_and_need_not_be_kept(serve: Serve) -> None:
    url = await serve(answer)
    seen: list[Call] = []
    plans = [Plan(urls=[url], rate=50, seed=1, prefix=name, total=5, kinds=("answer",)) for name in ("a", "b")]
    load = Load(*plans, on_call=seen.append, keep=False)
    async with load:
        await load.all_sent(30)
    assert load.calls == []
    assert {call.id[0] for call in seen} == {"a", "b"}


def test_a_plan_has_either_a_rate_or_callers() -> None:
    with pytest.raises(ValueError, match="either a rate or callers"):
        Plan(urls=[], seed=1)
    with pytest.raises(ValueError, match="either a rate or callers"):
        Plan(urls=[], seed=1, rate=1, callers=1)


async def one(url: str, **plan: Any) -> Call:  # noqa: ANN401
    (call,) = await loaded(Plan(urls=[url], rate=10, seed=1, total=1, **({"kinds": ("answer",)} | plan)))
    return call


async def test_an_error_is_told_by_its_code_and_who_made_it(serve: Serve) -> None:
    async def own(request: web.Request) -> web.Response:
        return web.json_response(ERROR, status=503, headers=explained(request, ""))

    async def passed_on(request: web.Request) -> web.Response:
        error = {"error": ERROR["error"] | {"code": "their_own"}}
        return web.json_response(error, status=503, headers=explained(request, 'attempt-1;desc="b status_503";dur=1.0'))

    assert ((await one(await serve(own))).outcome, (await one(await serve(passed_on))).outcome) == (
        "backend_unavailable",
        "backend_error",
    )


async def test_what_a_caller_must_never_see_is_a_flaw(serve: Serve) -> None:
    async def other_id(request: web.Request) -> web.Response:
        return web.json_response(ANSWER, headers=explained(request) | {"x-request-id": "another"})

    async def miscounted(request: web.Request) -> web.Response:
        return web.json_response(ANSWER, headers=explained(request) | {"x-gateway-attempts": "2"})

    async def no_document(request: web.Request) -> web.Response:
        return web.json_response({"oops": 1}, status=500, headers=explained(request))

    async def nothing(request: web.Request) -> web.Response:
        return web.json_response({"choices": []}, headers=explained(request))

    async def reset(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    flaws = {
        handler.__name__: (await one(await serve(handler))).flaw
        for handler in (other_id, miscounted, no_document, nothing, reset)
    }
    assert flaws["other_id"] == "another call's x-request-id"
    assert flaws["miscounted"] == "x-gateway-attempts and server-timing differ"
    assert "500 without an error document" in str(flaws["no_document"])
    assert "a wrong answer" in str(flaws["nothing"])
    assert flaws["reset"]


def streaming(*events: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=explained(request) | {"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            if event == CUT:
                assert request.transport is not None
                request.transport.close()
            else:
                await response.write(f"data: {event}\n\n".encode())
        return response

    return stream


CUT = "cut"
"""The body ends here, and not as it should."""
WORD = json.dumps({"choices": [{"index": 0, "delta": {"content": "word "}}]})


@pytest.mark.parametrize(
    ("events", "outcome", "flaw"),
    [
        ((WORD, WORD, "[DONE]"), "ok", None),
        ((WORD, "[DONE]", CUT), "broken", "the connection broke"),
        ((WORD, json.dumps(ERROR), CUT), "backend_unavailable", None),
        ((WORD, json.dumps(ERROR)), "backend_unavailable", "a proper end after an error event"),
        ((WORD,), "broken", "a stream that just ends"),
        ((WORD, CUT), "broken", "the connection broke"),
        ((json.dumps(ERROR), WORD, CUT), "backend_unavailable", "an event after the error"),
        ((json.dumps(ERROR | {"type": "error"}), CUT), "backend_unavailable", "an error event of another API"),
    ],
)
async def test_a_stream_is_judged_by_its_end(
    serve: Serve, events: tuple[str, ...], outcome: str, flaw: str | None
) -> None:
    call = await one(await serve(streaming(*events)), kinds=("stream",))
    assert call.outcome == outcome
    assert (call.flaw or "").startswith(flaw or "")
    assert bool(call.flaw) == bool(flaw)
    assert call.first is not None


async def test_callers_leave_in_a_stream_or_before_an_answer(serve: Serve) -> None:
    async def never(_request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    in_stream = await one(await serve(streaming(*[WORD] * 10, "[DONE]")), kinds=("stream",), leave_after=2)
    assert (in_stream.outcome, in_stream.events) == ("left", 2)
    before = await one(await serve(never), leave_before=0.1)
    assert (before.outcome, before.status) == ("left", None)
    assert before.seconds >= 0.09, "the loop's timers are whole milliseconds"


async def test_a_gateway_that_drains_or_is_gone_is_passed_over(serve: Serve) -> None:
    async def draining(request: web.Request) -> web.Response:
        error = {"error": ERROR["error"] | {"code": "gateway_draining"}}
        return web.json_response(error, status=503, headers=explained(request, ""))

    urls = [f"http://127.0.0.1:{free_port()}", await serve(draining), await serve(answer)]
    (call,) = await loaded(Plan(urls=urls, rate=10, seed=1, total=1, kinds=("answer",)))
    assert (call.outcome, call.gateway, call.drained) == ("ok", 2, 1)
    assert (await one(urls[0])).outcome == "refused"


async def test_callers_retry_as_the_sdks_do(serve: Serve) -> None:
    seen: list[str] = []

    async def busy(request: web.Request) -> web.Response:
        seen.append(request.headers["x-request-id"])
        return web.json_response(ERROR, status=503, headers=explained(request, "") | {"retry-after": "0.01"})

    plan = Plan(urls=[await serve(busy)], rate=10, seed=1, total=1, kinds=("answer",), sdk_retries=2)
    calls = await loaded(plan)
    assert [call.id for call in calls] == seen == ["chaos-1-0", "chaos-1-0-again-1", "chaos-1-0-again-2"]


async def test_embeddings_are_an_answer(serve: Serve) -> None:
    async def numbers(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"embedding": [0.5]}]}, headers=explained(request))

    call = await one(await serve(numbers), path=EMBEDDINGS_PATH)
    assert (call.outcome, call.flaw) == ("ok", None)


def test_the_chaos_suite_knows_the_right_text() -> None:
    plan = TextPlan(urls=[], rate=1, seed=1, mock_seed=7, mock_tokens=4)
    body = b'{"messages": []}'
    assert expecting(plan)(body) == Writer(7, 4).write(fingerprint(CHAT_PATH, body), 0, None).text
    assert expecting(TextPlan(urls=[], rate=1, seed=1))(body) is None


async def test_a_worker_reports_until_it_is_to_finish() -> None:
    async with Worker(ECHO, b"order") as worker:
        results = worker.results()
        assert [await anext(results), await anext(results)] == [b"order\n", b"order\n"]
        worker.finish()
        assert [line async for line in results] == [b"finished\n"]


async def test_a_worker_that_fails_is_an_error() -> None:
    with pytest.raises(ProcessError, match=f"{ECHO} did not begin"):
        async with Worker(ECHO, b"refuse"):
            pass
    async with Worker(ECHO, b"fail") as worker:
        with pytest.raises(ProcessError, match=f"{ECHO} ended with exit code 4"):
            _ = [line async for line in worker.results()]


async def test_a_worker_that_is_left_early_is_killed() -> None:
    async with Worker(ECHO, b"order") as worker:
        process = worker._process
        assert process.returncode is None
    await until(lambda: process.returncode is not None)


def test_what_keeps_the_load_from_running_counts_though_it_kept_its_timer_from_it_too() -> None:
    lag, call = Lag(), Call(id="1", kind="answer", started=time.monotonic())
    time.sleep(0.05)
    call.ended = time.monotonic()

    assert 0.03 < lag.of(call, []) <= time.monotonic() - call.started
