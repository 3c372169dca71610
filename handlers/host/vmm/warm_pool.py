"""Idle VMMs launched ahead, so that Start and Wake need not wait for the jailer.

A warm VMM is jailed and confined like any other, has a uid and a cgroup of its own, has run no
guest and read no tenant's file. A launch claims one together with its uid, takes its jail
(`warm_jails`) and moves it into the cgroup of the launch; then it is found, proven and checked like
one that the jailer has just started. Whatever is wrong with it, the launch runs the jailer instead.
One that was claimed is used by that launch or killed.

A worker that was killed leaves warm VMMs behind. The next one removes them before it launches any.
"""

import asyncio
import contextlib
import os
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine
from typing import Any, Final

import structlog

from handlers.cancellation import run_shielded
from handlers.errors import Failure
from handlers.host.vmm.binaries import VmmBinaries
from handlers.host.vmm.warm_vmms import WarmVmm, WarmVmms
from handlers.specs import LaunchSpec
from schemas.settings import Settings

CORES_OF_A_LAUNCH: Final = 2  # the worker's, and that of jailer, VMM and guest
QUIET_S: Final = 0.05  # a launch that has just ended is often followed by another
PATIENCE_S: Final = 1.0  # without a claim or the end of a launch, whatever launch still goes on
NOT_NOW_S: Final = 1.0  # the host is not ready, or has no memory or uid for one more
REMOVE_AGAIN_S: Final = 1.0
REMOVAL_S: Final = 10.0
BACKOFF_MAX_S: Final = 60.0
RESULTS: Final[tuple[str, ...]] = ("used", "discarded", "failed", "died")

log = structlog.get_logger()


class ClaimedVmm:
    """The warm VMM that one launch uses; `jail_id` is that of the jail to take with it."""

    def __init__(self, warm: WarmVmm, spec: LaunchSpec, vmms: WarmVmms) -> None:
        self.jail_id = warm.warm_id
        self.entered = False
        self.error = "it did not enter the cgroup"
        self._warm, self._spec, self._vmms = warm, spec, vmms

    async def enter(self) -> None:
        """Move it into the launch's cgroup, which must exist.

        What fails is not raised: the VMM is killed, and the launch runs the jailer.
        """
        try:
            await self._vmms.enter(self._warm, self._spec)
        except Exception as error:  # noqa: BLE001 - e.g. what /proc has of one that just exited
            self.error = repr(error)
        else:
            self.entered = True


class WarmPool:
    """The warm VMMs of this host. All state is in memory; nothing of it is journalled.

    Args:
        settings: `[vmm] warm_pool` is how many.
        slot_in_use: whether a record has the uid slot, that of a pending reservation included.
        free_mib: the memory that no VM is allocated.
        cores: those that the worker may use, and its VMMs with it.
        binaries: what launches execute; by default the pair of the settings.
    """

    def __init__(
        self,
        settings: Settings,
        slot_in_use: Callable[[int], bool],
        free_mib: Callable[[], int],
        cores: int,
        binaries: VmmBinaries | None = None,
    ) -> None:
        self.size = settings.vmm.warm_pool
        self._overhead_mib = settings.limits.vmm_overhead_mib
        self._vmms = WarmVmms(settings, binaries)
        self._slot_in_use, self._free_mib = slot_in_use, free_mib
        self._cores = cores
        self._ready: dict[str, WarmVmm] = {}
        self._claimed: dict[str, WarmVmm] = {}
        self._used: list[WarmVmm] = []
        self._slots: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._closing = asyncio.Event()
        self._starting = self._launches = 0
        self._asked_at = self._ended_at = 0.0
        self.totals: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))
        """How many VMMs left the pool, by result; `failed` includes launches that failed."""

    # -- what handlers use ---------------------------------------------------------------------

    @property
    def slots(self) -> Collection[int]:
        """The uid slots that the pool holds, the claimed ones included."""
        return self._slots

    def claim(self, jail_id: str, version: str) -> int | None:
        """Set one aside for the launch of this jail; returns its uid slot, which the launch gets.

        None if there is none of this version of Firecracker. A claim ends with `used_by` or
        `give_back`.
        """
        if self.size == 0:
            return None
        self._asked_at = asyncio.get_running_loop().time()
        self._flush_outdated()
        if self.ready_slot(version) is None:
            return None
        warm = self._ready.pop(next(iter(self._ready)))
        asyncio.get_running_loop().remove_reader(warm.pidfd)
        self._claimed[jail_id] = warm
        self._changed.set()
        return warm.slot

    def ready_slot(self, version: str) -> int | None:
        """The uid slot that `claim` would return. No effect."""
        first = next(iter(self._ready.values()), None)
        # All that are ready have one version, that of new Starts.
        return first.slot if first is not None and first.version == version else None

    def give_back(self, jail_id: str) -> None:
        """The launch did not come to use its claim. Nothing claimed is success."""
        if (warm := self._claimed.pop(jail_id, None)) is not None:
            self._discard(warm, "discarded")

    @contextlib.asynccontextmanager
    async def launch(self) -> AsyncGenerator[None]:
        """A launch goes on: on cores that it needs, nothing is launched ahead."""
        self._launches += 1
        try:
            yield
        finally:
            self._launches -= 1
            self._ended_at = asyncio.get_running_loop().time()

    @contextlib.asynccontextmanager
    async def used_by(self, spec: LaunchSpec) -> AsyncGenerator[ClaimedVmm | None]:
        """The claimed VMM, to `enter` the launch's cgroup while its jail is made.

        None without a claim. At the end the VMM is in the cgroup, or it is killed: then the launch
        runs the jailer. It is killed, too, if what is done meanwhile fails.
        """
        warm = self._claimed.pop(spec.jail_id, None)
        if warm is None:
            yield None
            return
        claimed = ClaimedVmm(warm, spec, self._vmms)
        completed = False
        try:
            yield claimed
            completed = True
        finally:
            if completed and claimed.entered:
                self._clear(warm, "used")
            elif completed:
                log.warning("warm_pool.vmm_lost", warm=warm.warm_id, error=claimed.error)
                self._clear(warm, "failed")
            else:  # undo knows of no VMM: it was not yet the launch's own
                try:
                    await run_shielded(self._vmms.end(warm))
                finally:
                    self._clear(warm, "discarded")

    def fit(self, free_mib: int) -> None:
        """Remove what does not fit into the memory that is free after a launch was admitted."""
        if self._overhead_mib == 0:
            return
        room = max(0, free_mib // self._overhead_mib)
        while self._ready and len(self._ready) + self._starting > room:
            self._discard(self._ready.pop(next(iter(self._ready))), "discarded")

    # -- what the worker uses ------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        return {"ready": len(self._ready), "starting": self._starting}

    async def clear_leftovers(self) -> None:
        """At start: kill and remove what an earlier worker left, all at once.

        Never raises for one of them; what could not be removed is tried again in the background.
        """
        left = await self._vmms.leftovers()
        removed = await asyncio.gather(*(self._is_removed(warm_id) for warm_id in left))
        for warm_id, gone in zip(left, removed, strict=True):
            if not gone:
                self._start(self._until_removed(warm_id))

    async def run(self, may_launch: Callable[[], bool]) -> None:
        """Keep the pool full until cancelled: one VMM at a time, beside launches only on cores
        that these do not need."""
        failures = 0
        while True:
            self._changed.clear()
            if len(self._ready) >= self.size:
                await self._changed.wait()
                continue
            wait_s = self._wait_s()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                continue
            slot = self._slot() if may_launch() and self._has_room() else None
            if slot is None:
                await asyncio.sleep(NOT_NOW_S)
                continue
            try:
                await self._add(slot)
            except Exception as error:  # noqa: BLE001 - logged; the rest goes on
                failures += 1
                self.totals["failed"] += 1
                pause_s = min(2.0**failures, BACKOFF_MAX_S)
                log.warning("warm_pool.launch_failed", error=str(error), next_s=pause_s)
                await asyncio.sleep(pause_s)
            else:
                failures = 0

    async def close(self) -> None:
        """Kill and remove all: a worker that stops in order leaves no warm VMM."""
        for warm in [*self._ready.values(), *self._claimed.values()]:
            self._discard(warm, "discarded")
        self._ready.clear()
        self._claimed.clear()
        self._closing.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- filling -------------------------------------------------------------------------------

    def _wait_s(self) -> float:
        """How long to leave the host to its launches, then ask again; 0 or less: not at all.

        Launches of which none ends, such as of guests that take long to boot, do not keep the pool
        empty.
        """
        quiet_s = asyncio.get_running_loop().time() - max(self._asked_at, self._ended_at)
        launches = max(self._launches, 1 if quiet_s < QUIET_S else 0)
        if launches * CORES_OF_A_LAUNCH < self._cores:
            return 0.0
        return min(QUIET_S, PATIENCE_S - quiet_s)

    def _has_room(self) -> bool:
        held = (len(self._ready) + len(self._claimed) + 1) * self._overhead_mib
        return held <= self._free_mib()

    def _slot(self) -> int | None:
        slot = self._vmms.free_slot(lambda each: each in self._slots or self._slot_in_use(each))
        if slot is not None:
            self._slots.add(slot)
        return slot

    async def _add(self, slot: int) -> None:
        """Launch one; what a failure leaves is removed in the background, until it is gone."""
        warm_id = f"warm-{secrets.token_hex(6)}"
        self._starting += 1
        try:
            warm = await self._vmms.launch(warm_id, slot)
        except BaseException:
            self._start(self._remove_failed(warm_id, slot))
            raise
        finally:
            self._starting -= 1
        self._ready[warm.warm_id] = warm
        asyncio.get_running_loop().add_reader(warm.pidfd, self._died, warm)
        self._flush_outdated()

    # -- ends ----------------------------------------------------------------------------------

    def _flush_outdated(self) -> None:
        """Remove those launched from another firecracker or by another jailer than now."""
        now = self._vmms.binaries()
        for warm in [each for each in self._ready.values() if each.binaries != now]:
            del self._ready[warm.warm_id]
            self._discard(warm, "discarded")

    def _died(self, warm: WarmVmm) -> None:
        log.warning("warm_pool.vmm_died", warm=warm.warm_id)
        if self._ready.pop(warm.warm_id, None) is not None:
            self._discard(warm, "died")

    def _discard(self, warm: WarmVmm, result: str) -> None:
        asyncio.get_running_loop().remove_reader(warm.pidfd)
        self._clear(warm, result)

    def _clear(self, warm: WarmVmm, result: str) -> None:
        """Remove what is left of it in the background; its uid is free only after that."""
        os.close(warm.pidfd)
        self.totals[result] += 1
        self._changed.set()
        if result != "used":
            self._start(self._remove(warm))
            return
        self._used.append(warm)
        if len(self._used) == 1:
            self._start(self._remove_used())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _remove_used(self) -> None:
        """Of those that were used only an empty cgroup is left, which can wait for the launches."""
        while not self._closing.is_set() and (wait_s := self._wait_s()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), wait_s)
        used, self._used = self._used, []
        await asyncio.gather(*(self._remove(warm) for warm in used))

    async def _remove(self, warm: WarmVmm) -> None:
        await self._until_removed(warm.warm_id)
        self._slots.discard(warm.slot)

    async def _remove_failed(self, warm_id: str, slot: int) -> None:
        await self._until_removed(warm_id)
        self._slots.discard(slot)

    async def _until_removed(self, warm_id: str) -> None:
        """Or until the pool is closed."""
        pause_s = REMOVE_AGAIN_S
        while not await self._is_removed(warm_id) and not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), pause_s)
            pause_s = min(2 * pause_s, BACKOFF_MAX_S)

    async def _is_removed(self, warm_id: str) -> bool:
        try:
            async with asyncio.timeout(REMOVAL_S):
                await self._vmms.remove(warm_id)
        except (Failure, OSError) as error:  # a timeout is an OSError
            log.warning("warm_pool.left_behind", warm=warm_id, error=str(error))
            return False
        return True
