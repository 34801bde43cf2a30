"""The SDK's OTLP/HTTP exporter, with a way in for encoded bytes and the faster of its two transports.

The transport is private to the SDK: pyproject.toml bounds its version, and tests/unit/gateway/test_otlp.py asserts
that it exists and is the one that is used.
"""

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter


class OtlpHttpExporter(OTLPSpanExporter):
    """Posts `ExportTraceServiceRequest`s that are already encoded.

    Args:
        endpoint: url; None: what the environment says.
        timeout: seconds; None: what the environment says.
        over_requests: whether it goes over `requests`, which holds the interpreter for twice as long as urllib3.
    """

    def __init__(
        self, endpoint: str | None = None, timeout: float | None = None, *, over_requests: bool = False
    ) -> None:
        if over_requests:
            super().__init__(endpoint, timeout=timeout)
            return
        from opentelemetry.exporter.http.transport._urllib3 import (  # noqa: PLC0415 - private, and not always needed
            Urllib3HTTPTransport,
        )

        super().__init__(endpoint, timeout=timeout, _transport=Urllib3HTTPTransport())

    def send(self, body: bytes) -> bool:
        """Post a request, with the SDK's retries and time limit; return whether it was accepted."""
        return self._client.export(body).success
