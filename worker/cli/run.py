"""The worker itself: `hostd run`."""

import click

from schemas.settings import Settings
from worker import logs
from worker import main as worker_main
from worker.cli.context import CliError, config_option, settings_of
from worker.preflight import find_uid_overlap


@click.command()
@config_option
@click.option("--json", is_flag=True, help="Taken for uniformity: its logs are JSON anyway.")
def run(config: str | None, json: bool) -> None:
    """Run the worker of this host until SIGTERM or SIGINT; VMs go on running."""
    del json
    settings = settings_of(config)
    check_uids(settings)
    logs.configure(settings.log.level)
    raise SystemExit(worker_main.run(settings))


def check_uids(settings: Settings) -> None:
    """That no user of this host has a uid of the jails. Raises CliError, `invalid`."""
    vmm = settings.vmm
    if taken := find_uid_overlap(vmm.uid_base, vmm.uid_count):
        raise CliError(
            "invalid",
            f"vmm.uid_base, vmm.uid_count: {taken.file} gives {taken.count} of these ids, "
            f"from {taken.first} on, to {taken.owner}; choose a range that nobody has",
        )
