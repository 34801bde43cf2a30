"""Why a backend gave no answer: aiohttp's errors become ours. Messages name no host, which callers do not know."""

import ssl
from errno import ECONNREFUSED
from os import strerror
from typing import TYPE_CHECKING

import aiohttp

from gateway.errors import (
    BackendError,
    ConnectionFailed,
    ConnectTimeout,
    InvalidResponse,
    StaleConnection,
    Unreachable,
)

if TYPE_CHECKING:
    from gateway.policy.replica import Replica

FOR_ANOTHER_HOST = frozenset({62, 64})
"""OpenSSL's `X509_V_ERR_HOSTNAME_MISMATCH` and `X509_V_ERR_IP_ADDRESS_MISMATCH`."""


def failure_of(error: Exception, replica: "Replica", *, connect_timeout: float, new: bool) -> BackendError:
    """Return the failure behind an error of aiohttp before the headers of an answer.

    Args:
        error: it.
        replica: which was asked.
        connect_timeout: seconds, for the message.
        new: whether the connection was new, not kept alive.
    """
    # The order matters: aiohttp's timeouts are connection errors too.
    if isinstance(error, TimeoutError):
        return ConnectTimeout(f"{replica.name} did not accept a connection within {connect_timeout:g} s.")
    if isinstance(error, aiohttp.ClientConnectorError):
        return Unreachable(why_unreachable(error, replica))
    if isinstance(error, (aiohttp.ServerDisconnectedError, OSError)):
        begun = isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str)
        if not new and not begun:  # begun: part of the answer's head came; aiohttp hands it over in place of a text
            return StaleConnection(f"A kept-alive connection to {replica.name} was dead.")
        return ConnectionFailed(f"{replica.name} closed the connection before answering.")
    return InvalidResponse(f"{replica.name} sent an answer that is not valid HTTP.")


def why_unreachable(error: aiohttp.ClientConnectorError, replica: "Replica") -> str:
    """Return why there is no connection, in a sentence."""
    cause = error.os_error
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"The host name of {replica.name} could not be resolved."
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        reason = "it does not fit"
        if isinstance(error.certificate_error, ssl.SSLCertVerificationError):
            for_another = error.certificate_error.verify_code in FOR_ANOTHER_HOST
            reason = "it is for another host" if for_another else error.certificate_error.verify_message.rstrip(".")
        return f"The certificate of {replica.name} was not accepted: {reason}."
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        reason = getattr(cause, "reason", None) or "no reason given"
        return f"The TLS handshake with {replica.name} failed: {reason}."
    if isinstance(cause, (ConnectionResetError, ConnectionAbortedError)):
        return f"{replica.name} closed the connection while it was being opened."
    if error.errno == ECONNREFUSED:
        return f"{replica.name} refused the connection."
    reason = strerror(error.errno) if error.errno is not None else "each of its addresses failed differently"
    return f"{replica.name} could not be reached: {reason}."
