"""Whose share of the questions a message takes."""

import pytest

from worker.bus.message import Message
from worker.queries.micro import REQUESTER, asker_of


@pytest.mark.parametrize(
    ("reply", "header", "asker"),
    [
        ("_INBOX.abc.1", None, "_INBOX.abc"),
        ("_INBOX.abc.1", '{"acc":"OTHER"}', "_INBOX.abc"),  # set by the sender itself
        ("_R_.7Xw2bq.9aBcDe", '{"acc":"DASHBOARD","rtt":5}', "account DASHBOARD"),
        ("_R_.7Xw2bq.9aBcDe", None, "_R_.7Xw2bq"),
        ("_R_.7Xw2bq.9aBcDe", "{", "_R_.7Xw2bq"),
        ("_R_.7Xw2bq.9aBcDe", '{"acc":7}', "_R_.7Xw2bq"),
        ("_R_.7Xw2bq.9aBcDe", '{"acc":{"a":1}}', "_R_.7Xw2bq"),
        ("_R_.7Xw2bq.9aBcDe", f'{{"acc":"{"A" * 257}"}}', "_R_.7Xw2bq"),
        ("_R_.7Xw2bq.9aBcDe", "[]", "_R_.7Xw2bq"),
        ("_R_.7Xw2bq.9aBcDe", "{}", "_R_.7Xw2bq"),
        ("_R_.7Xw2bq.9aBcDe", "[" * 100_000, "_R_.7Xw2bq"),
    ],
)
def test_an_asker_is_an_account_or_an_inbox(reply: str, header: str | None, asker: str) -> None:
    headers = {} if header is None else {REQUESTER: header}

    assert asker_of(Message("hostd.v1.c.h1.ask.ping", reply, b"", headers)) == asker
