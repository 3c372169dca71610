"""Look into this host's worker over its control socket: dump top."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

import click

from worker.cli.context import config_option, json_option, print_json, settings_of, text_of
from worker.cli.control_client import ControlClient


@click.command()
@config_option
@json_option
def dump(config: str | None, as_json: bool) -> None:
    """Print the worker's full state: commands, lanes, locks, threads."""
    answer = ControlClient(settings_of(config)).get("/v1/dump")
    if as_json:
        print_json(answer)
        return
    for line in lines_of(answer):
        click.echo(line)


def lines_of(value: Mapping[str, object], indent: str = "") -> Iterator[str]:
    """Nested maps and lists as indented text, one fact per line."""
    for name, inner in value.items():
        if facts := _facts_in(inner):
            yield f"{indent}{name}:"
            yield from lines_of(facts, f"{indent}  ")
        elif items := _maps_in(inner):
            yield f"{indent}{name}:"
            yield from (f"{indent}  - {text_of(each)}" for each in items)
        else:
            yield f"{indent}{name}: {text_of(inner, name)}"


def _facts_in(value: object) -> Mapping[str, object]:
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def _maps_in(value: object) -> list[object]:
    """The items of a list of maps; nothing of any other value."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    return items if any(isinstance(each, dict) for each in items) else []


@click.command()
@click.option("--once", is_flag=True, help="Print once and exit.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.5, max=3600),
    default=2.0,
    show_default=True,
    metavar="S",
    help="Seconds between two looks.",
)
@config_option
@json_option
def top(once: bool, interval_s: float, config: str | None, as_json: bool) -> None:
    """Show instances, lanes, commands and rates, live.

    With --json, one object per look and line.
    """
    client = ControlClient(settings_of(config))
    before: tuple[float, Mapping[str, Any]] | None = None
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            now = time.monotonic(), client.get("/v1/top")
            if as_json:
                print_json(now[1])
            else:
                if not once:
                    click.clear()
                click.echo("\n".join(view_of(now, before)))
            if once:
                return
            before = now
            time.sleep(interval_s)


def view_of(
    now: tuple[float, Mapping[str, Any]], before: tuple[float, Mapping[str, Any]] | None
) -> Iterator[str]:
    """One screen; rates are those since the look before."""
    at_s, top = now
    state = f"{top['host_id']}: {top['host_state']}"
    if top["failed_checks"]:
        state += f", not ready: {', '.join(top['failed_checks'])}"
    yield f"{state}, NATS {'connected' if top['connected'] else 'away'}"
    capacity = top["capacity"]
    yield (
        f"instances: {text_of(top['instances'])}; networks {top['networks']}; "
        f"memory free {capacity['mem_free_mib']} of {capacity['mem_mib']} MiB"
    )
    lanes, finished = top["lanes"], top["finished"]
    line = (
        f"commands: {top['unfinished']} unfinished, {lanes['busy']} lanes busy, "
        f"{lanes['waiting']} with a queue; {finished['ok']} ok, {finished['failed']} failed"
    )
    if before is not None and at_s > before[0]:
        done = sum(finished.values()) - sum(before[1]["finished"].values())
        line += f"; {done / (at_s - before[0]):.1f} per second"
    yield f"{line}; {top['unsent']} unsent"
    used = [
        f"{name} {slot['held']}/{slot['count']}"
        + (f" +{slot['waiting']} waiting" if slot["waiting"] else "")
        for name, slot in top["slots"].items()
    ]
    yield f"slots: {', '.join(used)}"
    for each in top["running"]:
        steps = ", ".join(each["steps"]) or "between two steps"
        about = f"{each['type']:<16} {each['lane']}  {steps}"
        yield f"  {each['since_s']:>8.1f} s  {about}  {each['id']}"
