"""The worker itself: `hostd run`."""

import importlib

import click

from worker import logs
from worker.cli.context import config_option, settings_of


@click.command()
@config_option
def run(config: str | None) -> None:
    """Run the worker of this host until SIGTERM or SIGINT; VMs go on running."""
    settings = settings_of(config)
    logs.configure(settings.log.level)
    raise SystemExit(importlib.import_module("worker.main").run(settings))
