"""Whether the acknowledgement window of the consumer is full and does not move.

A consumer with `max_ack_pending` messages that are not acknowledged delivers nothing new: the
connection, the streams and the pulls are in order, and no command arrives.
"""

from typing import Any, Final

import structlog

from worker.bus import api_reply

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

EVERY_S: Final = 10.0


class AckWindow:
    """Compares what the server reports of the consumer with its previous report.

    Of the last report: `unacked` messages of at most `limit` are delivered and not acknowledged,
    `pending` wait in the stream.
    """

    def __init__(self) -> None:
        self.stuck = False
        self.unacked = self.limit = self.pending = 0
        self._full_at: tuple[int, int] | None = None

    def observe(self, info: dict[str, Any]) -> None:
        """One CONSUMER.INFO: stuck if two in a row are full, with nothing new between them.

        Redeliveries are no progress: only the floor of the acknowledged and the last message
        delivered for the first time count.
        """
        limit = info["config"].get("max_ack_pending", -1)
        pending = info["num_ack_pending"]
        waiting = api_reply.sequence_of(info, "num_pending", "consumer")
        self.unacked, self.limit, self.pending = pending, limit, waiting
        at = (info["ack_floor"]["stream_seq"], info["delivered"]["stream_seq"])
        full_at = at if 0 < limit <= pending else None
        stuck = full_at is not None and full_at == self._full_at
        self._full_at = full_at
        if stuck and not self.stuck:
            log.error("bus.ack_window_full", pending=pending, oldest_seq=at[0] + 1)
        elif self.stuck and not stuck:
            log.info("bus.ack_window_moved", pending=pending)
        self.stuck = stuck
