"""Take this host out of service and back, over the control socket: drain undrain."""

from collections.abc import Mapping
from typing import Any

import click

from schemas.codes import Code
from worker.cli.context import config_option, json_option, leave, print_json, progress, settings_of
from worker.cli.control_client import ControlClient


@click.command()
@click.option(
    "--mode",
    type=click.Choice(["wait", "sleep", "stop"]),
    default="wait",
    show_default=True,
    help="What happens to running instances: nothing, Sleep, or Stop.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, max=7 * 24 * 3600),
    metavar="S",
    help="Stop waiting after S seconds; the drain goes on. Default: wait until it is done.",
)
@config_option
@json_option
def drain(mode: str, timeout_s: float | None, config: str | None, as_json: bool) -> None:
    """Take no new VMs; running ones stay, sleep or stop.

    Waits until no instance has a VMM any more. Exits with 15 if some still have. The drain stays
    in effect, also after a restart or Ctrl-C, until `hostd undrain`.
    """
    settings = settings_of(config)
    shown = ""

    def show(counts: Mapping[str, Any]) -> None:
        nonlocal shown
        if as_json:
            print_json({"progress": counts})
        elif shown != (shown := describe(counts)):
            progress(shown)

    body = {"mode": mode} | ({} if timeout_s is None else {"timeout_s": timeout_s})
    try:
        result = ControlClient(settings).follow("/v1/drain", body, show)
    except KeyboardInterrupt:
        progress("the drain goes on; `hostd undrain` ends it")
        raise
    if as_json:
        print_json({"result": result})
    else:
        click.echo("\n".join(describe_result(result)))
    if not result["empty"]:
        leave(Code.UNAVAILABLE)


@click.command()
@config_option
@json_option
def undrain(config: str | None, as_json: bool) -> None:
    """Take new VMs again: end a drain, or the quarantine of launches."""
    answer = ControlClient(settings_of(config)).post("/v1/undrain", {})
    if as_json:
        print_json(answer)
    else:
        changed = answer["was_draining"] or answer["was_quarantined"]
        click.echo("ok" if changed else "ok: the host was not draining (no change)")


def describe(counts: Mapping[str, Any]) -> str:
    """One line of progress."""
    parts = [f"{counts['in_use']} instances in use"]
    parts += [
        f"{counts[name]} {name.replace('_', ' ')}"
        for name in ("in_progress", "done", "failed", "unknown")
        if counts[name]
    ]
    return f"draining ({counts['mode']}): {', '.join(parts)}"


def describe_result(result: Mapping[str, Any]) -> list[str]:
    """The outcome, and each instance that still has a VMM."""
    if result["empty"]:
        return ["ok: no instance has a VMM; the host takes no new ones until `hostd undrain`"]
    lines = [f"{result['in_use']} instances still have a VMM; the drain stays in effect"]
    for each in result["left"]:
        ref = f"{each['tenant_id']}/{each['pool_id']}/{each['instance_id']}"
        why = f": {each['code']}: {each['message']}" if "code" in each else ""
        lines.append(f"  {ref} {each['status']}{why}")
    if more := result["in_use"] - len(result["left"]):
        lines.append(f"  and {more} more")
    return lines
