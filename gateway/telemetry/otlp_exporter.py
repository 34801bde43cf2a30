"""The SDK's OTLP/HTTP exporter, with a way in for encoded bytes and a transport that is bounded in time and bytes.

The way to set a transport is private to the SDK: pyproject.toml bounds its version, and tests/unit/gateway/test_otlp.py
asserts that it exists and is the one that is used.
"""

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

from gateway.settings import CollectorSettings
from gateway.telemetry.otlp_transport import Transport

DIRECT = CollectorSettings()


class OtlpHttpExporter(OTLPSpanExporter):
    """Posts `ExportTraceServiceRequest`s that are already encoded.

    Args:
        endpoint: url; None: what the environment says.
        timeout: seconds; None: what the environment says.
        reached: how the collector is reached.

    Raises:
        OSError: a certificate cannot be read.
    """

    def __init__(
        self, endpoint: str | None = None, timeout: float | None = None, *, reached: CollectorSettings = DIRECT
    ) -> None:
        if reached.by_provider:
            super().__init__(endpoint, timeout=timeout)
            # The session is the plugin's, of `requests`, which then reads no answer.
            self._client._transport._session.stream = True  # type: ignore[attr-defined]  # noqa: SLF001
        else:
            super().__init__(endpoint, timeout=timeout, _transport=Transport(reached))

    def send(self, body: bytes) -> bool:
        """Post a request, with the SDK's retries and time limit; return whether it was accepted."""
        result = self._client.export(body)
        return result.success and (result.status_code or 0) < 300  # noqa: PLR2004 - a redirect has not got the spans
