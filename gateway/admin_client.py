"""What the commands ask of a running gateway: its admin calls."""

import http.client
import json
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from gateway.files import Files
from gateway.settings import SettingsError, check_url, secret
from gateway.telemetry.output import visible

if TYPE_CHECKING:
    import argparse

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT = 10.0
"""Seconds without an answer."""
MAX_ANSWER = 64 << 20
"""Bytes."""


class NotAnswered(Exception):
    """The gateway gave no answer, or none that helps; the message is one line for people."""


def add_request(parser: "argparse.ArgumentParser") -> None:
    """Add the arguments that say which request is meant, and of which gateway."""
    parser.add_argument("id", metavar="ID", help="x-request-id or x-trace-id of the answer")
    parser.add_argument(
        "--url",
        default=DEFAULT_URL,
        help=f"of the gateway ({DEFAULT_URL}); its key is read from GATEWAY_ADMIN_KEY",
    )


def explained(command: str, url: str, id_: str) -> dict[str, Any] | None:
    """Return what the gateway says of a kept request, by its request id or trace id.

    None where it says nothing; then people have been told why, as by this command.
    """
    try:
        return ask(url, f"/requests/{quote(id_, safe='')}")
    except NotAnswered as error:
        print(f"{command}: {visible(str(error))}", file=sys.stderr)  # noqa: T201
        return None


def ask(url: str, path: str) -> dict[str, Any]:
    """Return the document of an admin call; no proxy of the environment sees the key, and no other host.

    Raises:
        NotAnswered: the gateway cannot be reached, or refuses.
    """
    try:
        key = secret("GATEWAY_ADMIN_KEY", Files())
        parts = urlsplit(check_url(url))
    except SettingsError as error:
        raise NotAnswered(str(error)) from None
    except ValueError as error:
        raise NotAnswered(f"--url {url!r}: {error}") from None
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT)
    try:
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        connection.request("GET", parts.path.rstrip("/") + path, headers=headers)
        answer = connection.getresponse()
        status, body = answer.status, answer.read(MAX_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        raise NotAnswered(
            f"no gateway answers at {parts.scheme}://{parts.netloc.rpartition('@')[2]}: "
            f"{error.strerror if isinstance(error, OSError) and error.strerror else error}; --url names another"
        ) from None
    finally:
        connection.close()
    return _document(status, body)


def _document(status: int, body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    if status == http.client.OK and isinstance(document, dict):
        return document
    error = document.get("error") if isinstance(document, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    if status == http.client.UNAUTHORIZED:
        message = f"{message} It is read from GATEWAY_ADMIN_KEY, or from the file that GATEWAY_ADMIN_KEY_FILE names."
    if status == http.client.NOT_FOUND and "nothing at this path" in str(message):
        message = "it takes no such calls from here; if it has an admin key, set GATEWAY_ADMIN_KEY"
    raise NotAnswered(f"the gateway answered {status}: {message or 'what came is not its answer'}")
