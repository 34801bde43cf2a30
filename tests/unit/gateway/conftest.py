"""One profile for all property tests: bounded, and with the blob that reproduces a failure."""

from hypothesis import settings

settings.register_profile(
    "unit", database=None, deadline=None, print_blob=True, max_examples=80, stateful_step_count=40
)
settings.load_profile("unit")
