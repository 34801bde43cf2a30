"""The end of a thread that exports: a dead collector cannot delay the stop."""

import logging
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LAST_EXPORT = 2.0
"""Seconds the last export may take when the gateway stops."""
LAST_STEP = 0.2
"""Seconds that the exporter may take to shut down, and then the thread to end."""

_log = logging.getLogger("gateway")


def end_export(thread: threading.Thread, shutdown: "Callable[[], object]", what: str) -> None:
    """Wait for the last export, then shut the exporter down, which ends one that is still under way.

    Args:
        thread: has been told to stop.
        shutdown: of the exporter; it may block.
        what: is exported, for the log.
    """
    thread.join(LAST_EXPORT)
    if thread.is_alive():
        _log.warning("the last %s could not be exported within %g s", what, LAST_EXPORT)
    closing = threading.Thread(target=shutdown, daemon=True)
    closing.start()
    for each in (closing, thread):
        each.join(LAST_STEP)
