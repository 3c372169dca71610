"""An acknowledgement window that is full and does not move is seen; one that moves is not."""

from typing import Any

import pytest

from worker.bus.ack_window import AckWindow


def info(pending: int, floor: int, last: int, limit: int = 256) -> dict[str, Any]:
    return {
        "config": {"max_ack_pending": limit},
        "num_ack_pending": pending,
        "num_pending": 0,
        "ack_floor": {"consumer_seq": 0, "stream_seq": floor},
        "delivered": {"consumer_seq": last + 999, "stream_seq": last},
    }


@pytest.mark.parametrize(
    ("reports", "stuck"),
    [
        ([info(256, 0, 256)], False),
        ([info(256, 0, 256), info(256, 0, 256)], True),
        ([info(256, 0, 256), info(256, 1, 257)], False),
        ([info(256, 0, 256), info(256, 0, 300)], False),
        ([info(255, 0, 256), info(255, 0, 256)], False),
        ([info(256, 0, 256), info(256, 0, 256), info(3, 256, 259)], False),
        ([info(9, 0, 9, limit=-1), info(9, 0, 9, limit=-1)], False),
    ],
)
def test_only_a_full_window_without_progress_is_stuck(
    reports: list[dict[str, Any]], stuck: bool
) -> None:
    window = AckWindow()

    for report in reports:
        window.observe(report)

    assert window.stuck is stuck
