"""A load that knows the right text of every answer of the mock model; `python -m chaos.load` is its worker."""

from collections.abc import Callable

import uvloop

from mock_model.draws import fingerprint
from mock_model.text import Writer
from testkit import load
from testkit.caller import Expect, serve
from testkit.load import Call


class Plan(load.Plan, kw_only=True):
    """What the load sends.

    Attributes:
        mock_seed: Of the mock model, to check each answer's text; None where the model is another.
        mock_tokens: Of the mock model.
    """

    mock_seed: int | None = None
    mock_tokens: int = 16


class Load(load.Load):
    """A load by one plan; see `testkit.load.Load`.

    Attributes:
        plan: What is sent.
    """

    def __init__(self, plan: Plan, *, on_call: Callable[[Call], None] | None = None) -> None:
        super().__init__(plan, on_call=on_call, caller="chaos.load")
        self.plan = plan


def expecting(plan: Plan) -> Expect:
    """Return what knows the text with which the mock model answers a request."""
    if plan.mock_seed is None:
        return lambda _body: None
    writer = Writer(plan.mock_seed, plan.mock_tokens)
    return lambda body: writer.write(fingerprint(plan.path, body), 0, plan.max_tokens).text


if __name__ == "__main__":
    uvloop.run(serve(Plan, expecting))
