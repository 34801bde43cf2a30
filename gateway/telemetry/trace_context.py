"""W3C Trace Context, and whether a request is sampled."""

from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import Decision, Sampler
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context

NO_PARENT = Context()
SERVER, SAMPLE = SpanKind.SERVER, Decision.RECORD_AND_SAMPLE  # the members of an enum are slow to look up


def parse_traceparent(text: str) -> tuple[int, int, int] | None:
    """Return trace id, parent id and flags; None for what W3C Trace Context calls invalid: then a new trace begins."""
    parts = text.strip().split("-")
    if len(parts) < 4 or [len(part) for part in parts[:4]] != [2, 32, 16, 2]:  # noqa: PLR2004
        return None
    version = parts[0]
    if version == "ff" or (version == "00" and len(parts) != 4):  # noqa: PLR2004
        return None
    digits = "".join(parts[:4])
    if not digits.isascii() or digits != digits.lower():
        return None
    try:
        int(version, 16)
        trace_id, parent_id, flags = int(parts[1], 16), int(parts[2], 16), int(parts[3], 16)
    except ValueError:
        return None
    return (trace_id, parent_id, flags) if trace_id and parent_id and digits.isalnum() else None


def takes_all(sampler: Sampler) -> bool:
    """Return whether a sampler takes every trace that begins here, as the default does: then it need not be asked."""
    return sampler.get_description().startswith(("AlwaysOnSampler", "ParentBased{root:AlwaysOnSampler,"))


def is_sampled(sampler: Sampler, trace_id: int, name: str, parent: tuple[int, int, int] | None) -> bool:
    """Return what the sampler decides about a SERVER span; `parent` as `parse_traceparent` returns it."""
    context = NO_PARENT
    if parent is not None:
        remote = SpanContext(parent[0], parent[1], is_remote=True, trace_flags=TraceFlags(parent[2]))
        context = set_span_in_context(NonRecordingSpan(remote), NO_PARENT)
    return sampler.should_sample(context, trace_id, name, SERVER).decision is SAMPLE
