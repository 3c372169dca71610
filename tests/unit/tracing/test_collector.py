"""Spans as OTLP: what is in the bytes that are posted, and how answers are understood."""

import socket
import subprocess
import sys

import pytest

from handlers.errors import HostFault
from schemas.settings import HostSettings, Settings, TraceSettings
from schemas.trace_context import TraceContext
from tests.fakes.otlp_server import Otlp, attributes_of, otlp_server
from worker.tracing.collector import Collector
from worker.tracing.exporter import ExportError
from worker.tracing.setup import open_exporter, tracing_of
from worker.tracing.spans import Span

PARENT = TraceContext("ab" * 16, "cd" * 8, sampled=True, state="a=1,b=2")
CONTEXT = PARENT._replace(span_id="ef" * 8)
FACTS = {"service.name": "hostd"}
GOOD = Span(CONTEXT, PARENT, "StartInstance", "consumer", 10**18, 10**18 + 5, {"a": "x", "n": 1})
LINKS = (PARENT, CONTEXT._replace(trace_id="01" * 16))
BAD = Span(CONTEXT, None, "publish reply", "producer", 1, 2, {"b": True}, "host_fault: no", LINKS)


def collector(otlp: Otlp, **more: float) -> Collector:
    return Collector(otlp.url, ca="", facts=FACTS, version="0.1.0", **more)


def test_a_span_is_sent_as_it_is() -> None:
    with otlp_server() as otlp:
        assert collector(otlp).send([GOOD, BAD]) == 0

    good, bad = otlp.spans()
    assert good.trace_id.hex() == bad.trace_id.hex() == "ab" * 16
    assert (good.span_id.hex(), good.parent_span_id.hex()) == ("ef" * 8, "cd" * 8)
    assert good.trace_state == "a=1,b=2"
    assert (good.name, good.kind, good.status.code) == ("StartInstance", 5, 1)
    assert (good.start_time_unix_nano, good.end_time_unix_nano) == (10**18, 10**18 + 5)
    assert attributes_of(good) == {"a": "x", "n": 1}
    assert (bad.parent_span_id, bad.kind, bad.status.code) == (b"", 4, 2)
    assert bad.status.message == "host_fault: no"
    assert not good.links
    assert [(each.trace_id.hex(), each.span_id.hex()) for each in bad.links] == [
        (each.trace_id, each.span_id) for each in LINKS
    ]
    (resource,) = [each.resource for each in otlp.requests[0].resource_spans]
    assert attributes_of(resource) == FACTS


@pytest.mark.parametrize(
    ("status", "again"), [(400, False), (404, False), (302, False), (429, True), (503, True)]
)
def test_an_answer_that_is_not_success_is_an_error(status: int, again: bool) -> None:
    with otlp_server() as otlp:
        otlp.status = status
        with pytest.raises(ExportError, match=str(status)) as caught:
            collector(otlp).send([GOOD])

    assert caught.value.again is again


def test_rejected_spans_are_counted_within_bounds() -> None:
    with otlp_server() as otlp:
        otlp.rejected = 1
        assert collector(otlp).send([GOOD, BAD]) == 1
        otlp.rejected = 1 << 40
        assert collector(otlp).send([GOOD, BAD]) == 2


def test_no_collector_and_one_that_hangs_are_errors_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        with pytest.raises(ExportError, match="timed out"):
            collector(Otlp(url), timeout_s=0.1).send([GOOD])
    with pytest.raises(ExportError, match="refused") as caught:
        collector(Otlp(url)).send([GOOD])

    assert caught.value.again


def test_the_variables_of_opentelemetry_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "OTEL_SDK_DISABLED": "true",
        "OTEL_RESOURCE_ATTRIBUTES": "service.name=other,more=1",
        "OTEL_SERVICE_NAME": "other",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=secret",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
        "OTEL_TRACES_SAMPLER": "always_off",
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "1",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "http_proxy": "http://127.0.0.1:1",
    }.items():
        monkeypatch.setenv(name, value)

    with otlp_server() as otlp:
        collector(otlp).send([GOOD])

    assert attributes_of(otlp.spans()[0]) == {"a": "x", "n": 1}
    assert attributes_of(otlp.requests[0].resource_spans[0].resource) == FACTS


def test_without_an_endpoint_there_is_no_exporter() -> None:
    assert open_exporter(Settings(), "h") is None
    assert tracing_of(Settings(), None).of("c1", None) is None


def test_without_an_endpoint_opentelemetry_is_not_imported() -> None:
    code = "import sys, worker.main; sys.exit('opentelemetry' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "worker.tracing.collector")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    settings = Settings(trace=TraceSettings(endpoint="http://127.0.0.1:4318"))

    with pytest.raises(HostFault, match=r"install hostd\[otel\], or unset"):
        open_exporter(settings, "h")


def test_an_unreadable_ca_file_is_named() -> None:
    trace = TraceSettings(endpoint="https://127.0.0.1:4318", ca="/nonexistent/ca.pem")

    with pytest.raises(HostFault, match=r"/nonexistent/ca\.pem"):
        open_exporter(Settings(host=HostSettings(id="h1"), trace=trace), "h")
