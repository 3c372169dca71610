"""A receiver of OTLP/HTTP in this process: what a collector forwards, or a worker sends, decoded by
OpenTelemetry's own library."""

import gzip
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class Otlp:
    """Where `url` leads. `status`: what is answered; `rejected`: so many of each batch."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[Any] = []
        self.status = 200
        self.rejected = 0
        self._arrived = threading.Condition()

    def take(self, request: Any) -> None:
        with self._arrived:
            self.requests.append(request)
            self._arrived.notify_all()

    def spans(self) -> list[Any]:
        """All spans that came, as OTLP's messages."""
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def wait_spans(self, *names: str, timeout_s: float = 20) -> list[Any]:
        """All that came, once each of these names did."""

        def missing() -> set[str]:
            return {*names} - {span.name for span in self.spans()}

        with self._arrived:
            self._arrived.wait_for(lambda: not missing(), timeout_s)
            assert not missing(), f"no spans {sorted(missing())}"
            return self.spans()


@contextmanager
def otlp_server() -> Generator[Otlp]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            assert self.headers["Content-Type"] == "application/x-protobuf"
            if self.headers["Content-Encoding"] == "gzip":
                body = gzip.decompress(body)
            otlp.take(ExportTraceServiceRequest.FromString(body))
            answer = ExportTraceServiceResponse()
            answer.partial_success.rejected_spans = otlp.rejected
            self.send_response(otlp.status)
            self.end_headers()
            self.wfile.write(answer.SerializeToString())

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    otlp = Otlp(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield otlp
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def attributes_of(holder: Any) -> dict[str, Any]:
    """Of a span or a resource."""
    return {
        each.key: getattr(each.value, str(each.value.WhichOneof("value")))
        for each in holder.attributes
    }
