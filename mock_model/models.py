"""The list of models."""

from collections.abc import Iterable

from mock_model.answer import CREATED, Answer, document


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "mock-model"}


def list_models(names: Iterable[str]) -> Answer:
    """Return the list of the models with these names."""
    return Answer(body=document({"object": "list", "data": [_model(name) for name in names]}))


def retrieve_model(name: str) -> Answer:
    """Return the model of that name; there is one for every name."""
    return Answer(body=document(_model(name)))
