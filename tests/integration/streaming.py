"""Streams: what is asked for, how it fails, and a caller who reads one event by event."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from openai.types.chat import ChatCompletionMessageParam

from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH, MESSAGES_PATH, RESPONSES_PATH, prompt
from testkit.http import Answer, rest_of
from testkit.polling import PATIENCE, until
from testkit.sse import DONE
from tests.integration.backends_raw import chunk, event
from tests.integration.gateways import Gateway

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say something."}]
RESPONSE = {"model": "demo-model", "input": "Say something."}
MESSAGE = prompt(MESSAGES_PATH)
QUICK: dict[str, Any] = {"gateway_backoff_initial": 0}
SHORT = 0.3
ROLE, WORD, FINISH = chunk(), chunk("word "), chunk(finish="stop")
USAGE = event({"id": "raw", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}})
OWN_ERROR = event({"error": {"message": "Out of memory.", "type": "server_error", "param": None, "code": "oom"}})
WHOLE = ROLE + WORD + FINISH + DONE


def named_event(kind: str, **fields: Any) -> bytes:  # noqa: ANN401
    """An event of Anthropic's messages."""
    return event({"type": kind, **fields}, name=kind)


def of_block(kind: str, **fields: Any) -> bytes:  # noqa: ANN401
    """A delta of a block of a message."""
    return named_event("content_block_delta", index=0, delta={"type": kind, **fields})


START = named_event("message_start", message={"id": "msg_1", "model": "m", "usage": {"input_tokens": 3}})
PING = named_event("ping")
SIGNATURE = of_block("signature_delta", signature="x")
THOUGHT, SAID = of_block("thinking_delta", thinking="hm"), of_block("text_delta", text="word ")
END_OF_TURN = named_event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 2})
MESSAGE_STOP = named_event("message_stop")
WHOLE_MESSAGE = START + PING + SAID + END_OF_TURN + MESSAGE_STOP


def fault(kind: str, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"kind": kind, "with": parameters} if parameters else {"kind": kind}


BROKEN_MESSAGES = [
    *(
        fault("cut", after_events=6, how=how, where=where)
        for how in ("end", "reset")
        for where in ("between", "inside_event", "inside_character")
    ),
    fault("malformed_event", after_events=6),
    fault("no_done"),
    fault("no_finish"),
    fault("short_body"),
]
"""Ends of a message after its first words. Unlike a chat's it is not whole before its last event."""


class Caller:
    """One who reads a stream event by event; `cut`: its body did not end properly."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.cut = False

    async def next(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.response.content.readuntil(b"\n\n")

    async def rest(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            body, self.cut = await rest_of(self.response)
            return body


@asynccontextmanager
async def streaming(gateway: Gateway, path: str = CHAT_PATH) -> AsyncIterator[Caller]:
    async with gateway.client.post(path, json=prompt(path, stream=True)) as response:
        yield Caller(response)


async def straight(mock: MockModel, path: str, body: dict[str, Any]) -> bytes:
    """What the mock model says without a gateway; leaves no trace in its journal."""
    async with aiohttp.ClientSession() as session, session.post(mock.url + path, json=body) as response:
        answer = await response.read()
    mock.journal.clear()
    return answer


async def chat_straight(mock: MockModel, **changes: Any) -> bytes:  # noqa: ANN401
    return await straight(mock, "/v1/chat/completions", CHAT | {"stream": True} | changes)


async def respond(gateway: Gateway, **changes: Any) -> Answer:  # noqa: ANN401
    """A streamed prompt to `/v1/responses`."""
    return await send(gateway, RESPONSES_PATH, **{"stream": True, **changes})


async def send(gateway: Gateway, path: str, **changes: Any) -> Answer:  # noqa: ANN401
    """A prompt to any API; `headers` are the request's."""
    headers = changes.pop("headers", {})
    async with gateway.client.post(path, json=prompt(path, **changes), headers=headers) as response:
        return await Answer.of(response)


def once(failing: dict[str, Any]) -> dict[str, Any]:
    return failing | {"times": 1}


def named(failing: dict[str, Any]) -> str:
    return " ".join([failing["kind"], *map(str, failing.get("with", {}).values())])


async def settled(gateway: Gateway) -> None:
    """Wait until nothing is under way; nothing is held then."""
    parts = gateway.parts
    await until(lambda: not len(parts.in_flight))
    assert (parts.admission.in_flight, parts.admission.queued, parts.byte_budget.held) == (0, 0, 0)


LATE = [
    *(
        fault("cut", after_events=4, how=how, where=where)
        for how in ("end", "reset")
        for where in ("between", "inside_event", "inside_character")
    ),
    fault("malformed_event", after_events=4),
    fault("no_finish"),
    fault("short_body"),
]
