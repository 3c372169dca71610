"""The one table from errno to failure, and the two forms of a message made from an OSError."""

import errno

import pytest

from handlers.errors import (
    FAILURE_OF_ERRNO,
    Exhausted,
    Failure,
    HostFault,
    Unavailable,
    failure_class,
    of_os_error,
)

TABLE: list[tuple[int | None, type[Failure]]] = [
    (errno.EAGAIN, Unavailable),
    (errno.EBUSY, Unavailable),
    (errno.EINTR, Unavailable),
    (errno.ENOBUFS, Unavailable),
    (errno.ETIMEDOUT, Unavailable),
    (errno.ECONNREFUSED, Unavailable),
    (errno.ENOMEM, Exhausted),
    (errno.ENOSPC, Exhausted),
    (errno.EDQUOT, Exhausted),
    (errno.EMFILE, Exhausted),
    (errno.ENFILE, Exhausted),
    (errno.EACCES, HostFault),
    (errno.EPERM, HostFault),
    (errno.EIO, HostFault),
    (errno.ENOTTY, HostFault),
    (None, HostFault),
]


@pytest.mark.parametrize(("number", "kind"), TABLE)
def test_each_errno_says_who_must_act(number: int | None, kind: type[Failure]) -> None:
    failure = of_os_error(OSError(number, "text") if number else OSError("text"))

    assert failure_class(number) is kind
    assert type(failure) is kind


def test_every_errno_of_the_table_is_tested() -> None:
    assert FAILURE_OF_ERRNO.keys() <= {number for number, _ in TABLE}


@pytest.mark.parametrize("attempted", [None, "cannot create cgroup a/b"])
def test_detail_has_the_symbolic_name(attempted: str | None) -> None:
    failure = of_os_error(OSError(errno.ENFILE, "text"), attempted)

    assert failure.detail == {"errno": "ENFILE"}


def test_an_errno_without_a_name_is_given_in_digits() -> None:
    assert of_os_error(OSError(5000, "text")).detail == {"errno": "5000"}


def test_the_message_says_what_was_attempted() -> None:
    error = OSError(errno.ENOSPC, "text", "/a")

    assert of_os_error(error, "cannot create /a").message == (
        "cannot create /a: No space left on device"
    )


def test_without_an_attempt_the_message_names_the_files() -> None:
    error = OSError(errno.EXDEV, "text", "/a", None, "/b")

    assert of_os_error(error).message == "Invalid cross-device link: /a -> /b"


@pytest.mark.parametrize("attempted", [None, "cannot read /a"])
def test_a_timeout_is_unavailable(attempted: str | None) -> None:
    failure = of_os_error(TimeoutError(), attempted)

    assert type(failure) is Unavailable
    assert failure.message == (f"{attempted}: timed out" if attempted else "a step timed out")
    assert failure.detail == {}
