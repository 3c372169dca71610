"""The answers to queries: the journal's view, as `schemas/protocol/queries.py` declares it. Changes
nothing."""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import msgpack

from handlers.errors import NotFound
from handlers.vmm_ends import text_of
from schemas.protocol.facts import Evidence, HostState, LastEnd
from schemas.protocol.queries import (
    ExplainAnswer,
    InstanceAnswer,
    ListAnswer,
    NetworkAnswer,
    NetworkStatus,
    PingAnswer,
    ResultAnswer,
    StatusAnswer,
)
from schemas.records import InstanceRecord, NetworkRecord, VmmEnd
from schemas.requests import InstanceRef
from schemas.usage import InstanceUsage, TenantUsage
from worker.journal.journal import Journal
from worker.queries.usage import ReadUsage, usage_of_tenant

Answer = Mapping[str, object]


class Answers:
    """Implements `worker.queries.service.QuerySource`."""

    def __init__(
        self,
        journal: Journal,
        boot_id: str,
        *,
        host_state: Callable[[], HostState],
        warm_vmms: Callable[[], int],
        usage: ReadUsage,
        explain: Callable[[object], Awaitable[ExplainAnswer]],
        vmm_versions: Callable[[], object],
    ) -> None:
        self._journal = journal
        self._boot_id = boot_id
        self._host_state = host_state
        self._warm_vmms = warm_vmms
        self._usage = usage
        self._explain = explain
        self._vmm_versions = vmm_versions
        self._started = time.monotonic()

    async def ping(self) -> PingAnswer:
        return {
            "v": 1,
            "host_id": self._journal.store.subjects.host_id,
            "host_state": self._host_state(),
            "uptime_s": int(time.monotonic() - self._started),
        }

    async def status(self) -> StatusAnswer:
        return {
            "v": 1,
            "host_id": self._journal.store.subjects.host_id,
            "host_state": self._host_state(),
            "boot_id": self._boot_id,
            "journal_id": self._journal.store.journal_id,
            "unfinished": self._journal.commands.count(),
            "lanes": {str(lane): count for lane, count in self._journal.commands.lanes().items()},
            "instances": {
                str(status): count for status, count in self._journal.records.statuses().items()
            },
        }

    def stats(self) -> Answer:
        return {
            "host_state": self._host_state(),
            "unfinished": self._journal.commands.count(),
            "lanes": len(self._journal.commands.lanes()),
            "instances": {
                str(status): count for status, count in self._journal.records.statuses().items()
            },
            "vmm_versions": self._vmm_versions(),
        }

    async def list(self) -> ListAnswer:
        return {
            "v": 1,
            "journal_id": self._journal.store.journal_id,
            "seq": self._journal.store.applied,
            "instances": [
                {
                    "tenant_id": record.ref.tenant_id,
                    "pool_id": record.ref.pool_id,
                    "instance_id": record.ref.instance_id,
                    "status": record.status,
                    "since_ms": record.since_ms,
                }
                for record in sorted(
                    self._journal.records.instances(), key=lambda record: record.ref
                )
            ],
            "networks": [
                {
                    "tenant_id": record.tenant_id,
                    "bridge_name": record.net.bridge_name,
                    "status": _network_status(record),
                }
                for record in sorted(
                    self._journal.records.networks(), key=lambda record: record.tenant_id
                )
            ],
            "warm_vmms": self._warm_vmms(),
        }

    async def describe(
        self, tenant_id: str, pool_id: str | None, instance_id: str | None
    ) -> InstanceAnswer | NetworkAnswer:
        if pool_id is not None and instance_id is not None:
            ref = InstanceRef(tenant_id, pool_id, instance_id)
            record = self._journal.records.instance(ref)
            if record is None:
                raise NotFound(f"instance {ref} is not in the journal of this host")
            return described(record)
        network = self._journal.records.network(tenant_id)
        if network is None:
            raise NotFound(f"tenant {tenant_id} has no network on this host")
        net = network.net
        return {
            "v": 1,
            "tenant_id": tenant_id,
            "status": _network_status(network),
            "since_ms": network.since_ms,
            "tenant_net_id": net.tenant_net_id,
            "ipv4_subnet": net.ipv4_subnet,
            "gateway_ip": net.gateway_ip,
            "bridge_name": net.bridge_name,
            "instances": [
                {
                    "pool_id": r.ref.pool_id,
                    "instance_id": r.ref.instance_id,
                    "status": r.status,
                }
                for r in self._journal.records.instances(tenant_id)
            ],
        }

    async def usage(
        self, tenant_id: str, pool_id: str | None, instance_id: str | None
    ) -> InstanceUsage | TenantUsage:
        if pool_id is None or instance_id is None:
            records = self._journal.records.instances(tenant_id)
            if not records and self._journal.records.network(tenant_id) is None:
                raise NotFound(f"tenant {tenant_id} has neither instances nor a network here")
            at_ms = self._journal.store.now_ms()
            return await usage_of_tenant(tenant_id, records, self._usage, at_ms)
        ref = InstanceRef(tenant_id, pool_id, instance_id)
        record = self._journal.records.instance(ref)
        if record is None:
            raise NotFound(f"instance {ref} is not in the journal of this host")
        return await self._usage(record)

    async def result(self, command_id: str) -> ResultAnswer:
        found = await self._journal.commands.result(command_id)
        if found is None:
            raise NotFound(f"command {command_id} is not in the journal of this host")
        answer: ResultAnswer = {"v": 1, "id": command_id, "state": found.state}
        reply: Any = None if found.reply is None else msgpack.unpackb(found.reply)
        digest = found.request_digest
        if digest is None and reply is not None:
            digest = reply.get("request_digest")  # of a message that was refused
        if digest is not None:
            answer["request_digest"] = digest
        if reply is not None:
            answer["reply"] = reply
        return answer

    async def explain(self, request: object) -> ExplainAnswer:
        return await self._explain(request)


def described(record: InstanceRecord) -> InstanceAnswer:
    """One instance, with what an operator needs to act on it."""
    return {
        "v": 1,
        "tenant_id": record.ref.tenant_id,
        "pool_id": record.ref.pool_id,
        "instance_id": record.ref.instance_id,
        "status": record.status,
        "since_ms": record.since_ms,
        "launch": record.launch,
        "jail_id": record.jail_id if record.launch else None,
        "pid": record.vmm.pid if record.vmm is not None else None,
        "uid_slot": record.uid_slot,
        "offset": record.offset,
        "revision": record.revision,
        "vcpus": record.vcpus,
        "mem_mib": record.mem_mib,
        "snapshot": record.snapshot,
        "command_id": record.command_id,
        "hung_since_ms": record.hung.since_ms if record.hung is not None else None,
        "last_end": None if record.last_end is None else _last_end(record.last_end),
    }


def _last_end(end: VmmEnd) -> LastEnd:
    return {
        "reason": end.reason,
        "evidence": cast("Evidence", end.evidence),  # in a record it is what a newer hostd wrote
        "launch": end.launch,
        "at_ms": end.at_ms,
        "code": end.code,
        "signal": end.signal,
        "text": text_of(end),
    }


def _network_status(record: NetworkRecord) -> NetworkStatus:
    return "up" if record.status == "up" else "down"
