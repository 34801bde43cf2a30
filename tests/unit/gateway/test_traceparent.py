import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider

from gateway.settings import SAMPLERS
from gateway.telemetry.trace_context import is_sampled, parse_traceparent, takes_all

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = (int(TRACE, 16), int(SPAN, 16))


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (f"00-{TRACE}-{SPAN}-01", 1),
        (f"00-{TRACE}-{SPAN}-00", 0),
        (f"00-{TRACE}-{SPAN}-ff", 255),
        (f" 00-{TRACE}-{SPAN}-01\t", 1),
        (f"01-{TRACE}-{SPAN}-01", 1),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", 1),
        (f"cc-{TRACE}-{SPAN}-01-", 1),
    ],
)
def test_a_good_one(text: str, flags: int) -> None:
    assert parse_traceparent(text) == (*GOOD, flags)


@pytest.mark.parametrize(
    "text",
    [
        *("", "-", "---", "00", "garbage", "00-00-00-00"),
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01-",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-001",
        f"00-{TRACE}-{SPAN}-0g",
        f"0-{TRACE}-{SPAN}-01",
        f"0x-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN.upper()}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01",
        f"00-{TRACE[:-1]}_-{SPAN}-01",
        f"00-{TRACE[:15]}_{TRACE[16:]}-{SPAN}-01",
        f"00-+{TRACE[1:]}-{SPAN}-01",
        f"00- {TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN[:-1]} -01",
        f"00-{TRACE}-{SPAN}-+1",
        f"00-{TRACE[:-1]}\u0661-{SPAN}-01",
        f"00-{TRACE[:-1]}\xb2-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01, 00-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\x00",
        "00-" * 10_000,
    ],
)
def test_a_hostile_one_begins_a_new_trace(text: str) -> None:
    assert parse_traceparent(text) is None


HEX = st.sampled_from("0123456789abcdef")


@given(
    st.text(HEX, min_size=32, max_size=32), st.text(HEX, min_size=16, max_size=16), st.text(HEX, min_size=2, max_size=2)
)
def test_every_good_one_is_read(trace: str, span: str, flags: str) -> None:
    expected = (int(trace, 16), int(span, 16), int(flags, 16))

    assert parse_traceparent(f"00-{trace}-{span}-{flags}") == (expected if expected[0] and expected[1] else None)


@given(st.one_of(st.text(max_size=80), st.lists(st.text(HEX | st.characters(), max_size=33), max_size=6).map("-".join)))
def test_no_text_makes_it_fail(text: str) -> None:
    found = parse_traceparent(text)

    if found is not None:
        assert 0 < found[0] < 1 << 128
        assert 0 < found[1] < 1 << 64
        assert 0 <= found[2] < 256


@pytest.mark.parametrize(("sampler", "takes"), [(sampler, sampler.endswith("always_on")) for sampler in SAMPLERS])
def test_only_a_sampler_that_takes_every_new_trace_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, sampler: str, *, takes: bool
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")

    made = TracerProvider(shutdown_on_exit=False).sampler

    assert takes_all(made) is takes
    assert is_sampled(made, 1, "POST /v1/chat/completions", None) is takes
