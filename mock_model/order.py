"""What a call asks for."""

from dataclasses import dataclass

from mock_model.answer import Answer


@dataclass(frozen=True, slots=True)
class Order:
    """What is known of a call once its body has been read.

    Attributes:
        answer: the good one.
        asked: the model it names, or None.
        model: the model that answers: the one it names or, where it names none, the default; None if the call is not
            for a model.
        stream: whether it asks for a streamed answer.
    """

    answer: Answer
    asked: str | None = None
    model: str | None = None
    stream: bool = False
