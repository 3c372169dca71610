"""`adopt` and `release` of an instance, in its lane: no command of it runs meanwhile."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from handlers.claims.adopt import Outcome, adopt_instance
from handlers.claims.give_up import release_instance
from handlers.errors import Failure, Unavailable
from handlers.interfaces import Host
from handlers.steps import Steps
from schemas.requests import InstanceRef
from schemas.subjects import Lane
from worker.journal.journal import Journal
from worker.lanes import Lanes, MaintenanceTask

log = structlog.get_logger()
T = TypeVar("T")


class Claims:
    """What an operator decides about one instance.

    Args:
        ready: whether recovery is complete; until then nothing is known to be without a record.
        after: called with the instance whose VMM is to be watched, or no longer.
    """

    def __init__(
        self,
        host: Host,
        journal: Journal,
        lanes: Lanes,
        *,
        ready: Callable[[], bool],
        after: Callable[[InstanceRef], None],
    ) -> None:
        self._host = host
        self._journal = journal
        self._lanes = lanes
        self._ready = ready
        self._after = after

    async def adopt(self, ref: InstanceRef) -> Outcome:
        """Prove what can be proved of the instance, and record it. Raises as `adopt_instance`."""
        steps = Steps(f"adopt-{ref}", self._journal.steps, {})
        outcome = await self._run("adopt", ref, lambda: adopt_instance(ref, steps, self._host))
        log.warning("instance.adopted", instance=str(ref), status=outcome.status)
        return outcome

    async def release(self, ref: InstanceRef) -> Outcome:
        """Give up hostd's claim; nothing is killed. Raises as `release_instance`."""
        outcome = await self._run("release", ref, lambda: release_instance(ref, self._host))
        log.warning("instance.released", instance=str(ref), changed=outcome.changed)
        return outcome

    async def _run(
        self, name: str, ref: InstanceRef, do: Callable[[], Awaitable[Outcome]]
    ) -> Outcome:
        if not self._ready():
            raise Unavailable(f"cannot {name} {ref}: the worker is still recovering, try again")

        async def in_lane() -> Outcome:
            lanes = [Lane.instance(ref)]
            if name == "adopt":  # records the network, too
                lanes.append(Lane.network(ref.tenant_id))
            for lane in lanes:
                if (unread := self._journal.quarantine.refusal(lane)) is not None:
                    raise unread
            try:
                return await do()
            finally:
                self._after(ref)

        try:
            return await run_in_lane(self._lanes, Lane.instance(ref), name, in_lane)
        except Failure as failure:
            log.warning(
                "instance.claim_refused", action=name, instance=str(ref), reason=failure.message
            )
            raise


async def run_in_lane(lanes: Lanes, lane: Lane, name: str, do: Callable[[], Awaitable[T]]) -> T:
    """Run the worker's own work behind all else of the lane, and return its result.

    Work that has begun is not cancelled with its caller; work that still waits is not begun.
    """
    result: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        if result.done():  # nobody waits for it any more
            return
        try:
            value = await do()
        except asyncio.CancelledError:
            result.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits
            if not result.done():
                result.set_exception(error)
        else:
            if not result.done():
                result.set_result(value)

    lanes.put_maintenance(lane, MaintenanceTask(name, run))
    return await result
