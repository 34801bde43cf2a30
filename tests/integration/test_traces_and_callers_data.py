"""What callers and backends send is in spans only where it may be: names, ids, texts, numbers."""

import asyncio
import json
import uuid
from typing import Any

import pytest
from multidict import CIMultiDict

from testkit.polling import until
from tests.integration.gateways import Gateway
from tests.integration.traced import CALLER, CALLER_SPAN, CALLER_TRACE, SECRET, Stack, StartStack, spans_of_all

# Names that come from outside


async def raw(gateway: Gateway, request: bytes) -> bytes:
    """Send bytes as they are; the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.client.port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


async def test_no_span_is_named_by_a_caller(start_stack: StartStack) -> None:
    stack = await start_stack()
    requests = [
        b"FOOBAR /v1/chat/completions HTTP/1.1\r\n",
        b"BREW / HTTP/1.1\r\n",
        b"PROPFIND /v1/chat/completions HTTP/1.1\r\n",
        b"UNSUBSCRIBE / HTTP/1.1\r\n",
        b"GET /v1/models/attacker-1 HTTP/1.1\r\n",
        b"GET /v1/models/%ff%fe HTTP/1.1\r\n",
        b"GET /v1/models/\xff\xfe HTTP/1.1\r\n",
        b"GET /attacker-2?attacker-3 HTTP/1.1\r\n",
        b"POST //v1/chat/completions HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nattacker-4\r\n",
    ]
    for request in requests:
        head = await raw(stack.gateway, request + b"Host: attacker\r\nConnection: close\r\n\r\n")
        assert head.split()[1].startswith(b"4"), (request, head)
    spans = await spans_of_all(stack, len(requests))

    assert {span.name for span in spans} <= {
        "HTTP",
        "HTTP /",
        "HTTP /v1/chat/completions",
        "GET",
        "GET /v1/models/{id}",
        "POST",
    }
    assert {span.attributes["http.request.method"] for span in spans} == {"_OTHER", "GET", "POST"}
    assert not [body for body in stack.collector.bodies if b"attacker" in body]


@pytest.mark.parametrize(
    "hostile", [b"\xff\xfe\xed\xa0\x80", b"a" * 129, b"a b", b"\x7f", "é".encode(), b"", "\u202e".encode()]
)
async def test_a_request_id_that_is_not_visible_ascii_is_replaced_everywhere(
    start_stack: StartStack, hostile: bytes
) -> None:
    stack = await start_stack()
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}]}).encode()
    answer = await raw(
        stack.gateway,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nx-request-id: " + hostile + b"\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body,
    )
    head, _, rest = answer.partition(b"\r\n\r\n")
    spans = await spans_of_all(stack, 1)

    if head.split()[1] != b"200":  # what no header may hold is malformed HTTP
        assert head.split()[1] == b"400", head
        assert json.loads(rest)["error"]["code"] == "invalid_request"
        return
    (span,) = spans
    ours = span.attributes["gateway.request_id"]
    assert (str(uuid.UUID(ours)), uuid.UUID(ours).version) == (ours, 4)
    assert f"x-request-id: {ours}".encode() in head
    assert stack.mock.journal.calls[0].request_id == ours


@pytest.mark.parametrize(
    "traceparent",
    [
        "garbage",
        f"00-{CALLER_TRACE}-{CALLER_SPAN}",
        f"00-{CALLER_TRACE}-{CALLER_SPAN}-01-more",
        f"ff-{CALLER_TRACE}-{CALLER_SPAN}-01",
        f"00-{CALLER_TRACE.upper()}-{CALLER_SPAN}-01",
        f"00-{'0' * 32}-{CALLER_SPAN}-01",
        f"00-{CALLER_TRACE}-{'0' * 16}-01",
        f"00-+{CALLER_TRACE[1:]}-{CALLER_SPAN}-01",
    ],
)
async def test_a_malformed_traceparent_begins_a_new_trace(start_stack: StartStack, traceparent: str) -> None:
    stack = await start_stack()
    answer, trace = await stack.chat(headers={"traceparent": traceparent})

    assert answer.status == 200
    assert trace.server.parent_id == ""
    assert trace.server.trace_id not in traceparent.lower()


async def test_the_state_of_a_trace_goes_on_with_it_and_not_with_another(start_stack: StartStack) -> None:
    stack = await start_stack()
    _, joined = await stack.chat(headers={**CALLER, "tracestate": "vendor=abc"})
    _, begun = await stack.chat(headers={"traceparent": "nonsense", "tracestate": "vendor=abc"})

    assert {span.trace_state for span in joined.spans} == {"vendor=abc"}
    assert {span.trace_state for span in begun.spans} == {""}


@pytest.mark.parametrize("lines", [1, 2])
@pytest.mark.parametrize(("size", "kept"), [(512, True), (513, False)])
async def test_a_state_of_more_than_512_characters_is_dropped(
    start_stack: StartStack, lines: int, size: int, *, kept: bool
) -> None:
    stack = await start_stack()
    states = ["v=" + "x" * 254, "w=" + "x" * (size - 259)]
    state = ",".join(states)
    headers = CIMultiDict([*CALLER.items(), *(("tracestate", each) for each in (states if lines == 2 else [state]))])
    answer, trace = await stack.chat(headers=headers)

    assert answer.status == 200
    assert {span.trace_state for span in trace.spans} == ({state} if kept else {""})


async def test_a_later_version_of_traceparent_is_joined(start_stack: StartStack) -> None:
    stack = await start_stack()
    _, trace = await stack.chat(headers={"traceparent": f"cc-{CALLER_TRACE}-{CALLER_SPAN}-01-what-comes"})

    assert trace.server.trace_id == CALLER_TRACE
    assert trace.server.parent_id == CALLER_SPAN


async def test_probes_and_scrapes_are_not_traced(start_stack: StartStack) -> None:
    stack = await start_stack()
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        async with stack.gateway.client.get(path, headers=CALLER) as response:
            assert response.status == 200
        async with stack.gateway.client.post(path, headers=CALLER) as response:
            assert response.status == 405
    async with stack.gateway.client.get("/v1/models") as response:
        assert response.status == 200
    spans = await spans_of_all(stack, 1)

    assert [span.name for span in spans] == ["GET /v1/models"]


# Texts


async def tell_secrets(stack: Stack) -> list[str]:
    """Send a secret in every way that a request can go; the texts of the answers."""
    texts = []
    prompt = {"messages": [{"role": "user", "content": SECRET}]}
    faults: list[list[dict[str, Any]]] = [
        [],
        [{"kind": "status", "with": {"status": 400, "body": {"error": {"message": SECRET, "code": SECRET}}}}],
        [{"kind": "status", "with": {"status": 500, "body": SECRET}}],
        [{"kind": "status", "with": {"status": 200, "body": {"error": {"message": SECRET}}}}],
        [{"kind": "not_json"}],
        [{"kind": "cut", "with": {"after_events": 4}}],
        [{"kind": "malformed_event", "with": {"after_events": 4}}],
    ]
    for fault in faults:
        for stream in (False, True):
            stack.mock.set_faults(fault)
            answer = await stack.gateway.chat(stream=stream, headers={"connection": "close"}, **prompt)
            if not fault and not stream:
                texts.append(json.loads(answer.body)["choices"][0]["message"]["content"])
    stack.mock.set_faults([])
    for bad in ({"messages": SECRET}, {"messages": [{"role": SECRET, "content": 1}], "n": SECRET}, {"model": 1}):
        await stack.gateway.chat(**{**prompt, **bad})
    for path in ("/v1/completions", "/v1/embeddings", "/v1/responses"):
        await stack.gateway.chat(path=path, prompt=SECRET, input=SECRET)
    async with stack.gateway.client.post(
        "/v1/chat/completions", data=f'{{"messages": [{SECRET}', headers={"content-type": "application/json"}
    ) as response:
        assert response.status == 400
    async with stack.gateway.client.post(f"/v1/{SECRET}?{SECRET}", headers={"authorization": f"Bearer {SECRET}"}):
        pass
    return texts


async def test_no_text_of_a_prompt_or_an_answer_is_in_spans_or_logs(
    start_stack: StartStack, caplog: pytest.LogCaptureFixture
) -> None:
    stack = await start_stack(gateway_breaker_failures=1000, gateway_max_attempts=2)
    (text,) = await tell_secrets(stack)
    await spans_of_all(stack, 22)
    await until(lambda: stack.gateway.log.getvalue().count("\n") >= 22)
    seen = b"".join(stack.collector.bodies) + stack.gateway.log.getvalue().encode() + caplog.text.encode()

    assert SECRET.encode() not in seen
    assert SECRET.rsplit(maxsplit=1)[-1].encode() not in seen
    assert text.encode() not in seen
    health = json.dumps(await stack.gateway.health())
    assert SECRET not in health + await stack.gateway.metrics()


async def test_texts_are_on_the_server_span_where_capturing_is_on(start_stack: StartStack) -> None:
    stack = await start_stack(gateway_capture_content=True)
    prompt = {"messages": [{"role": "user", "content": SECRET}]}
    plain, unstreamed = await stack.chat(**prompt)
    events, streamed = await stack.chat(stream=True, **prompt)

    chunks = [json.loads(event[6:]) for event in events.body.split(b"\n\n")[:-2]]
    text = json.loads(plain.body)["choices"][0]["message"]["content"]
    for trace, answer in (
        (unstreamed, text),
        (streamed, "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)),
    ):
        assert json.loads(trace.server.attributes["gen_ai.input.messages"]) == [
            {"role": "user", "parts": [{"type": "text", "content": SECRET}]}
        ]
        assert len(answer) > 20
        assert json.loads(trace.server.attributes["gen_ai.output.messages"]) == [
            {"role": "assistant", "parts": [{"type": "text", "content": answer}], "finish_reason": "stop"}
        ]
        assert SECRET not in str(trace.attempts[0].attributes)
    assert SECRET not in stack.gateway.log.getvalue()


async def test_captured_texts_are_bounded(start_stack: StartStack) -> None:
    stack = await start_stack(gateway_capture_content=True, mock_settings={"mock_tokens": 20_000})
    for stream in (False, True):
        _, trace = await stack.chat(stream=stream, messages=[{"role": "user", "content": "x" * 100_000}])

        for name in ("gen_ai.input.messages", "gen_ai.output.messages"):
            (message,) = json.loads(trace.server.attributes[name])
            assert len(message["parts"][0]["content"]) == 16_384


async def test_what_a_backend_says_about_its_answer_is_bounded(start_stack: StartStack) -> None:
    stack = await start_stack()
    long = "x" * 100_000
    body = {"id": long, "model": long, "choices": [{"index": 0, "finish_reason": long}], "usage": {}}
    stack.mock.set_faults([{"kind": "status", "with": {"status": 200, "body": body}}])
    answer, trace = await stack.chat()

    assert answer.status == 200
    assert max(len(str(value)) for value in trace.server.attributes.values()) < 1000


@pytest.mark.parametrize("tokens", [-5, 2**70, 10**400])
async def test_absurd_token_counts_of_a_backend_cost_nothing_but_themselves(
    start_stack: StartStack, tokens: int
) -> None:
    stack = await start_stack()
    body = json.dumps(
        {"id": "x", "model": "m", "choices": [], "usage": {"prompt_tokens": tokens, "completion_tokens": 3}}
    )
    headers = {"content-type": "application/json"}
    stack.mock.set_faults([{"kind": "status", "with": {"status": 200, "body": body, "headers": headers}}])
    answer, trace = await stack.chat()

    assert answer.status == 200
    assert trace.tree[0] == "SERVER 200 ok, unset"
    assert "gen_ai.usage.input_tokens" not in trace.server.attributes
    assert trace.server.attributes["gen_ai.usage.output_tokens"] == 3
    assert 'gateway_tokens_total{direction="output"} 3.0' in await stack.gateway.metrics()
    await until(lambda: '"output_tokens":3' in stack.gateway.log.getvalue())


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
async def test_absurd_numbers_of_a_caller_are_not_falsified(start_stack: StartStack, value: int) -> None:
    stack = await start_stack()
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": value})
    async with stack.gateway.client.post(
        "/v1/chat/completions", data=body, headers={"content-type": "application/json"}
    ) as response:
        assert response.status in {200, 400}, "a matter of the backend's taste"
    (span,) = await spans_of_all(stack, 1)

    assert span.attributes.get("gen_ai.request.max_tokens") in {None, str(value)}
