"""The LLM gateway that stays up when the model does not, and shows why."""

__version__ = "0.1.0"
