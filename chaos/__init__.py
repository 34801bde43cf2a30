"""The chaos kit: real processes, a steady load, faults, three counts that must agree, and a verdict."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
