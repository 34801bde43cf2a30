"""Why a backend gave no answer: aiohttp's errors become ours. Messages name no host, which callers do not know."""

import os
import ssl
from errno import (
    EADDRNOTAVAIL,
    ECONNREFUSED,
    EHOSTUNREACH,
    EMFILE,
    ENETUNREACH,
    ENFILE,
    ENOBUFS,
    ENOMEM,
    ETIMEDOUT,
)
from socket import EAI_MEMORY
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.http_exceptions import LineTooLong

from gateway.errors import (
    BackendError,
    ConnectionFailed,
    InvalidResponse,
    NoConnection,
    PartTooLarge,
    StaleConnection,
    Unreachable,
)

if TYPE_CHECKING:
    from gateway.policy.endpoint import Endpoint

FOR_ANOTHER_HOST = frozenset({62, 64})
"""OpenSSL's `X509_V_ERR_HOSTNAME_MISMATCH` and `X509_V_ERR_IP_ADDRESS_MISMATCH`."""
SHORT_OF = {
    EMFILE: "descriptors",
    ENFILE: "descriptors",
    EADDRNOTAVAIL: "ports",
    ENOBUFS: "buffers",
    ENOMEM: "buffers",
    EAI_MEMORY: "buffers",
}
"""What the gateway's own machine has none left of, by the system's error: the reason of a `NoConnection`."""
SHORTAGES = {
    "descriptors": "The gateway has no file descriptor left for a connection to a backend. Try again shortly.",
    "ports": "The gateway has no local port left for a connection to a backend. Try again shortly.",
    "buffers": "The gateway's machine has no memory left for a connection to a backend. Try again shortly.",
}
FOR_A_NAME = 4
"""File descriptors that a resolver may need at once: its files, a socket for each name server."""
WHY_UNREACHABLE = {
    ECONNREFUSED: "refused the connection.",
    ENETUNREACH: "could not be reached: there is no route to it.",
    EHOSTUNREACH: "could not be reached: there is no route to it.",
    ETIMEDOUT: "could not be reached: nothing answered at its address.",
}


def failure_of(error: Exception, endpoint: "Endpoint", *, new: bool) -> BackendError:
    """Return the failure behind an error of aiohttp before the headers of an answer.

    Args:
        error: it.
        endpoint: which was asked.
        new: whether the connection was new, not kept alive.

    Raises:
        NoConnection: the gateway's own machine lacks something.
    """
    if isinstance(error, aiohttp.ClientConnectorError):
        return Unreachable(why_unreachable(error, endpoint))
    if isinstance(error, (aiohttp.ServerDisconnectedError, OSError)):
        begun = isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str)
        if not new and not begun:  # begun: part of the answer's head came; aiohttp hands it over in place of a text
            return StaleConnection(f"A kept-alive connection to {endpoint.name} had died.")
        return ConnectionFailed(f"{endpoint.name} closed the connection before answering.")
    if isinstance(error.__cause__, LineTooLong) or "Too many headers" in str(error):
        return headers_too_large()
    return InvalidResponse(f"{endpoint.name} sent an answer that is not valid HTTP.")


def headers_too_large() -> PartTooLarge:
    """Return the failure of an answer whose headers are too large."""
    return PartTooLarge("The headers of the backend's answer are larger than 64 KiB.")


def _check_shortage(error: aiohttp.ClientConnectorError) -> None:
    """Raise: NoConnection, if there is no connection since the gateway's own machine lacks something."""
    short_of = SHORT_OF.get(error.os_error.errno or 0)
    if short_of is None and isinstance(error, aiohttp.ClientConnectorDNSError) and not _has_descriptors():
        short_of = "descriptors"  # a resolver that can open neither file nor socket may say that there is no such name
    if short_of is not None:
        raise NoConnection(SHORTAGES[short_of], reason=short_of)


def _has_descriptors() -> bool:
    opened: list[int] = []
    try:
        while len(opened) < FOR_A_NAME:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return False
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return True


def why_unreachable(error: aiohttp.ClientConnectorError, endpoint: "Endpoint") -> str:
    """Return why there is no connection, in a sentence. Raises: NoConnection, if it is not the replica's doing."""
    _check_shortage(error)
    cause = error.os_error
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"The host name of {endpoint.name} could not be resolved."
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        reason = "it does not fit"
        if isinstance(error.certificate_error, ssl.SSLCertVerificationError):
            for_another = error.certificate_error.verify_code in FOR_ANOTHER_HOST
            reason = "it is for another host" if for_another else error.certificate_error.verify_message.rstrip(".")
        return f"The certificate of {endpoint.name} was not accepted: {reason}."
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        reason = getattr(cause, "reason", None) or "no reason given"
        return f"The TLS handshake with {endpoint.name} failed: {reason}."
    if isinstance(cause, (ConnectionResetError, ConnectionAbortedError)):
        return f"{endpoint.name} closed the connection while it was being opened."
    return f"{endpoint.name} {WHY_UNREACHABLE.get(error.errno or 0, 'could not be reached.')}"
