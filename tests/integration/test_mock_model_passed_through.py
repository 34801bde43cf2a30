# ruff: noqa: ANN401
"""Sound, images, moderations, ranks, scores and tokens of the mock model, as the SDK and plain clients see them."""

import io
import json
import wave
import zlib
from base64 import b64decode
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from mock_model.serve import MockModel
from mock_model.settings import Settings
from mock_model.speech import PIECE, RATE, SAMPLE

TOKENS = 4
SPEECH = {"model": "tts", "input": "hello", "voice": "alloy", "response_format": "wav"}
PIECES = "/v1/audio/speech"
TRANSCRIPTIONS = "/v1/audio/transcriptions"
SOUND = b"RIFF\r\n--\x00\xff" * 1000


@pytest.fixture
async def mock() -> AsyncIterator[MockModel]:
    fast: Any = {"mock_ttft": 0, "mock_token_interval": 0, "mock_tokens": TOKENS}
    async with MockModel(Settings(port=0, control_port=0, **fast)) as running:
        yield running


@pytest.fixture
async def client(mock: MockModel) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{mock.url}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
async def http(mock: MockModel) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(mock.url, timeout=aiohttp.ClientTimeout(20)) as session:
        yield session


def form(**fields: str) -> aiohttp.FormData:
    data = aiohttp.FormData()
    data.add_field("file", SOUND, filename="a.wav", content_type="audio/wav")
    for name, value in fields.items():
        data.add_field(name, value)
    return data


async def post(http: aiohttp.ClientSession, path: str, body: Any) -> Any:
    async with http.post(path, json=body) as answer:
        assert answer.status == 200
        return await answer.json()


async def read(answer: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    """What came of the body, and whether that was all."""
    content = b""
    try:
        async for data in answer.content.iter_any():
            content += data
    except (aiohttp.ClientPayloadError, ConnectionResetError):
        return content, False
    return content, True


def script(mock: MockModel, kind: str, **parameters: Any) -> None:
    mock.set_faults([{"kind": kind, "with": parameters}])


async def test_speech_is_a_sound_that_can_be_played(client: AsyncOpenAI, mock: MockModel) -> None:
    answer = await client.audio.speech.create(model="tts", voice="alloy", input="hello", response_format="wav")

    with wave.open(io.BytesIO(answer.content)) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (RATE, 1, SAMPLE)
        assert len(sound.readframes(10**6)) == sound.getnframes() * SAMPLE == TOKENS * PIECE * SAMPLE
    await mock.settled()
    call = mock.journal.calls[0]
    assert (call.path, call.model, call.ended, call.events_sent) == (PIECES, "tts", "complete", TOKENS)


@pytest.mark.parametrize(
    ("form", "content_type"),
    [(None, "audio/mpeg"), ("mp3", "audio/mpeg"), ("opus", "audio/opus"), ("pcm", "audio/pcm")],
)
async def test_speech_has_the_type_that_is_asked_for(
    http: aiohttp.ClientSession, form: str | None, content_type: str
) -> None:
    async with http.post(PIECES, json={**SPEECH, "response_format": form}) as answer:
        content, whole = await read(answer)

    assert answer.headers["content-type"] == content_type
    assert "cache-control" not in answer.headers
    assert (len(content), whole) == (TOKENS * PIECE * SAMPLE, True)


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_speech_is_cut_between_its_pieces(mock: MockModel, http: aiohttp.ClientSession, how: str) -> None:
    async with http.post(PIECES, json={**SPEECH, "response_format": "pcm"}) as answer:
        usual, _ = await read(answer)
    script(mock, "cut", after_events=2, how=how)
    async with http.post(PIECES, json={**SPEECH, "response_format": "pcm"}) as answer:
        content, whole = await read(answer)

    assert answer.status == 200
    assert (content, whole) == (usual[: len(usual) // 2], how == "end")
    await mock.settled()
    assert (mock.journal.calls[-1].fault, mock.journal.calls[-1].events_sent) == ("cut", 2)


@pytest.mark.parametrize("kind", ["latency", "slow_first_token", "drip"])
async def test_late_speech_is_whole(mock: MockModel, http: aiohttp.ClientSession, kind: str) -> None:
    async with http.post(PIECES, json=SPEECH) as answer:
        usual, _ = await read(answer)
    parameters: Any = {"bytes": 500, "interval": 0} if kind == "drip" else {"delay": 0.01}
    script(mock, kind, **parameters)
    async with http.post(PIECES, json=SPEECH) as answer:
        assert await read(answer) == (usual, True)
    await mock.settled()
    assert (mock.journal.calls[-1].fault, mock.journal.calls[-1].events_sent) == (kind, TOKENS)


@pytest.mark.parametrize("kind", ["no_done", "no_finish", "malformed_event", "error_event", "cut"])
async def test_faults_of_events_are_not_for_sounds(mock: MockModel, http: aiohttp.ClientSession, kind: str) -> None:
    script(mock, kind, **({"where": "inside_character"} if kind == "cut" else {}))
    async with http.post(PIECES, json=SPEECH) as answer:
        assert (await read(answer))[1]
    await mock.settled()

    assert (mock.journal.calls[-1].fault, mock.journal.calls[-1].ended) == (None, "complete")


async def test_stalled_speech_has_its_first_pieces(mock: MockModel, http: aiohttp.ClientSession) -> None:
    script(mock, "stall", after_events=2)
    async with http.post(PIECES, json={**SPEECH, "response_format": "pcm"}) as answer:
        assert len(await answer.content.readexactly(2 * PIECE * SAMPLE)) == 2 * PIECE * SAMPLE
    await mock.settled()

    assert (mock.journal.calls[-1].fault, mock.journal.calls[-1].ended) == ("stall", "caller_left")


async def test_transcriptions_and_translations(
    client: AsyncOpenAI, http: aiohttp.ClientSession, mock: MockModel
) -> None:
    file = ("a.wav", SOUND)
    one = await client.audio.transcriptions.create(model="whisper", file=file)
    again = await client.audio.transcriptions.create(model="whisper", file=file, response_format="verbose_json")
    async with http.post("/v1/audio/translations", data=form(model="whisper")) as answer:
        other = (await answer.json())["text"]

    assert len(one.text.split()) == TOKENS
    assert again.text == one.text != other
    assert (again.language, len(again.segments or [])) == ("english", 1)
    assert [(call.path, call.model, call.ended) for call in mock.journal.calls] == [
        (TRANSCRIPTIONS, "whisper", "complete"),
        (TRANSCRIPTIONS, "whisper", "complete"),
        ("/v1/audio/translations", "whisper", "complete"),
    ]


async def test_a_streamed_transcription_says_the_same(client: AsyncOpenAI, mock: MockModel) -> None:
    file = ("a.wav", SOUND)
    whole = await client.audio.transcriptions.create(model="whisper", file=file)
    stream = await client.audio.transcriptions.create(model="whisper", file=file, stream=True)
    events: list[Any] = [event async for event in stream]

    assert [event.type for event in events] == [*["transcript.text.delta"] * TOKENS, "transcript.text.done"]
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == whole.text
    await mock.settled()
    assert mock.journal.calls[-1].events_sent == TOKENS + 1


@pytest.mark.parametrize(
    ("kind", "events"), [("no_finish", TOKENS), ("error_event", 2), ("malformed_event", TOKENS + 2)]
)
async def test_streamed_transcriptions_meet_the_faults_of_streams(
    mock: MockModel, http: aiohttp.ClientSession, kind: str, events: int
) -> None:
    mock.set_faults([{"kind": kind, "match": {"stream": True, "model": "whisper"}}])
    async with http.post(TRANSCRIPTIONS, data=form(model="whisper", stream="true")) as answer:
        content, whole = await read(answer)

    assert (content.count(b"data: "), whole) == (events, True)


@pytest.mark.parametrize(("kind", "start"), [("text", ""), ("srt", "1\n00:00:00,000 --> "), ("vtt", "WEBVTT\n\n")])
async def test_transcriptions_as_text(http: aiohttp.ClientSession, kind: str, start: str) -> None:
    async with http.post(TRANSCRIPTIONS, data=form(model="whisper", response_format=kind)) as answer:
        text = await answer.text()

    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert text.startswith(start)


@pytest.mark.parametrize(
    ("fields", "param"), [({"response_format": "none"}, "response_format"), ({"stream": "perhaps"}, "stream")]
)
async def test_a_wrong_form_is_refused_and_known_by_its_model(
    mock: MockModel, http: aiohttp.ClientSession, fields: dict[str, str], param: str
) -> None:
    async with http.post(TRANSCRIPTIONS, data=form(model="whisper", **fields)) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["param"] == param
    async with http.post(
        TRANSCRIPTIONS, data=aiohttp.FormData({"model": "whisper"}, default_to_multipart=True)
    ) as no_file:
        assert (await no_file.json())["error"]["param"] == "file"
    async with http.post(TRANSCRIPTIONS, json={"model": "whisper"}) as no_form:
        assert no_form.status == 400
        assert "must be a form" in (await no_form.json())["error"]["message"]

    assert [call.model for call in mock.journal.calls] == ["whisper", "whisper", None]


async def test_images_are_png_files(client: AsyncOpenAI, mock: MockModel) -> None:
    made = await client.images.generate(model="painter", prompt="a cat", n=2)
    edited = await client.images.edit(model="painter", prompt="a dog", image=("a.png", SOUND, "image/png"))
    files = [b64decode(image.b64_json or "") for image in [*(made.data or []), *(edited.data or [])]]

    assert len(set(files)) == 3
    for file in files:
        assert file.startswith(b"\x89PNG\r\n\x1a\n")
        start, end = file.index(b"IDAT") + 4, file.index(b"IEND") - 8
        assert len(zlib.decompress(file[start:end])) == 8 * (1 + 3 * 8)
    assert [call.model for call in mock.journal.calls] == ["painter", "painter"]


async def test_moderations(client: AsyncOpenAI) -> None:
    many = await client.moderations.create(model="judge", input=["a", "b"])
    parts: Any = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    one = await client.moderations.create(input=parts)

    assert [result.flagged for result in many.results] == [False, False]
    assert len(one.results) == 1
    assert 0 <= one.results[0].category_scores.violence < 0.01


async def test_rerank_sorts_the_documents(http: aiohttp.ClientSession) -> None:
    body = {"model": "ranker", "query": "q", "documents": ["a", {"text": "b"}, "c"]}
    answer = await post(http, "/v1/rerank", body)
    best = await post(http, "/v1/rerank", {**body, "top_n": 1})
    scores = [result["relevance_score"] for result in answer["results"]]

    assert answer["model"] == "ranker"
    assert scores == sorted(scores, reverse=True)
    assert {(result["index"], result["document"]["text"]) for result in answer["results"]} == {
        (0, "a"),
        (1, "b"),
        (2, "c"),
    }
    assert best["results"] == answer["results"][:1]


async def test_scores_fit_those_of_rerank(http: aiohttp.ClientSession) -> None:
    ranked = await post(http, "/v1/rerank", {"query": "q", "documents": ["a", "b"]})
    scored = await post(http, "/v1/score", {"text_1": "q", "text_2": ["a", "b"]})
    one = await post(http, "/v1/score", {"text_1": ["q"], "text_2": "b"})
    by_index = {result["index"]: result["relevance_score"] for result in ranked["results"]}

    assert {item["index"]: item["score"] for item in scored["data"]} == by_index
    assert one["data"] == [{"index": 0, "object": "score", "score": by_index[1]}]
    async with http.post("/v1/score", json={"text_1": ["a", "b"], "text_2": ["c"]}) as answer:
        assert answer.status == 400


async def test_tokens_and_back(http: aiohttp.ClientSession, mock: MockModel) -> None:
    text = "café 東京 🙂"
    tokens = await post(http, "/tokenize", {"model": "m", "prompt": text, "return_token_strs": True})
    back = await post(http, "/detokenize", {"model": "m", "tokens": tokens["tokens"]})
    said = await post(http, "/tokenize", {"messages": [{"role": "user", "content": text}]})

    assert tokens["count"] == len(tokens["tokens"]) == len(text)
    assert tokens["token_strs"] == list(text)
    assert back == {"prompt": text}
    assert said["tokens"] == tokens["tokens"]
    assert [call.path for call in mock.journal.calls] == ["/tokenize", "/detokenize", "/tokenize"]
    async with http.post("/detokenize", json={"tokens": [0xD800]}) as answer:
        assert answer.status == 400


@pytest.mark.parametrize("path", ["/tokenize", "/v1/rerank", PIECES, TRANSCRIPTIONS])
async def test_faults_have_openai_errors_here(mock: MockModel, http: aiohttp.ClientSession, path: str) -> None:
    mock.set_faults([{"kind": "status", "with": {"status": 503}, "match": {"path": path}}])
    async with http.post(path, json={}) as answer:
        assert answer.status == 503
        assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}


async def test_the_journal_tells_bodies_queries_and_methods_apart(mock: MockModel, http: aiohttp.ClientSession) -> None:
    body = b'{"prompt": "a"}'
    for sent, query in ((body, ""), (body, "?a=1&b=%20c"), (body + b" ", "?" + "x" * 1000)):
        async with http.post(f"/tokenize{query}", data=sent) as answer:
            assert answer.status == 200
    async with http.get("/v1/models/m?limit=2"):
        pass
    first, second, third, models = mock.journal.calls

    assert first.fingerprint == second.fingerprint != third.fingerprint
    assert [call.query for call in (first, second, third)] == ["", "a=1&b= c", "x" * 256]
    assert (first.method, models.method, models.query) == ("POST", "GET", "limit=2")
    assert json.loads(mock.journal.document())["calls"][1]["query"] == "a=1&b= c"
