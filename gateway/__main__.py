"""`python -m gateway` or `llm-gateway`: signals first, then the program, whose imports take their time."""

import os
import signal
import sys
from types import FrameType

from gateway import __version__

USAGE = """usage: llm-gateway                  run the gateway; its settings are environment variables
       llm-gateway check FILE ...   say what is wrong with a configuration, and what it would change
       llm-gateway why ID           say what became of a request, and why
       llm-gateway export ID        make a script of the mock model, and an experiment, of a request

llm-gateway COMMAND --help says more, llm-gateway --version which one this is. The settings: docs/configuration.md"""


def command() -> int:
    """Do what the command line says; return the exit code."""
    return main(*sys.argv[1:])


def main(*arguments: str) -> int:
    """Run the gateway, or one of its commands; return the exit code. Until it serves, signals end it at once."""
    end_by_signals()
    if arguments[:1] == ("check",):
        from gateway import check  # noqa: PLC0415 - a signal may come during these imports

        return check.main([*arguments[1:]])
    if arguments[:1] == ("why",):
        from gateway import why  # noqa: PLC0415 - the same

        return why.main([*arguments[1:]])
    if arguments[:1] == ("export",):
        from gateway import export  # noqa: PLC0415 - the same

        return export.main([*arguments[1:]])
    if arguments and (arguments[0] != "worker" or len(arguments) == 1):  # a gateway of several starts it with more
        return refuse(arguments)
    from gateway import program  # noqa: PLC0415 - the same

    code = program.main(arguments[1:])
    end_by_signals()  # the event loop has given its handlers back
    return code


def refuse(arguments: tuple[str, ...]) -> int:
    """Say what the command line may be; return 0 to who asks for that, else 2: nobody who mistypes starts a gateway."""
    if arguments[0] in {"-h", "--help"}:
        print(USAGE)  # noqa: T201
        return 0
    if arguments[0] == "--version":
        print(f"llm-gateway {__version__}")  # noqa: T201
        return 0
    print(f"llm-gateway: {arguments[0]!r} is no command\n{USAGE}", file=sys.stderr)  # noqa: T201
    return 2


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
