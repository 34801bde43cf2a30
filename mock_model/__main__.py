"""`python -m mock_model` or `mock-model`: signals first, then the program, whose imports take their time."""

import os
import signal
import sys
from types import FrameType

USAGE = "usage: mock-model   run the mock model; its settings are environment variables: docs/mock-model.md"


def command() -> int:
    """Do what the command line says; return the exit code."""
    arguments = sys.argv[1:]
    if not arguments:
        return main()
    if arguments[0] in {"-h", "--help"}:
        print(USAGE)  # noqa: T201
        return 0
    print(f"mock-model: it takes no arguments, and {arguments[0]!r} is one\n{USAGE}", file=sys.stderr)  # noqa: T201
    return 2


def main() -> int:
    """Run the mock model; return its exit code. Until it serves, SIGTERM and SIGINT end it at once."""
    end_by_signals()
    from mock_model import program  # noqa: PLC0415 - a signal may come during these imports

    code = program.main()
    end_by_signals()  # the event loop has given its handlers back
    return code


def end_by_signals() -> None:
    """Have SIGTERM and SIGINT end the process, and SIGHUP do nothing: there is nothing to read anew yet."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _end(number: int, _frame: FrameType | None) -> None:
    """End as if the signal had no handler, with the exit code of shells where the system spares process 1."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(command())
