"""Tracing as the settings say, with the thread that exports, or without."""

from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version

from handlers.errors import HostFault
from schemas.settings import Settings
from worker.tracing.exporter import SpanExporter
from worker.tracing.tracing import Tracing


def open_exporter(settings: Settings, hostname: str) -> SpanExporter | None:
    """The exporter of this worker; None without `[trace] endpoint`.

    Raises:
        HostFault: OpenTelemetry is not installed, or `[trace] ca` cannot be read.
    """
    trace = settings.trace
    if not trace.endpoint:
        return None
    try:
        # Only now: with what it imports it takes 20 MiB and a quarter of a second.
        from worker.tracing.collector import Collector  # noqa: PLC0415
    except ImportError as error:
        raise HostFault(
            f"[trace] endpoint is set, but OpenTelemetry is not installed ({error}): install "
            "hostd[otel], or unset it"
        ) from error
    facts = {
        "service.name": "hostd",
        "service.version": version("hostd"),
        "service.instance.id": settings.host.id,
        "host.id": settings.host.id,
        "host.name": hostname,
        "hostd.cell": settings.host.cell,
    }
    try:
        collector = Collector(
            trace.endpoint, ca=trace.ca, facts=facts, version=facts["service.version"]
        )
    except OSError as error:
        raise HostFault(f"cannot read [trace] ca {trace.ca}: {error}") from error
    return SpanExporter(collector.send)


@contextmanager
def exporting(settings: Settings, hostname: str) -> Generator[SpanExporter | None]:
    """As `open_exporter`; closed at the end."""
    exporter = open_exporter(settings, hostname)
    try:
        yield exporter
    finally:
        if exporter is not None:
            exporter.close()


def tracing_of(settings: Settings, exporter: SpanExporter | None) -> Tracing:
    put = None if exporter is None else exporter.put
    return Tracing(settings.host.id, ratio=settings.trace.sample_ratio, put=put)
