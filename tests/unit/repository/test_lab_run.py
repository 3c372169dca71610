"""How the lab's console is read, and that a lab which hangs is started once more."""

import sys
from pathlib import Path

import pytest

from tests.lab import qemu, run
from tests.lab.run import LabFailure, LabResult, run_in_lab


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Python script in place of QEMU; write it to the path that this gives."""
    script = tmp_path / "lab.py"
    monkeypatch.setattr(run, "ensure_lab", lambda: False)
    monkeypatch.setattr(run, "SILENCE_S", 1.0)
    monkeypatch.setattr(run, "CONSOLE", tmp_path / "console.log")

    def command_line(*_: object, **__: object) -> list[str]:
        return [sys.executable, "-u", str(script)]

    monkeypatch.setattr(qemu, "command_line", command_line)
    return script


def test_exit_code_and_output_come_back_without_the_signs_of_life(lab: Path) -> None:
    lab.write_text(r"print('boot\x1e\n\x1done\x1e two \xfc', end='\n\x1e\x1f7\ndmesg\n')")
    seen: list[str] = []

    result = run_in_lab(["true"], sink=seen.append)

    assert result == LabResult(7, "one two ü\n")
    assert "".join(seen) == "one two ü\n"


def test_stderr_comes_apart_from_stdout(lab: Path) -> None:
    lab.write_text(r"print('\x1dout\n\x1cerr\nhalf \x1cerr\x1e again\nline\n\x1f0')")
    out: list[str] = []
    err: list[str] = []

    result = run_in_lab(["true"], sink=out.append, error_sink=err.append)

    assert ("".join(out), "".join(err)) == ("out\nhalf line\n", "err\nerr again\n")
    assert result.output == "out\nerr\nhalf err again\nline\n"


def test_characters_and_marks_may_come_in_pieces(lab: Path) -> None:
    lab.write_text(
        "import os, time\n"
        r"for piece in (b'boot', b'\x1d\xc3', b'\xbc', b'\n', b'\x1c', b'\xc3', b'\xb6\n'):"
        "\n    os.write(1, piece)\n    time.sleep(0.02)\n"
        r"for piece in (b'\x1f', b'1', b'2\n'):"
        "\n    os.write(1, piece)\n    time.sleep(0.02)\n"
    )
    err: list[str] = []

    assert run_in_lab(["true"], error_sink=err.append) == LabResult(12, "ü\nö\n")
    assert "".join(err) == "ö\n"


def test_what_the_lab_itself_says_is_kept_only_for_a_failure(lab: Path) -> None:
    lab.write_text(r"print('boot\n\x1dout\n\x1f0')")
    run_in_lab(["true"])
    assert not run.CONSOLE.exists()

    lab.write_text(r"print('boot\n\x1dout\n\x1f1\nkernel log')")
    run_in_lab(["true"])

    assert run.CONSOLE.read_bytes() == b"boot\n\x1dout\n\x1f1\nkernel log\n"


def test_a_lab_without_a_sign_of_life_is_started_once_more(lab: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    lab.write_text(
        "import pathlib, time\n"
        f"again = pathlib.Path({str(second)!r})\n"
        "if again.exists():\n    print('\\x1dwhole\\n\\x1f0')\n"
        "else:\n    again.touch()\n    print('\\x1dhalf')\n    time.sleep(60)\n"
    )
    out: list[str] = []
    err: list[str] = []

    result = run_in_lab(["true"], sink=out.append, error_sink=err.append)

    assert result == LabResult(0, "whole\n")
    assert "".join(out) == "half\nwhole\n"
    assert "started once more" in "".join(err)


def test_a_lab_that_hangs_twice_is_a_failure(lab: Path) -> None:
    lab.write_text("import time\ntime.sleep(60)")

    with pytest.raises(LabFailure, match="hung 2 times"):
        run_in_lab(["true"])


def test_signs_of_life_do_not_extend_the_timeout(lab: Path) -> None:
    lab.write_text("import time\nwhile True:\n    print('\\x1e')\n    time.sleep(0.05)")

    with pytest.raises(LabFailure, match="command still running after"):
        run_in_lab(["true"], timeout_s=0.5)


def test_an_end_without_an_exit_code_is_a_failure(lab: Path) -> None:
    lab.write_text("print('Kernel panic')")

    with pytest.raises(LabFailure, match="Kernel panic"):
        run_in_lab(["true"])
