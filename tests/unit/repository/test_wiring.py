"""Each command variant and each event kind is known everywhere it must be."""

import importlib
import re
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from click.testing import CliRunner

from handlers.registry import HANDLERS
from schemas import codec
from schemas.envelopes import EventKind, Form
from schemas.requests import Ping, Request, TenantNet
from schemas.serde import REQUEST
from tests.unit.instance import test_commands
from worker.cli import commands
from worker.cli.main import COMMANDS

ROOT = Path(__file__).parents[3]
VARIANTS: frozenset[type[Any]] = frozenset(get_args(Request))
NET = TenantNet(3, "10.240.3.0/24", "10.240.3.1", "br-tenant-3")


def requests_of_the_cli(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What each command of `worker/cli/commands.py` sends."""
    sent: list[Request] = []

    def send(request: Request, **_options: object) -> None:
        sent.append(request)

    def tenant_net(_config: object, _tenant_id: str) -> TenantNet:
        return NET

    monkeypatch.setattr(commands, "send", send)
    monkeypatch.setattr(commands, "tenant_net", tenant_net)
    for target in COMMANDS.values():
        module, _, name = target.partition(":")
        if module != commands.__name__:
            continue
        command: click.Command = getattr(importlib.import_module(module), name)
        arguments = [p.name or "" for p in command.params if isinstance(p, click.Argument)]
        result = CliRunner().invoke(command, ["x" for _ in arguments])
        assert result.exit_code == 0, result.output
    return sent


def test_every_command_variant_is_wired(monkeypatch: pytest.MonkeyPatch) -> None:
    handled = VARIANTS - {Ping}  # Ping is answered at intake

    assert set(HANDLERS) == handled
    assert {kind.__name__ for kind in VARIANTS} == set(REQUEST._shapes)
    assert {type(request) for request in requests_of_the_cli(monkeypatch)} == VARIANTS
    assert {type(request) for request in test_commands.COMMANDS.values()} == handled


def test_every_variant_has_its_wire_name_and_survives_both_forms() -> None:
    samples = (Ping(), *test_commands.COMMANDS.values())

    assert {type(request) for request in samples} == VARIANTS
    for request in samples:
        assert request.kind == type(request).__name__
        for form in Form:
            assert codec.decode_request(codec.encode_request(request, form)) == request


def test_every_event_kind_has_an_emitter() -> None:
    paths = [*(ROOT / "handlers").rglob("*.py"), *(ROOT / "worker").rglob("*.py")]
    source = "\n".join(path.read_text() for path in paths)

    assert set(re.findall(r"\bEventKind\.([A-Z_]+)\b", source)) == set(EventKind.__members__)


def test_the_contract_lists_the_event_kinds() -> None:
    contract = (ROOT / "docs/contract.md").read_text()

    (listed,) = re.findall(r"Kinds: `([a-z_, ]+)`", contract)
    assert listed.split(", ") == [kind.value for kind in EventKind]
