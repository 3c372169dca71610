"""Runs the command line in this process, with settings from the environment only."""

from click.testing import CliRunner, Result

from worker.cli.main import main

HOST = {"HOSTD_HOST_ID": "h1"}


def hostd(*args: str, **env: str) -> Result:
    return CliRunner().invoke(main, args, env={**HOST, "HOSTD_CONFIG": None, **env})
