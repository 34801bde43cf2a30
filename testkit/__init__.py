"""What the chaos suite, the bench, the tests and the tools share. `gateway` and `mock_model` never import it."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
