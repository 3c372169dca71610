"""`hostd check-config`: validate the settings and print the effective ones."""

import json
from typing import Any

import click

from handlers.errors import Failure
from handlers.host.net.policy_file import read_policy
from schemas.network_policy import NetworkPolicy, denied_networks
from schemas.settings import NetworkSettings, Settings
from worker.cli.context import CliError, config_option, json_option, load, print_json
from worker.settings import DEFAULT, Key, Loaded, keys


@click.command("check-config")
@config_option
@json_option
def check_config(config: str | None, as_json: bool) -> None:
    """Validate and print the settings, and show what guests reach."""
    loaded = load(config)
    policy = load_policy(loaded.settings.network.policy)
    if as_json:
        print_json(
            {
                key.dotted: {
                    "value": value_of(loaded.settings, key),
                    "unit": key.unit,
                    "from": loaded.origins[key.dotted],
                    "default": key.default,
                }
                for key in keys()
            }
        )
        return
    click.echo("\n".join([*describe(loaded), "", *reachable(loaded.settings.network, policy)]))


def reachable(settings: NetworkSettings, policy: NetworkPolicy) -> list[str]:
    """What guests can reach, as comments: all but the denied networks, and tenants' exceptions."""
    lines = [
        "# Guests reach every IPv4 network that this host reaches, masqueraded as the host, except",
        f"#   {', '.join(denied_networks(settings))}",
    ]
    if not policy.allowed:
        return [*lines, "# No tenant has a policy of its own ([network] policy)."]
    lines.append("# and what [network] policy changes for these tenants:")
    for tenant in sorted(policy.allowed):
        also = ", ".join(policy.allowed[tenant]) or "nothing"
        less = ", ".join(policy.denied[tenant]) or "nothing"
        lines.append(f"#   {tenant}: also allowed {also}; also denied {less}")
    return lines


def load_policy(path: str) -> NetworkPolicy:
    """The policy file's content; of no file, an empty one.

    Raises:
        CliError: what a worker would refuse at its start: it cannot be read, is invalid, or others
            may write it.
    """
    if not path:
        return NetworkPolicy()
    try:
        _, policy = read_policy(path, None)
    except Failure as failure:
        raise CliError(failure.code.value, failure.message) from failure
    return policy or NetworkPolicy()


def value_of(settings: Settings, key: Key) -> Any:
    return getattr(getattr(settings, key.table), key.name)


def describe(loaded: Loaded) -> list[str]:
    """The effective settings as TOML; a comment gives unit and origin."""
    lines: list[str] = []
    table = ""
    for key in keys():
        if key.table != table:
            table = key.table
            lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
        pair = f"{key.name} = {toml(value_of(loaded.settings, key))}"
        origin = loaded.origins[key.dotted]
        notes = [key.unit] if key.unit else []
        notes.append(origin if origin == DEFAULT else f"from {origin}")
        lines.append(f"{pair:<44} # {', '.join(notes)}")
    return lines


def toml(value: object) -> str:
    """A value in TOML; strings, numbers, booleans and lists of strings are the same in JSON."""
    return json.dumps(value, ensure_ascii=False)
