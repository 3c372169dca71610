"""Calls that block run in threads that may hang: `CallThreads`, or one with a reason here."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
OTHERS = re.compile(r"\b(ThreadPoolExecutor\(|threading\.Thread\(|to_thread\(|run_in_executor\()")
WATCHED = "the watchdog sees that it hangs"
START = "at the start, before any command"
NOBODY_WAITS = "nothing waits for it but the end of the process"
PROCESS_OF_ITS_OWN = "a command line or a demo, which ends with it"
ALLOWED = {
    "handlers/host/linux/call_threads.py": "these are the threads",
    "handlers/host/inventory.py": "runs within a slow thread, which is abandoned with it",
    "handlers/host/net/taps.py": "closes a TAP that was released; who waits for it has a limit",
    "handlers/host/snapshot/discards.py": NOBODY_WAITS,
    "handlers/host/snapshot/snapshots.py": "hashes memory in the background",
    "worker/bus/connection.py": "reads a CA file while it connects",
    "worker/client/blocking.py": "of another program, in which it runs the client",
    "worker/control/dump.py": "writes a dump on SIGUSR1, which nothing waits for",
    "worker/control/server.py": "encodes an answer: only computes",
    "worker/doctor/host_checks.py": PROCESS_OF_ITS_OWN,
    "worker/demo/command.py": PROCESS_OF_ITS_OWN,
    "worker/demo/host.py": PROCESS_OF_ITS_OWN,
    "worker/demo/nats_server.py": PROCESS_OF_ITS_OWN,
    "worker/demo/page.py": PROCESS_OF_ITS_OWN,
    "worker/journal/reader.py": "answers questions, which have a limit of their own",
    "worker/journal/store.py": START,
    "worker/journal/writer.py": WATCHED,
    "worker/log_writer.py": "a log that is not taken is dropped",
    "worker/reconcile/adoption.py": START,
    "worker/tracing/exporter.py": "spans that nobody takes are dropped",
    "worker/reload.py": "reads the settings again on SIGHUP",
}


def test_no_other_thread_can_hang_unnoticed() -> None:
    found = {
        str(path.relative_to(ROOT))
        for top in ("handlers", "worker", "schemas")
        for path in (ROOT / top).rglob("*.py")
        if OTHERS.search(path.read_text(encoding="utf-8"))
    }

    assert found == ALLOWED.keys()
