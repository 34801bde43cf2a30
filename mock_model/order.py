"""What a caller wants, as far as it could be understood."""

from dataclasses import dataclass

from mock_model.answer import Answer


@dataclass(frozen=True, slots=True)
class Order:
    """What is known of a call once its body was read.

    Attributes:
        answer: What it is answered with if no fault comes between.
        asked: The model it names, or None.
        model: The model that answers: the one it names or, where it names none, the default; None if the call is not
            for a model.
        stream: Whether it asks for a streamed answer.
    """

    answer: Answer
    asked: str | None = None
    model: str | None = None
    stream: bool = False
