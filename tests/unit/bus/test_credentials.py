"""The credentials file: its two forms, its permissions, its rotation."""

from pathlib import Path

import pytest
from nats import errors

from worker.bus.credentials import CredentialsFile


def secret(path: Path, text: str) -> CredentialsFile:
    path.write_text(text)
    path.chmod(0o600)
    return CredentialsFile(str(path))


def test_user_and_password_of_one_attempt_belong_together(tmp_path: Path) -> None:
    creds = secret(tmp_path / "creds", "host:first:with colon\n")

    assert (creds.user(), creds.password()) == ("host", "first:with colon")

    assert creds.user() == "host"
    (tmp_path / "creds").write_text("host:second")
    assert creds.password() == "first:with colon"
    assert (creds.user(), creds.password()) == ("host", "second")


@pytest.mark.parametrize("text", ["", "no colon", "a:b\nc:d", ":x"])
def test_a_credentials_file_of_neither_form_is_rejected(tmp_path: Path, text: str) -> None:
    with pytest.raises(errors.Error, match="expected NATS credentials or"):
        secret(tmp_path / "creds", text).user()


def test_credentials_that_others_can_read_are_rejected(tmp_path: Path) -> None:
    creds = secret(tmp_path / "creds", "a:b")
    (tmp_path / "creds").chmod(0o640)

    with pytest.raises(errors.Error, match="chmod 600"):
        creds.user()


def test_a_nats_credentials_file_is_recognised_by_its_header(tmp_path: Path) -> None:
    assert secret(tmp_path / "a", "-----BEGIN NATS USER JWT-----\nx\n").is_jwt()
    assert not secret(tmp_path / "b", "a:b").is_jwt()
    assert not CredentialsFile(str(tmp_path / "missing")).is_jwt()
