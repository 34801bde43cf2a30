"""The ids of requests that bring none: there are servers that take nothing but UUIDs."""

import uuid
from random import Random

from gateway.telemetry import _uuid


def test_they_are_uuids_of_version_4_drawn_from_the_injected_source() -> None:
    rng = Random(7)
    ids = [_uuid(rng) for _ in range(1_000)]

    for text in ids:
        parsed = uuid.UUID(text)
        assert (str(parsed), parsed.version, parsed.variant) == (text, 4, uuid.RFC_4122)
    assert len(set(ids)) == 1_000
    assert ids[0] == _uuid(Random(7))
    drawn = [len({text[at] for text in ids}) for at in range(36)]
    assert drawn == [16] * 8 + [1] + [16] * 4 + [1, 1] + [16] * 3 + [1, 1] + [16] * 3 + [1] + [16] * 12
