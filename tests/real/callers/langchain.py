"""Calls with LangChain's `ChatOpenAI` and `OpenAIEmbeddings`, as they are by default."""

from typing import Any

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from tests.real.callers.serving import WEATHER, serve


class City(BaseModel):
    """A structured answer."""

    name: str


def model(url: str) -> Any:
    return ChatOpenAI(base_url=url, api_key="none", model="tiny")


def chat(url: str, prompt: str) -> Any:
    answer = model(url).invoke(prompt)
    return [answer.content, answer.response_metadata["finish_reason"]]


def stream(url: str, prompt: str) -> Any:
    return "".join(piece.content for piece in model(url).stream(prompt))


def tools(url: str, prompt: str) -> Any:
    answer = model(url).bind_tools([WEATHER], tool_choice="weather").invoke(prompt)
    return [[call["name"], call["args"]] for call in answer.tool_calls]


def structured(url: str, prompt: str) -> Any:
    return model(url).with_structured_output(City).invoke(prompt).model_dump()


def embeddings(url: str, prompt: str) -> Any:
    embedder = OpenAIEmbeddings(base_url=url, api_key="none", model="tiny", check_embedding_ctx_length=False)
    return embedder.embed_documents([prompt, "Again."])


def leave(url: str, prompt: str) -> Any:
    pieces = model(url).stream(prompt)
    for piece in pieces:
        if piece.content:
            pieces.close()
            return piece.content
    return None


if __name__ == "__main__":
    serve({one.__name__: one for one in (chat, stream, tools, structured, embeddings, leave)})
