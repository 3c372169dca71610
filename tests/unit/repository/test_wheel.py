"""The wheel works when it is installed elsewhere, from any directory, without the sources."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

COMMIT = "0123456789" * 4
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        out,
        ROOT,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HOSTD_COMMIT": COMMIT},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.glob("hostd-*.whl")
    return made


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of another venv with the wheel in it.

    It borrows this environment's packages by a plain path: a .pth file in there, such as that of
    an editable install of the sources, does not count.
    """
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", venv / "bin/python"]
    pip += ["--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", wheel], check=True, timeout=120)
    return venv / "bin"


def run(cwd: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        args,
        cwd=cwd,
        env={"HOSTD_HOST_ID": "h1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_holds_the_three_packages_and_no_tests(wheel: Path) -> None:
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}

    packages = {name for name in names if not name.endswith(".dist-info")}
    assert packages == {"worker", "handlers", "schemas"}


def test_what_runs_is_the_wheels_own_code(bin_dir: Path, tmp_path: Path) -> None:
    show = "import handlers, schemas, worker as w; print(w.__file__, handlers.__file__)"

    done = run(tmp_path, bin_dir / "python", "-I", "-c", show)

    assert str(ROOT) not in done.stdout
    assert done.stdout.count(str(bin_dir.parent)) == 2, done.stderr


def test_the_command_runs_from_another_directory(bin_dir: Path, tmp_path: Path) -> None:
    version = run(tmp_path, bin_dir / "hostd", "--version")
    config = run(tmp_path, bin_dir / "hostd", "check-config")

    assert version.stdout.startswith("hostd, version "), version.stderr
    assert 'id = "h1"' in config.stdout, config.stderr


def test_a_wheel_says_its_commit(bin_dir: Path, tmp_path: Path) -> None:
    done = run(tmp_path, bin_dir / "hostd", "--version")

    assert done.stdout.endswith(f", commit {COMMIT[:12]} (package)\n"), done.stdout + done.stderr


def test_a_directory_named_worker_in_the_working_directory_is_not_run(
    bin_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker/__init__.py").write_text("raise SystemExit('the wrong one')")

    done = run(tmp_path, bin_dir / "python", "-I", "-m", "worker", "--help")

    assert done.returncode == 0, done.stderr
    assert "Run the worker until" in done.stdout


def test_the_module_fails_as_the_command_does(bin_dir: Path, tmp_path: Path) -> None:
    done = run(tmp_path, bin_dir / "python", "-I", "-m", "worker", "--config", "/nonexistent")

    assert done.returncode == 10
    assert (
        done.stderr
        == "invalid: /nonexistent: cannot read the settings file: No such file or directory\n"
    )


def test_the_debian_package_has_the_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    locked = re.findall(r"(?m)^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text())

    wanted = {re.split(r"[>=<\[]", each)[0] for extra in extras.values() for each in extra}
    assert wanted <= set(locked)
