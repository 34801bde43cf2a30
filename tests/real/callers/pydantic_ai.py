"""Calls with Pydantic AI's agents, as they are by default."""

import asyncio
from typing import Any

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.real.callers.serving import serve


class City(BaseModel):
    """A structured answer."""

    name: str


def model(url: str) -> OpenAIChatModel:
    return OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=url, api_key="none"))


def chat(url: str, prompt: str) -> Any:
    return Agent(model(url)).run_sync(prompt).output


def stream(url: str, prompt: str) -> Any:
    async def read() -> str:
        async with Agent(model(url)).run_stream(prompt) as answer:
            return "".join([piece async for piece in answer.stream_text(delta=True, debounce_by=None)])

    return asyncio.run(read())


def tools(url: str, prompt: str) -> Any:
    """An answer in the arguments of a tool call, which is its default for structured ones."""
    return Agent(model(url), output_type=City).run_sync(prompt).output.model_dump()


def structured(url: str, prompt: str) -> Any:
    return Agent(model(url), output_type=NativeOutput(City)).run_sync(prompt).output.model_dump()


def leave(url: str, prompt: str) -> Any:
    async def read() -> str | None:
        async with Agent(model(url)).run_stream(prompt) as answer:
            async for piece in answer.stream_text(delta=True, debounce_by=None):
                return str(piece)
        return None

    return asyncio.run(read())


if __name__ == "__main__":
    serve({one.__name__: one for one in (chat, stream, tools, structured, leave)})
