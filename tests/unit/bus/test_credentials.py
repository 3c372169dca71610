"""The credentials file: its two forms, its permissions, its rotation."""

import os
from pathlib import Path

import nkeys
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


SEED = "-----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n"
JWT = "-----BEGIN NATS USER JWT-----\nx\n------END NATS USER JWT------\n\n"


def new_seed() -> str:
    return nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode()


def test_a_nats_credentials_file_with_its_seed_is_sound(tmp_path: Path) -> None:
    secret(tmp_path / "creds", JWT + SEED.format(new_seed())).check()


@pytest.mark.parametrize(
    "text",
    ["", SEED.format("")[:20], SEED.format(""), SEED.format("x"), SEED.format(new_seed()[:-5])],
    ids=["no seed", "cut off", "empty", "damaged", "short"],
)
def test_a_nats_credentials_file_without_a_sound_seed_is_rejected(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(errors.Error, match="expected the seed of a NATS user"):
        secret(tmp_path / "creds", JWT + text).check()
