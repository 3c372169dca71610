"""OTLP over HTTP: spans as OpenTelemetry's, encoded by its own library, posted to a collector.

Only this module imports OpenTelemetry, which is the optional extra `hostd[otel]`. It reads none of
the `OTEL_*` variables (ADR 1097). Source: OTLP specification 1.x, section OTLP/HTTP.
"""

import http.client
import ssl
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

from google.protobuf.message import DecodeError
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from schemas.trace_context import TraceContext
from worker.tracing.exporter import ExportError
from worker.tracing.spans import Span

PATH: Final = "/v1/traces"
TIMEOUT_S: Final = 5.0  # of each operation on the socket
ANSWER_MAX_BYTES: Final = 65_536
AGAIN: Final = frozenset({429, 502, 503, 504})
HEADERS: Final = {"Content-Type": "application/x-protobuf", "User-Agent": "hostd"}
KINDS: Final = {
    "consumer": SpanKind.CONSUMER,
    "internal": SpanKind.INTERNAL,
    "producer": SpanKind.PRODUCER,
}


class Collector:
    """Where spans go.

    Args:
        endpoint: base URL, http or https; `/v1/traces` is added.
        ca: file with the authorities that an https endpoint is verified by; empty: the system's.
        facts: the attributes of the resource, i.e. of this host in all spans.
        version: hostd's.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        ca: str,
        facts: dict[str, str],
        version: str,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        url = urlsplit(endpoint)
        self._host, self._port = url.hostname or "", url.port
        self._path = url.path.rstrip("/") + PATH
        self._tls = ssl.create_default_context(cafile=ca or None) if url.scheme == "https" else None
        self._timeout_s = timeout_s
        self._resource = Resource(facts)
        self._scope = InstrumentationScope("hostd", version)

    def send(self, spans: Sequence[Span]) -> int:
        """Post a batch; returns how many of it the collector rejected.

        Raises:
            ExportError: it was not taken.
        """
        body = encode_spans([self._readable(each) for each in spans]).SerializeToString()
        connection = self._connection()
        try:
            connection.request("POST", self._path, body, HEADERS)
            with connection.getresponse() as answer:
                content = answer.read(ANSWER_MAX_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise ExportError(f"{type(error).__name__}: {error}", again=True) from error
        finally:
            connection.close()
        if answer.status // 100 != 2:
            text = f"the collector answered {answer.status} {answer.reason}"
            raise ExportError(text, again=answer.status in AGAIN)
        try:
            answered = ExportTraceServiceResponse.FromString(content)
        except DecodeError:
            return 0
        return min(max(0, int(answered.partial_success.rejected_spans)), len(spans))

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=self._timeout_s, context=self._tls
        )

    def _readable(self, span: Span) -> ReadableSpan:
        remote = span.kind == "consumer"
        status = Status(StatusCode.OK if span.error is None else StatusCode.ERROR, span.error)
        return ReadableSpan(
            span.name,
            context=_span_context(span.context, remote=False),
            parent=None if span.parent is None else _span_context(span.parent, remote=remote),
            resource=self._resource,
            attributes=dict(span.attributes),
            links=[Link(_span_context(each, remote=False)) for each in span.links],
            kind=KINDS[span.kind],
            status=status,
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=self._scope,
        )


def _span_context(context: TraceContext, *, remote: bool) -> SpanContext:
    return SpanContext(
        int(context.trace_id, 16),
        int(context.span_id, 16),
        is_remote=remote,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT),
        trace_state=TraceState.from_header([context.state] if context.state else []),
    )
