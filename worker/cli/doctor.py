"""`hostd doctor`: checks of this host, and of its worker if one runs."""

import asyncio
from collections.abc import Sequence
from importlib.metadata import version

import click
import msgspec

from schemas.settings import Settings
from worker.cli.context import CliError, NoWorker, config_option, json_option, load, print_json
from worker.cli.control_client import ControlClient
from worker.doctor.findings import Finding, Severity, run_checks
from worker.doctor.host_checks import HostChecks

FOUND = 1  # the exit code if something needs an action


@click.command()
@click.option("--no-worker", is_flag=True, help="Check the host only: no worker is meant to run.")
@config_option
@json_option
def doctor(no_worker: bool, config: str | None, as_json: bool) -> None:
    """Check this host and its worker; say what to run.

    Exits with 1 if something needs an action. Changes nothing.
    """
    found = [*diagnose(config, no_worker=no_worker)]
    found.sort(key=lambda finding: list(Severity).index(finding.severity))
    if as_json:
        print_json({"findings": [msgspec.to_builtins(finding) for finding in found]})
    else:
        for finding in found:
            click.echo("\n".join(describe(finding)))
        click.echo(summary(found))
    if any(finding.severity is not Severity.INFO for finding in found):
        raise SystemExit(FOUND)


def diagnose(config: str | None, *, no_worker: bool) -> Sequence[Finding]:
    """All findings; settings that cannot be read are the only one."""
    try:
        settings = load(config).settings
    except CliError as error:
        why = "nothing of hostd starts, and nothing else can be checked"
        return [Finding(Severity.ERROR, "settings", error.message, why, "hostd check-config")]
    of_host = asyncio.run(run_checks(HostChecks(settings).all()))
    return [*of_host, *(() if no_worker else of_worker(settings))]


def of_worker(settings: Settings) -> Sequence[Finding]:
    """What the worker finds, or that there is none."""
    try:
        answer = ControlClient(settings).get("/v1/doctor")
        found = msgspec.convert(answer["findings"], list[Finding])
    except NoWorker as error:
        why = "no command is taken; VMs keep running"
        return [Finding(Severity.ERROR, "worker", error.message, why, "systemctl status hostd")]
    except CliError as error:
        why = "the worker hangs, is stopping, or is of another version"
        return [Finding(Severity.ERROR, "worker", error.message, why, "journalctl -u hostd")]
    except (KeyError, msgspec.ValidationError) as error:
        why = "worker and command line are of different versions"
        return [Finding(Severity.ERROR, "worker", str(error), why, "systemctl restart hostd")]
    running, here = answer.get("version"), version("hostd")
    if running != here:
        what = f"the worker runs version {running}, installed is {here}"
        why = "the update is not in effect"
        run = "systemctl restart hostd"
        found.append(Finding(Severity.WARNING, "version", what, why, run))
    return found


def describe(finding: Finding) -> list[str]:
    """One finding as text."""
    return [
        f"{finding.severity}: {finding.what} [{finding.check}]",
        f"  why: {finding.why}",
        f"  run: {finding.run}",
    ]


def summary(found: Sequence[Finding]) -> str:
    counts = dict.fromkeys(Severity, 0)
    for finding in found:
        counts[finding.severity] += 1
    if not any(counts.values()):
        return "ok: no findings"
    return ", ".join(f"{count} {severity}" for severity, count in counts.items() if count)
