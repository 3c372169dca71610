"""`make bench-page`: frames of the fleet page, 200 hosts, 10,000 instances, 500 events a second.

Measured in Chromium, for each view: the work of each frame, from its start until the message that
follows its layout and paint, and the tasks over 50 ms of the main thread. Prints one line per view.
"""

import asyncio
import contextlib
import tempfile
import time
from pathlib import Path

import msgpack

from schemas.subjects import Subjects
from tests.broker.server import connection_to, running_server
from tests.page.browser import browser, served, sign_in
from worker.bus.connection import Connection
from worker.bus.provision import provision

HOSTS, INSTANCES, EVENTS_PER_S = 200, 10_000, 500
CELL = Subjects("hostd.v1.default", "h0", "default")
SECONDS = 10
VIEWS = ("hosts", "instances", "events", "commands")
STATUSES = ("running", "sleeping", "waking", "stopped")
MEASURE = """
async (seconds) => {
  const tasks = [];
  const watch = new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) tasks.push(entry.duration);
  });
  watch.observe({ type: "longtask" });
  const work = [];
  const frames = [];
  const channel = new MessageChannel();
  const until = performance.now() + seconds * 1000;
  let last = performance.now();
  await new Promise((resolve) => {
    const frame = (began) => {
      frames.push(began - last);
      last = began;
      const inFrame = performance.now();
      channel.port1.onmessage = () => work.push(performance.now() - inFrame);
      channel.port2.postMessage(0);
      if (performance.now() < until) requestAnimationFrame(frame);
      else resolve();
    };
    requestAnimationFrame(frame);
  });
  watch.disconnect();
  return { frames, work, tasks };
}
"""


def value(number: int, seq: int) -> bytes:
    return msgpack.packb(
        {
            "v": 1,
            "status": STATUSES[(number + seq) % len(STATUSES)],
            "journal_id": "j",
            "seq": seq,
            "at_ms": int(time.time() * 1000),
            "since_ms": int(time.time() * 1000),
            "launch": seq % 100,
            "revision": "e852c21a8f3eebbc399a6aff661fc278",
        }
    )


def names(number: int) -> tuple[str, str]:
    """Host and lane of an instance."""
    return f"h{number % HOSTS}", f"instance.t{number % 50}.web.i{number}"


async def fill(connection: Connection) -> None:
    now_ms = int(time.time() * 1000)
    for number in range(HOSTS):
        lease = {"status": "ready", "worker_id": "w", "at_ms": now_ms, "capacity": {"vcpus": 64}}
        lease |= {"lease_until_ms": now_ms + 3_600_000, "version": "0.1.0"}
        await connection.send(f"$KV.{CELL.state_bucket}.h{number}.host", msgpack.packb(lease))
    for number in range(INSTANCES):
        host, lane = names(number)
        await connection.send(f"$KV.{CELL.state_bucket}.{host}.{lane}", value(number, 1))
    host, lane = names(0)
    last = await connection.request(f"$KV.{CELL.state_bucket}.{host}.{lane}", value(0, 1))
    assert b'"seq"' in last.data, last.data


async def churn(connection: Connection) -> None:
    """500 events a second, each with the state that it leads to, in bursts of a fiftieth."""
    seq, at = 1, time.monotonic()
    while True:
        for _ in range(EVENTS_PER_S // 50):
            seq += 1
            number = seq * 7919 % INSTANCES
            host, lane = names(number)
            event = {"id": f"{host}:j:{seq}", "journal_id": "j", "seq": seq, "from": "waking"}
            event |= {"at_ms": int(time.time() * 1000), "to": STATUSES[seq % 4], "detail": {}}
            kind = "status" if seq % 4 else "command"
            await connection.send(f"{CELL.root}.{host}.evt.{lane}.{kind}", msgpack.packb(event))
            await connection.send(f"$KV.{CELL.state_bucket}.{host}.{lane}", value(number, seq))
        at += 0.02
        await asyncio.sleep(max(0.0, at - time.monotonic()))


def at(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def measure() -> None:
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        server = await stack.enter_async_context(running_server(Path(directory), web=True))
        connection = await stack.enter_async_context(connection_to(server.url))
        await provision(connection, CELL, ["h0"])
        await fill(connection)
        url = stack.enter_context(served(Path("build/dashboard")))
        chromium = await stack.enter_async_context(browser(url))
        page = await stack.enter_async_context(chromium.page())
        began = time.monotonic()
        await sign_in(page, server.web_url, "", "", "")
        took_s = time.monotonic() - began
        print(f"{HOSTS} hosts and {INSTANCES} instances read in {took_s:.1f} s")
        writer = asyncio.create_task(churn(connection))
        stack.callback(writer.cancel)
        for view in VIEWS:
            await page.evaluate(f"location.hash = '#/{view}'")
            found = await page.evaluate(MEASURE, SECONDS)
            work, frames, tasks = found["work"][5:], found["frames"][5:], found["tasks"]
            over = sum(each > 16 for each in work)
            print(
                f"{view:<10} work in a frame: median {at(work, 0.5):5.1f} ms, "
                f"99 % {at(work, 0.99):5.1f} ms, longest {max(work):5.1f} ms, "
                f"{over} of {len(work)} over 16 ms; {len(frames) / SECONDS:.0f} frames a second; "
                f"{len(tasks)} tasks over 50 ms"
            )


if __name__ == "__main__":
    asyncio.run(measure())
