"""Calls with OpenAI's SDK for Python, as it is by default: with two retries of its own."""

from typing import Any

import openai
from pydantic import BaseModel

from tests.real.callers.serving import WEATHER, serve

TOOLS: Any = [{"type": "function", "function": WEATHER}]


class City(BaseModel):
    """A structured answer."""

    name: str


def sdk(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none")


def asked(prompt: str) -> Any:
    return [{"role": "user", "content": prompt}]


def called(message: Any) -> list[list[str]]:
    return [[call.function.name, call.function.arguments] for call in message.tool_calls or []]


def chat(url: str, prompt: str) -> Any:
    answer = sdk(url).chat.completions.create(model="tiny", messages=asked(prompt))
    return [answer.choices[0].message.content, answer.choices[0].finish_reason]


def stream(url: str, prompt: str) -> Any:
    events = sdk(url).chat.completions.create(model="tiny", messages=asked(prompt), stream=True)
    return "".join(choice.delta.content or "" for event in events for choice in event.choices)


def tools(url: str, prompt: str) -> Any:
    answer = sdk(url).chat.completions.create(model="tiny", messages=asked(prompt), tools=TOOLS, tool_choice="required")
    return called(answer.choices[0].message)


def streamed_tools(url: str, prompt: str) -> Any:
    with sdk(url).chat.completions.stream(model="tiny", messages=asked(prompt), tools=TOOLS) as events:
        final = events.get_final_completion()
    return called(final.choices[0].message)


def structured(url: str, prompt: str) -> Any:
    answer = sdk(url).chat.completions.parse(model="tiny", messages=asked(prompt), response_format=City)
    return answer.choices[0].message.parsed and answer.choices[0].message.parsed.model_dump()


def embeddings(url: str, prompt: str) -> Any:
    return sdk(url).embeddings.create(model="tiny", input=[prompt, "Again."]).model_dump()["data"]


def responses(url: str, prompt: str) -> Any:
    return sdk(url).responses.create(model="tiny", input=prompt).output_text


def streamed_responses(url: str, prompt: str) -> Any:
    events = sdk(url).responses.create(model="tiny", input=prompt, stream=True)
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def leave(url: str, prompt: str) -> Any:
    with sdk(url).chat.completions.create(model="tiny", messages=asked(prompt), stream=True) as events:
        for event in events:
            if event.choices and event.choices[0].delta.content:
                return event.choices[0].delta.content
    return None


if __name__ == "__main__":
    serve(
        {
            one.__name__: one
            for one in (
                chat,
                stream,
                tools,
                streamed_tools,
                structured,
                embeddings,
                responses,
                streamed_responses,
                leave,
            )
        }
    )
