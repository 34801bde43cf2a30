"""A gateway and its mock models whose spans one collector gets."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from mock_model.serve import MockModel
from testkit.http import Answer
from testkit.polling import until
from testkit.traces import Span, Trace
from tests.integration.collector import Collector
from tests.integration.gateways import Gateway

CALLER_TRACE, CALLER_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"}
SECRET = "a secret nobody may read"
LONG = 3600.0


class Stack:
    """A gateway and its mock models, all of them exporting to one collector."""

    def __init__(self, gateway: Gateway, collector: Collector, mocks: list[MockModel]) -> None:
        self.gateway = gateway
        self.collector = collector
        self.mocks = mocks

    @property
    def mock(self) -> MockModel:
        """The first mock model."""
        return self.mocks[0]

    async def chat(self, **changes: Any) -> tuple[Answer, Trace]:  # noqa: ANN401
        """Post a chat prompt; its answer and its whole trace."""
        before = self._calls()
        answer = await self.gateway.chat(**changes)
        return answer, await self.trace_of(answer.headers, calls=self._calls() - before)

    async def trace_of(self, headers: Any, *, calls: int) -> Trace:  # noqa: ANN401
        """The trace that an answer names, with the spans of so many calls of mock models."""
        spans = 1 + int(headers["x-gateway-attempts"]) + calls
        return await self.collector.trace(headers["x-trace-id"], spans=spans)

    def _calls(self) -> int:
        return sum(mock.journal.total for mock in self.mocks)


StartStack = Callable[..., Awaitable[Stack]]


def routes(folder: Path, primary: str, secondary: str) -> Path:
    """A configuration with one route over two targets of one replica each."""
    config = {
        "backends": {"primary": {"url": primary}, "secondary": {"url": secondary}},
        "routes": [{"model": "*", "targets": [{"backend": "primary"}, {"backend": "secondary"}]}],
    }
    file = folder / "routes.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


async def spans_of_all(stack: Stack, requests: int) -> list[Span]:
    """The SERVER spans of so many requests."""

    def servers() -> list[Span]:
        return [span for span in stack.collector.spans if span.kind == "SERVER" and span.service == "gateway"]

    await until(lambda: len(servers()) >= requests, lambda: f"{len(servers())} of {requests} SERVER spans came")
    return servers()
