"""Spans of a real host in a real collector; and what a collector that is none changes: nothing."""

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from schemas.requests import StartInstance
from schemas.trace_context import parse
from tests.collector import collector
from tests.constants import DESTROY, NAMES, START
from tests.crash.kills import until
from tests.fakes.otlp_server import attributes_of, otlp_server
from tests.live_host import LiveHost, live_host
from worker.failpoints import FILE, POINT

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


def tracing(url: str) -> dict[str, str]:
    return {"HOSTD_TRACE_ENDPOINT": url}


def lines(host: LiveHost) -> list[dict[str, Any]]:
    return [json.loads(line) for line in host.log().splitlines() if line.startswith("{")]


async def test_a_command_is_one_trace_from_its_envelope_to_the_collector() -> None:
    async with live_host(worker=False) as host:
        with otlp_server() as sink:
            with collector(sink.url) as url:
                await host.start_worker(environment=tracing(url))
                await host.net_up(host.seed())
                await host.publish(START, "c1", traceparent=PARENT, tracestate="a=1")
                reply = await host.result("c1")
                spans = sink.wait_spans("StartInstance", "publish reply", "publish event", "vmm")
                assert (await host.run(DESTROY))["code"] == "ok"
            kept = await host.kept(host.subjects.events_stream)
            (done,) = [
                each
                for each in lines(host)
                if each["event"] == "command.done" and each["command_id"] == "c1"
            ]

    own = {each.span_id.hex(): each for each in spans if each.trace_id.hex() == TRACE}
    (root,) = [each for each in own.values() if each.name == "StartInstance"]
    context = parse(reply["traceparent"], reply["tracestate"])
    assert context is not None
    assert (root.parent_span_id.hex(), root.trace_state) == (SPAN, "a=1")
    assert (context.trace_id, context.span_id) == (TRACE, root.span_id.hex())
    assert (done["trace_id"], done["span_id"]) == (TRACE, context.span_id)
    assert sum(context.traceparent.encode() in data for _, _, data in kept) >= 2
    above = {each.name: own.get(each.parent_span_id.hex()) for each in own.values()}
    (attempt,) = [each for each in own.values() if each.name == "attempt"]
    steps = {step["name"] for step in reply["steps"]}
    assert {"vmm", "tap", "cgroup"} <= steps <= above.keys()
    assert all(above[name] == attempt for name in steps)
    for name in ("attempt", "lane wait", "publish reply", "publish event"):
        assert above[name] == root
    found = attributes_of(root)
    assert (found["hostd.code"], found["hostd.attempts"]) == ("ok", 1)
    assert [found[f"hostd.{name}.id"] for name in ("tenant", "pool", "instance")] == list(NAMES)
    # The network's command came without a context, and is a trace of its own.
    (network,) = [each for each in spans if each.name == "SetupNetwork"]
    assert (network.parent_span_id, network.trace_id == root.trace_id) == (b"", False)
    resource = attributes_of(sink.requests[0].resource_spans[0].resource)
    assert (resource["service.name"], resource["host.id"]) == ("hostd", host.host_id)


async def test_after_a_kill_the_next_worker_goes_on_in_the_same_trace() -> None:
    async with live_host(worker=False) as host:
        with otlp_server() as sink, collector(sink.url) as url:
            await host.start_worker(environment=tracing(url))
            await host.net_up(host.seed())
            await host.stop_worker()
            reached = f"{host.directory}/reached"
            stopping = {POINT: "before:vmm", FILE: reached}
            await host.start_worker(environment=tracing(url) | stopping)
            await host.publish(START, "c1", traceparent=PARENT)
            await until(Path(reached).exists, "the failpoint")
            await host.kill_worker()
            await host.start_worker(environment=tracing(url))

            reply = await host.result("c1")
            spans = sink.wait_spans("StartInstance", "vmm")

    (root,) = [each for each in spans if each.name == "StartInstance"]
    assert root.trace_id.hex() == TRACE
    assert root.parent_span_id.hex() == SPAN
    assert attributes_of(root)["hostd.recovered"] is True
    assert reply["traceparent"] == f"00-{TRACE}-{root.span_id.hex()}-01"


async def test_what_no_command_asked_for_is_traced_and_linked_to_the_last_command() -> None:
    async with live_host(worker=False) as host:
        with otlp_server() as sink, collector(sink.url) as url:
            await host.start_worker(environment=tracing(url))
            await host.net_up(host.seed())
            reply = await host.run(START)
            os.kill(reply["detail"]["pid"], signal.SIGKILL)
            spans = sink.wait_spans("StartInstance", "vmm exited", "recovery", "sweep")
            assert (await host.run(START))["code"] == "ok"
            await host.kill_worker()
            await host.start_worker(environment=tracing(url))
            (adopted,) = [each for each in sink.wait_spans("vmm adopted") if "adopt" in each.name]
            assert (await host.run(DESTROY))["code"] == "ok"

    (start,) = [each for each in spans if each.name == "StartInstance"]
    (exited,) = [each for each in spans if each.name == "vmm exited"]
    assert [(each.trace_id, each.span_id) for each in exited.links] == [
        (start.trace_id, start.span_id)
    ]
    assert (exited.parent_span_id, exited.trace_id == start.trace_id) == (b"", False)
    found = attributes_of(exited)
    assert found["hostd.command.id"] == reply["id"]
    assert "hostd.vmm.end" in found  # which of its reasons depends on the kernel of this host
    assert attributes_of(adopted)["hostd.result"] == "adopted"


async def test_a_collector_that_hangs_or_is_down_changes_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        async with live_host(worker=False) as host:
            await host.start_worker(environment=tracing(url))
            await host.net_up(host.seed())
            assert (await host.run(StartInstance(*NAMES)))["code"] == "ok"
            began_s = time.monotonic()
            assert await host.stop_worker() == 0
            assert time.monotonic() - began_s < 10

            hanging.close()
            await host.start_worker(environment=tracing(url))
            assert (await host.run(DESTROY))["code"] == "ok"
            assert await host.stop_worker() == 0
            failures = [each for each in lines(host) if each["event"] == "trace.export_failed"]
            assert "refused" in failures[-1]["error"]
