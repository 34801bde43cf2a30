"""`python -m gateway` or `llm-gateway`: signals first, then the program, whose imports take their time."""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the gateway, or one of its commands; return the exit code. Until it serves, signals end it at once."""
    end_by_signals()
    if sys.argv[1:2] == ["check"]:
        from gateway import check  # noqa: PLC0415 - a signal may come during these imports

        return check.main(sys.argv[2:])
    if sys.argv[1:2] == ["why"]:
        from gateway import why  # noqa: PLC0415 - the same

        return why.main(sys.argv[2:])
    if sys.argv[1:2] == ["export"]:
        from gateway import export  # noqa: PLC0415 - the same

        return export.main(sys.argv[2:])
    from gateway import program  # noqa: PLC0415 - the same

    code = program.main(sys.argv[2:] if sys.argv[1:2] == ["worker"] else [])
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
    sys.exit(main())
