"""A message that cannot be deleted is not for that reason absent."""

import json
from typing import Any, cast

import pytest

from worker.bus.message import Message
from worker.client.errors import NoAnswer, NotFound
from worker.client.link import Link


@pytest.mark.parametrize(
    ("err_code", "raised"),
    [(10043, NotFound), (10037, NotFound), (10059, NotFound), (10008, NoAnswer), (None, NoAnswer)],
)
async def test_only_what_is_not_there_is_not_found(
    monkeypatch: pytest.MonkeyPatch, err_code: int | None, raised: type[Exception]
) -> None:
    failure = {"code": 503, "description": "why", "err_code": err_code}

    async def answered(*_: object) -> Message:
        return Message("", "", json.dumps({"error": failure}).encode(), {})

    monkeypatch.setattr(Link, "_ask_api", answered)
    link = Link.__new__(Link)

    with pytest.raises(raised, match="why"):
        await cast("Any", link).delete("HOSTD_DEAD_default", 7)
