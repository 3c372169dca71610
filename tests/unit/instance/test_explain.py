"""`explain` says what a command would do; the command, run right after it, does just that."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, get_type_hints

import pytest
from msgspec.structs import replace

from handlers import interfaces
from handlers.errors import Unavailable
from handlers.explain.plan import plan
from handlers.explain.readonly import ReadOnly, Seen, readonly_host
from handlers.interfaces import Host
from schemas.codes import Code
from schemas.envelopes import Reply
from schemas.protocol.queries import ExplainAnswer
from schemas.records import InstanceRecord, Status
from schemas.requests import Ping, Request, SleepInstance
from schemas.serde import REQUEST
from tests.constants import NAMES, REF
from tests.fakes.host import FakeHost, Gate, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.unit.instance.pairs import COMMANDS, UP
from tests.unit.instance.test_contract_table import KEEP, SLEEP, START, STOP, WAKE, WIPE

VOLUME: Final = {"workspace_id": "w", "name": "n", "mount_path": "/m", "mode": "read_only"}
Prepare = Callable[[MemoryWorker], Awaitable[None]]
FORCED: Final = SleepInstance(*NAMES, force=True)
EXPLAINED: Final = {**COMMANDS, "Destroy, kept": KEEP}


def after(*requests: Request) -> Prepare:
    async def prepare(worker: MemoryWorker) -> None:
        for request in requests:
            assert (await worker.run(request)).code is Code.OK

    return prepare


def with_record(change: Callable[[InstanceRecord], InstanceRecord], *requests: Request) -> Prepare:
    async def prepare(worker: MemoryWorker) -> None:
        await after(*requests)(worker)
        await worker.journal.records.put_instance(change(worker.record()))

    return prepare


def incomplete(status: Status, *requests: Request) -> Prepare:
    """Another command passed its point of no return and did not complete."""
    return with_record(
        lambda record: replace(record, status=status, command_id="other", before=record), *requests
    )


def in_file(status: Status) -> Prepare:
    """As agentd may have written it, without a record in the journal."""

    async def prepare(worker: MemoryWorker) -> None:
        await after(UP)(worker)
        files = worker.machine.files
        files[REF] = replace(files[REF], status=status.value)

    return prepare


async def nothing_seeded(worker: MemoryWorker) -> None:
    worker.machine.files.clear()


async def dead_vmm(worker: MemoryWorker) -> None:
    await after(UP, START)(worker)
    worker.machine.kill(worker.record().jail_id)


# Every status of an instance that a command may meet, and an instance that is none.
STATES: Final[dict[str, Prepare]] = {
    "absent": nothing_seeded,
    "no network": after(),
    "created": after(UP),
    "ready": in_file(Status.READY),
    "warm": in_file(Status.WARM),
    "running": after(UP, START),
    "running, woken": after(UP, START, SLEEP, WAKE),
    "stopped": after(UP, START, STOP),
    "sleeping": after(UP, START, SLEEP),
    "failed": with_record(lambda record: replace(record, status=Status.FAILED), UP, START, STOP),
    "unknown": with_record(lambda record: replace(record, status=Status.UNKNOWN), UP, START),
    "VMM dead": dead_vmm,
    "starting": incomplete(Status.STARTING, UP, START, STOP),
    "draining": incomplete(Status.DRAINING, UP, START),
    "snapshotting": incomplete(Status.SNAPSHOTTING, UP, START),
    "waking": incomplete(Status.WAKING, UP, START, SLEEP),
    "stopping": incomplete(Status.STOPPING, UP, START),
    "destroying": incomplete(Status.DESTROYING, UP, START),
    "destroyed": after(UP, START, WIPE),
    "destroyed, volumes kept": after(UP, START, KEEP),
}


def everything(worker: MemoryWorker) -> dict[str, Any]:
    """All that there is: the journal's rows, the fake host's state, and the worker's claims."""
    machine, host = worker.machine, worker.host
    return {
        "journal": list(worker.journal.store.reader.iterdump()),
        "machine": {
            each.name: repr(getattr(machine, each.name)) for each in dataclasses.fields(machine)
        },
        "claims": (
            repr(host.pending_reservations),
            repr(host.disk_claims),
            repr(host.seen_alive),
            host.locks.states(),
        ),
        "slots": host.slots.counts(),
        "unrecorded": host.unrecorded.vmms,
        "lanes": worker.lanes.counts(),
        "warm": sorted(host.warm.slots),
    }


async def explained(worker: MemoryWorker, request: Request) -> dict[str, Any]:
    """The answer; explaining changed nothing."""
    before = everything(worker)
    answer = await worker.explain.explain(REQUEST.write(request, compact=False))
    assert everything(worker) == before
    return dict(answer)


def same(answer: dict[str, Any], reply: Reply) -> None:
    """What was explained is what happened; the steps of an undo come after."""
    refused = answer["refused"]
    assert (refused["code"] if refused else "ok") == reply.code.value, (answer, reply)
    planned = [(step["name"], step["outcome"]) for step in answer["steps"]]
    taken = [(step.name, step.outcome) for step in reply.steps if step.outcome != "undone"]
    # Steps that run side by side end in any order; what is not beside them keeps its place.
    assert Counter(planned) == Counter(taken)
    assert answer["changes"] == reply.changed
    if refused:
        assert refused["message"] == getattr(reply.response, "message", "")
        assert refused["detail"].items() <= reply.detail.items()
        assert refused["retryable"] == reply.retryable
    else:
        assert answer["status"] == reply.status
        assert (answer["why"] is None) == reply.changed


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", EXPLAINED)
async def test_what_is_explained_is_what_happens(kind: str, state: str, tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await STATES[state](worker)

        answer = await explained(worker, EXPLAINED[kind])

        same(answer, await worker.run(EXPLAINED[kind]))


def test_every_status_is_met() -> None:
    met = {word for state in STATES for word in state.replace(",", "").split()}

    assert {str(status) for status in Status} <= met


TROUBLES: Final[dict[str, Callable[[FakeHost], None]]] = {
    "disk full": lambda machine: setattr(machine, "disk_low", True),
    "above the watermark": lambda machine: setattr(machine, "disk_high", True),
    "no disk space": lambda machine: setattr(machine, "disk_free_bytes", 0),
    "no memory": lambda machine: setattr(machine, "memory_mib", 600),
    "no CPU": lambda machine: setattr(machine, "cpus", 0),
    "warm VMM": lambda machine: machine.warm.append(17),
    "secrets": lambda machine: machine.secrets.update(acme=b"{}"),
    "route": lambda machine: machine.routes.append("10.240.0.0/16"),
    "version gone": lambda machine: setattr(machine, "vmm_version", "1.13.0"),
    "no pool": lambda machine: machine.pools.clear(),
    "no tenant": lambda machine: machine.tenants.clear(),
}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("state", ["created", "running", "sleeping"])
@pytest.mark.parametrize("kind", EXPLAINED)
async def test_a_refusal_is_the_one_that_the_command_gets(
    kind: str, state: str, trouble: str, tmp_path: Path
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await STATES[state](worker)
        TROUBLES[trouble](worker.machine)

        answer = await explained(worker, EXPLAINED[kind])

        same(answer, await worker.run(EXPLAINED[kind]))


async def test_a_host_that_drains_is_said_with_its_code(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await after(UP)(worker)
        await worker.drain.begin("wait")

        answer = await explained(worker, START)

        assert (answer["refused"]["code"], answer["refused"]["detail"]["act"]) == (
            "draining", "scheduler",
        )  # fmt: skip
        same(answer, await worker.run(START))


async def test_what_it_supersedes_and_waits_behind_is_named(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await after(UP)(worker)
        gate = machine.gates["wait_agent"] = Gate()
        await worker.send(START, "first")
        await gate.reached.wait()
        await worker.send(FORCED, "second")

        for_stop = await explained(worker, STOP)
        for_sleep = await explained(worker, SLEEP)

        assert [(each["id"], each["state"], each["effect"]) for each in for_stop["before"]] == [
            ("first", "running", "supersedes"),
            ("second", "waiting", "supersedes"),
        ]
        assert {each["effect"] for each in for_sleep["before"]} == {"waits"}
        assert for_stop["provisional"]
        gate.opened.set()
        await worker.lanes.idle()


async def test_a_lock_and_a_slot_that_others_hold_are_named(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await after(UP)(worker)
        boots = worker.host.slots.boots
        for number in range(boots.count):
            await boots.acquire(f"other-{number}")
        async with worker.host.locks.exclusive("acme"):
            answer = await explained(worker, START)

        assert answer["waits"] == ["a slot of boots", "the network lock of acme"]
        assert "wait_boot_slot" in {step["name"] for step in answer["steps"]}


async def test_what_is_there_already_is_found_with_its_key(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await after(UP, START, STOP)(worker)

        steps = {step["name"]: step for step in (await explained(worker, START))["steps"]}

        assert steps["data_disk"] == {
            "name": "data_disk", "outcome": "found", "key": str(REF), "there": True,
        }  # fmt: skip
        assert (steps["tap"]["outcome"], steps["tap"]["there"]) == ("done", False)


async def test_ping_and_what_does_not_decode_have_no_steps(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        ping = await explained(worker, Ping())
        unknown: Any = await worker.explain.explain({"Reboot": {}})
        named = {"tenant_id": "a", "pool_id": "b", "instance_id": "c", "volumes": [VOLUME]}
        volumes: Any = await worker.explain.explain({"StartInstance": named})

        assert (ping["steps"], ping["refused"]) == ([], None)
        assert ping["why"] == "it is answered at once, by no lane"
        for answer in (ping, unknown, volumes):  # as of any command that has nothing before it
            assert (list(answer["before"]), answer["provisional"]) == ([], False)
            assert answer.keys() == ExplainAnswer.__annotations__.keys()
        assert unknown["refused"]["code"] == "unsupported"
        assert volumes["refused"]["code"] == "unsupported"


async def test_a_question_that_takes_too_long_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is one that waits for its turn meanwhile; the next is answered."""
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await after(UP)(worker)
        looking: list[int] = [0]

        async def hang(*_: str) -> None:
            looking.append(looking[-1] + 1)
            try:
                await asyncio.Event().wait()
            finally:
                looking.append(looking[-1] - 1)

        question = REQUEST.write(START, compact=False)
        with monkeypatch.context() as patched:
            patched.setattr("worker.queries.explain.EXPLAIN_S", 0.05)
            patched.setattr(worker.host.shared, "of_start", hang)
            answers = await asyncio.gather(
                worker.explain.explain(question),
                worker.explain.explain(question),
                return_exceptions=True,
            )

        assert [type(each) for each in answers] == [Unavailable, Unavailable]
        assert max(looking) == 1
        assert (await worker.explain.explain(question))["refused"] is None


async def test_files_of_firecracker_that_were_replaced_are_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reread: list[bool] = []
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await after(UP)(worker)
        version_for = worker.host.vmms.version_for

        async def spy(wanted: str | None, **how: bool) -> str:
            reread.append(how.get("reread", True))
            return await version_for(wanted)

        monkeypatch.setattr(worker.host.vmms, "version_for", spy)
        assert (await plan(START, worker.host)).failure is None

    assert reread == [False]


# Their interfaces have no effect on the host; or they are replaced as a whole.
READ_AS_THEY_ARE: Final = {"settings", "facts", "disk"}
REPLACED: Final = {
    "locks",
    "slots",
    "later",
    "pending_reservations",
    "disk_claims",
    "unrecorded",
    "seen_alive",
}


async def test_every_method_of_a_host_is_a_read_or_predicted(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        planned = readonly_host(worker.host, Seen())

        for name, kind in get_type_hints(Host, dict(vars(interfaces))).items():
            found = getattr(planned, name)
            if name in READ_AS_THEY_ARE:
                assert found is getattr(worker.host, name)
            elif name in REPLACED:
                assert found is not getattr(worker.host, name)
            else:
                declared = getattr(kind, "__origin__", kind)  # of a generic protocol
                wanted = {each for each in dir(declared) if not each.startswith("_")}
                known = found.reads | found.predicted.keys()
                assert wanted <= known, (name, wanted - known)
                assert not found.reads & found.predicted.keys(), name


async def test_a_method_that_is_neither_is_refused() -> None:
    with pytest.raises(AttributeError, match="neither a read nor predicted"):
        ReadOnly(seeded(), ("fail",)).kill  # noqa: B018


async def test_a_crash_of_a_handler_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug is logged by who asked, as of any query; nothing is left held."""
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await after(UP)(worker)
        before = everything(worker)

        async def crash(*_: object) -> None:
            raise RuntimeError("a bug")

        with monkeypatch.context() as patched:
            patched.setattr(worker.host.shared, "of_start", crash)
            with pytest.raises(RuntimeError, match="a bug"):
                await plan(START, worker.host)

        assert everything(worker) == before
        assert (await plan(START, worker.host)).failure is None
