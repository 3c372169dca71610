"""Checks which imports of an account are missing, with requests that change nothing.

Of a service that is not imported, or not exported to this account, the server says that nobody
responds. Streams (events, state, advisories) cannot be asked, queries only while a worker runs.
"""

from collections.abc import Mapping, Sequence

from schemas.subjects import Subjects
from worker.bus import accounts, api_reply
from worker.bus.connection import Connection
from worker.bus.message import NoResponder
from worker.bus.protocol import BusError

NOT_ENABLED = 10039  # JetStream, for this account
# A publication that no stream stores: the server compares the name of the stream first.
NOT_STORED = {"Nats-Expected-Stream": "HOSTD_CHECK"}
# Of a message that is not pending: no answer, but "no responders" at once if it is not imported.
IN_PROGRESS = b"+WPI"
ACK_TIMEOUT_S = 0.5


async def missing(
    connection: Connection, account: str, subjects: Subjects, hosts: Sequence[str], js_domain: str
) -> list[str]:
    """What the account lacks, one text for each import; empty if it has all that can be checked.

    Args:
        connection: with a user of that account.
        account: e.g. `HOST_h1`.
        subjects: of the cell.
        hosts: of the cell, or the one whose account it is.
        js_domain: `[nats] js_domain`.

    Raises:
        BusError: no answer now; try again.
    """
    found: list[str] = []
    for grant in accounts.grants(subjects, hosts, js_domain, mirror=True):
        request = _request(grant) if account in grant.to else None
        if request is None:
            continue
        subject, payload, headers = request
        try:
            limit_s = ACK_TIMEOUT_S if payload == IN_PROGRESS else None
            await connection.request(subject, payload, headers=headers, timeout_s=limit_s)
        except NoResponder:
            found.append(f"account {account} lacks {accounts.describe(grant)}")
        except BusError:
            if payload != IN_PROGRESS:
                raise
    return found


async def check(
    connection: Connection, account: str, subjects: Subjects, hosts: Sequence[str], js_domain: str
) -> str:
    """`ok`, or everything that is wrong with the account of this connection.

    Raises:
        BusError: no answer now; try again.
    """
    wrong = await missing(connection, account, subjects, hosts, js_domain)
    if account != accounts.ADMIN and await _has_whole_api(connection):
        wrong.append(
            f"account {account} has JetStream of its own or all of another account's: whoever may"
            " send one request can make the server do anything there; use the accounts of"
            " `hostd provision --server-config`"
        )
    return "; ".join(wrong) or "ok"


async def _has_whole_api(connection: Connection) -> bool:
    """Whether `$JS.API` answers other than "not enabled for account"."""
    try:
        answer = await connection.request("$JS.API.STREAM.NAMES", b"")
    except NoResponder:
        return False
    found = api_reply.read_reply(answer.data, "reply to $JS.API.STREAM.NAMES")
    return bool(found.get("error", {}).get("err_code") != NOT_ENABLED)


def _request(grant: accounts.Grant) -> tuple[str, bytes, Mapping[str, str]] | None:
    """Subject, payload and headers; None if there is no request without an effect."""
    subject = grant.local or grant.subject
    if grant.kind == "stream" or grant.owner != accounts.OWNER:
        return None
    match grant.subject.split("."):
        case ["$JS", "API", ">"]:
            return "$JS.API.INFO", b"", {}
        case ["$JS", "API", "CONSUMER", "MSG", "NEXT", *_]:
            return None
        case ["$JS", "API", "DIRECT", "GET", _]:
            return subject, b'{"seq":1}', {}
        case ["$JS", "API", *_]:
            return subject.replace(".>", ".hostd-check"), b"", {}
        case ["$JS", "FC", *_] | ["$JS", "ACK", "*", *_]:
            return None  # heard by one consumer; a form that this server does not use
        case ["$JS", "ACK", *_]:
            return subject.replace("*", "0"), IN_PROGRESS, {}
        case _:
            return subject.replace(".>", ".hostd-check"), b"", NOT_STORED
