"""The program: settings, logs, a mock model, and its end."""

import asyncio
import logging
import os
import signal
import sys

import uvloop

from mock_model.logs import let_nobody_wait_for_stderr, start_logging
from mock_model.serve import MockModel
from mock_model.settings import Settings, SettingsError, read_settings

BAD_SETTING = 2
NO_PORT = 1
CRASHED = 70

_log = logging.getLogger("mock_model")


def main() -> int:
    """Run until SIGTERM or SIGINT; return the exit code."""
    let_nobody_wait_for_stderr()
    try:
        settings = read_settings()
    except SettingsError as error:
        return _give_up(str(error), BAD_SETTING)
    start_logging(settings.level, settings.app_mode)
    return uvloop.run(_run(settings))


async def _run(settings: Settings) -> int:
    try:
        mock = MockModel(settings, crash=lambda: os._exit(CRASHED))
    except OSError as error:
        value = str(settings.mock_journal_file)
        return _give_up(
            f"MOCK_JOURNAL_FILE={value!r} is not allowed: it must be a file that can be written ({error.strerror})",
            BAD_SETTING,
        )
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    loop.add_signal_handler(signal.SIGHUP, _log.warning, "SIGHUP is ignored: settings are read at the start only")
    try:
        await mock.start()
    except OSError as error:
        return _give_up(str(error.strerror or error), NO_PORT)
    await stopped.wait()
    await mock.stop()
    return 0


def _give_up(reason: str, code: int) -> int:
    sys.stderr.write(f"mock_model: {reason}\n")
    return code
