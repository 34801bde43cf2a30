"""The list of models."""

from mock_model.answer import CREATED, Answer, document


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "mock-model"}


def list_models(name: str) -> Answer:
    """The one model there is."""
    return Answer(body=document({"object": "list", "data": [_model(name)]}))


def retrieve_model(name: str) -> Answer:
    """A model; every name has one."""
    return Answer(body=document(_model(name)))
