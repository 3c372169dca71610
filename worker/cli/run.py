"""`hostd run`: the worker process."""

import faulthandler
import os
from functools import partial

import click

from schemas.settings import Settings
from worker import logs
from worker import main as worker_main
from worker.cli.context import CliError, config_option, path_of, settings_of
from worker.descriptors import raise_limit
from worker.log_writer import LogWriter, open_standard_descriptors
from worker.preflight import find_uid_overlap
from worker.settings import load


@click.command()
@config_option
@click.option("--json", is_flag=True, help="Accepted for consistency; logs are always JSON.")
def run(config: str | None, json: bool) -> None:
    """Run the worker until SIGTERM or SIGINT. VMs outlive it. SIGHUP reloads settings."""
    del json
    settings = settings_of(config)
    check_uids(settings)
    if os.geteuid() != 0:
        raise CliError(
            "host_fault",
            "cannot run the worker as an ordinary user: it creates interfaces, cgroups and jails; "
            "run it as root",
        )
    open_standard_descriptors()
    # The watchdog's SIGABRT, and every fault, leaves the stacks of all threads on stderr.
    faulthandler.enable(2)
    raise_limit()
    writer = LogWriter(1)
    logs.configure(settings.log.level, writer=writer)
    read = partial(load, path_of(config), os.environ)
    try:
        code = worker_main.run(settings, read)
    finally:
        writer.close()
    raise SystemExit(code)


def check_uids(settings: Settings) -> None:
    """Refuse a jail uid range that overlaps a local user, group or subordinate id range.

    Raises:
        CliError: `invalid`; the message names the file and the owner of the overlapping ids.
    """
    vmm = settings.vmm
    if taken := find_uid_overlap(vmm.uid_base, vmm.uid_count):
        last = taken.first + taken.count - 1
        ids = f"uid {taken.first}" if taken.count == 1 else f"uids {taken.first}-{last}"
        raise CliError(
            "invalid",
            f"vmm.uid_base, vmm.uid_count: uid range overlaps {taken.owner} in {taken.file} "
            f"({ids}); choose an unused range",
        )
