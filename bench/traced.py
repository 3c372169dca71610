"""The worker, with a record of when its parts began and ended; see `bench_host(program=...)`.

Written as JSON to `trace.json` in `[paths] run` when the worker ends. Times are of CLOCK_MONOTONIC.
"""

import atexit
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from handlers.host.vmm.jailer import Jailer
from handlers.steps import Steps
from worker.cli.main import main
from worker.dispatch import Dispatch
from worker.intake import Intake
from worker.journal.transaction import OutRow
from worker.journal.writer import Writer
from worker.outbox import Outbox

TRACE = "trace.json"
spans: list[tuple[str, float, float]] = []


def trace(owner: type, name: str, label: Callable[..., str]) -> None:
    """Record each call of a coroutine method; `label` gets its arguments."""
    original = getattr(owner, name)

    @functools.wraps(original)
    async def traced(*args: Any, **options: Any) -> Any:
        began = time.monotonic()
        try:
            return await original(*args, **options)
        finally:
            spans.append((label(*args), began, time.monotonic()))

    setattr(owner, name, traced)


def trace_commits() -> None:
    original: Callable[..., Any] = getattr(Writer, "_transact")  # noqa: B009

    def traced(writer: Writer, connection: Any, batch: Any) -> Any:
        began = time.monotonic()
        try:
            return original(writer, connection, batch)
        finally:
            durable = any(part.durable for part in batch)
            name = "commit, synced" if durable else "commit"
            spans.append((f"- {name}", began, time.monotonic()))

    setattr(Writer, "_transact", traced)  # noqa: B010


def step_name(_steps: Any, name: str, *_: Any) -> str:
    return name


def sent_kind(_outbox: Any, sent: OutRow) -> str:
    return f"- {sent.kind} sent"


def write() -> None:
    Path(os.environ["HOSTD_PATHS_RUN"], TRACE).write_text(json.dumps(spans), encoding="ascii")


if __name__ == "__main__":
    trace(Intake, "receive", lambda *_: "taken in from the stream")
    trace(Dispatch, "_finish", lambda *_: "outcome")
    trace(Steps, "_timed", step_name)
    trace(Jailer, "run", lambda *_: "- jailer, spawn to exit")
    trace(Outbox, "_send_one", sent_kind)
    trace_commits()
    atexit.register(write)
    main(["run"], prog_name="hostd")
