"""Calls with Anthropic's SDK for Python, as it is by default: with two retries of its own."""

from typing import Any

import anthropic

from tests.real.callers.serving import WEATHER, serve

TOOL: Any = {
    "name": WEATHER["name"],
    "description": WEATHER["description"],
    "input_schema": WEATHER["parameters"],
}


def messages(url: str) -> anthropic.resources.Messages:
    return anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none").messages


def asked(prompt: str) -> Any:
    return {"model": "tiny", "max_tokens": 64, "messages": [{"role": "user", "content": prompt}]}


def called(message: Any) -> Any:
    return [[block.name, block.input] for block in message.content if block.type == "tool_use"]


def chat(url: str, prompt: str) -> Any:
    answer = messages(url).create(**asked(prompt))
    return ["".join(block.text for block in answer.content if block.type == "text"), answer.stop_reason]


def stream(url: str, prompt: str) -> Any:
    with messages(url).stream(**asked(prompt)) as events:
        return "".join(events.text_stream)


def tools(url: str, prompt: str) -> Any:
    return called(messages(url).create(**asked(prompt), tools=[TOOL], tool_choice={"type": "any"}))


def streamed_tools(url: str, prompt: str) -> Any:
    with messages(url).stream(**asked(prompt), tools=[TOOL], tool_choice={"type": "any"}) as events:
        return called(events.get_final_message())


def count_tokens(url: str, prompt: str) -> Any:
    return messages(url).count_tokens(model="tiny", messages=[{"role": "user", "content": prompt}]).input_tokens


def leave(url: str, prompt: str) -> Any:
    with messages(url).stream(**asked(prompt)) as events:
        for text in events.text_stream:
            if text:
                return text
    return None


if __name__ == "__main__":
    serve({one.__name__: one for one in (chat, stream, tools, streamed_tools, count_tokens, leave)})
