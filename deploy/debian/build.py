"""Build the Debian package: `python deploy/debian/build.py [--version V] [--output DIR]`.

It has the wheels of requirements.lock and hostd's own in /opt/hostd, an environment of Debian 12's
python3.11, with byte code; the unit, an example of the settings, man pages and shell completions
made from the commands themselves, and the docs. Needs python3.11 and dpkg-deb, no root.
The same commit gives the same bytes: all times are that of the commit.
"""

import argparse
import compileall
import gzip
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import tomllib
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

import click
from click_man.core import write_man_pages

from worker.cli.completion import script_of
from worker.cli.main import main as hostd

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SITE_PACKAGES = "opt/hostd/lib/python3.11/site-packages"
SCRIPTS = ("preinst", "postinst", "prerm", "postrm")
# Not below /usr/share/doc alone: dpkg may be told to leave that out, and postinst copies it.
EXAMPLE = "usr/share/hostd/hostd.toml"
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/hostd",
    "zsh": "usr/share/zsh/vendor-completions/_hostd",
    "fish": "usr/share/fish/vendor_completions.d/hostd.fish",
}
PROGRAM = """\
#!/opt/hostd/bin/python -I
import sys

from worker.cli.main import main

sys.exit(main(prog_name="hostd"))
"""


def build(output: Path, version: str) -> Path:
    """The package's file in `output`."""
    epoch = commit_time()
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        tree = Path(scratch) / "tree"
        environment(tree)
        system_files(tree)
        manuals(tree / "usr/share/man/man1", version, epoch)
        documents(tree / "usr/share/doc/hostd")
        control(tree, version)
        settle(tree, epoch)
        package = output / f"hostd_{version}_amd64.deb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree), str(package)],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch)},
        )
    return package


def environment(tree: Path) -> None:
    """A virtual environment at /opt/hostd, without pip and without paths of this machine."""
    packages = tree / SITE_PACKAGES
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    into = ["--no-compile", "--no-warn-conflicts", "--target", str(packages)]
    locked = ["--require-hashes", "-r", str(ROOT / "requirements.lock")]
    subprocess.run([*pip, *into, *locked], check=True)
    with tempfile.TemporaryDirectory() as made:
        wheel = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", made]
        subprocess.run([*wheel, str(ROOT)], check=True, stdout=subprocess.DEVNULL)
        own = [str(next(Path(made).glob("hostd-*.whl")))]
        subprocess.run([*pip, *into, "--no-deps", *own], check=True)
    shutil.rmtree(packages / "bin", ignore_errors=True)
    for record in packages.glob("*.dist-info"):
        for name in ("direct_url.json", "REQUESTED", "INSTALLER"):
            (record / name).unlink(missing_ok=True)
    programs = tree / "opt/hostd/bin"
    programs.mkdir()
    for name in ("python", "python3", "python3.11"):
        (programs / name).symlink_to("/usr/bin/python3.11")
    (programs / "hostd").write_text(PROGRAM)
    (tree / "opt/hostd/pyvenv.cfg").write_text(
        "home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11\n"
    )
    compileall.compile_dir(
        packages,
        quiet=1,
        stripdir=tree,
        prependdir="/",
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def system_files(tree: Path) -> None:
    place = {
        "lib/systemd/system/hostd.service": ROOT / "deploy/hostd.service",
        "usr/lib/tmpfiles.d/hostd.conf": HERE / "hostd.tmpfiles",
        EXAMPLE: ROOT / "deploy/config/hostd.toml",
    }
    for name, source in place.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, tree / name)
    (tree / "usr/bin").mkdir(parents=True)
    (tree / "usr/bin/hostd").symlink_to("/opt/hostd/bin/hostd")
    for shell, name in COMPLETIONS.items():
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text(script_of(hostd, shell) + "\n")


def manuals(directory: Path, version: str, epoch: int) -> None:
    """hostd.1 and a page per subcommand, from the help texts of the commands."""
    directory.mkdir(parents=True)
    date = datetime.fromtimestamp(epoch, UTC).date().isoformat()
    write_man_pages(
        "hostd", plain(hostd, "hostd"), version=version, target_dir=str(directory), date=date
    )
    for page in directory.glob("*.1"):
        compress(page)


def plain(command: click.Command, name: str) -> click.Command:
    """The same command, its subcommands imported and with whole first sentences."""
    command.short_help = command.short_help or command.get_short_help_str(limit=80)
    if not isinstance(command, click.Group):
        return command
    context = click.Context(command, info_name=name)
    found = {sub: command.get_command(context, sub) for sub in command.list_commands(context)}
    return click.Group(
        name,
        commands={sub: plain(there, sub) for sub, there in found.items() if there is not None},
        params=command.params,
        help=command.help,
        short_help=command.short_help,
    )


def documents(directory: Path) -> None:
    directory.mkdir(parents=True)
    for source in sorted((ROOT / "docs").glob("*.md")):
        shutil.copyfile(source, directory / source.name)
    for name in ("runbooks", "images", "adr", "protocol", "rust"):
        ignored = shutil.ignore_patterns("target")
        shutil.copytree(ROOT / "docs" / name, directory / name, ignore=ignored)
    shutil.copytree(ROOT / "deploy/grafana", directory / "examples/grafana")
    shutil.copytree(ROOT / "deploy/nats", directory / "examples/nats")
    shutil.copytree(ROOT / "deploy/prometheus", directory / "examples/prometheus")
    (directory / "examples/hostd.toml").symlink_to(f"/{EXAMPLE}")
    shutil.copyfile(ROOT / "CHANGELOG.md", directory / "changelog")
    compress(directory / "changelog")


def control(tree: Path, version: str) -> None:
    directory = tree / "DEBIAN"
    directory.mkdir()
    licences: list[str] = []
    for found in distributions(path=[str(tree / SITE_PACKAGES)]):
        facts = found.metadata
        names = facts.get_all("License-Expression") or facts.get_all("License") or []
        if facts["Name"] != "hostd":
            licences.append(f"{facts['Name']} {found.version}: {', '.join(names)}")
    text = "Packages in /opt/hostd, with their licence texts beside them in *.dist-info:\n\n"
    (tree / "usr/share/doc/hostd/copyright").write_text(text + "\n".join(sorted(licences)) + "\n")
    kib = sum(path.lstat().st_size for path in tree.rglob("*")) // 1024
    fields = (HERE / "control").read_text()
    fields = fields.replace("@VERSION@", version).replace("@SIZE@", str(kib))
    (directory / "control").write_text(fields)
    for name in SCRIPTS:
        shutil.copyfile(HERE / name, directory / name)


def settle(tree: Path, epoch: int) -> None:
    """Modes and times that do not depend on this machine."""
    programs = {tree / "DEBIAN" / name for name in SCRIPTS} | {tree / "opt/hostd/bin/hostd"}
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path in programs else 0o644)
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def compress(path: Path) -> None:
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()


def commit_time() -> int:
    """Seconds since 1970: SOURCE_DATE_EPOCH, or of the last commit."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    asked = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    return int(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    parser = argparse.ArgumentParser(description="Build the Debian package.")
    parser.add_argument("--version", default=version, help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build/deb", help="default: build/deb"
    )
    options = parser.parse_args()
    if sys.version_info[:2] != (3, 11):
        raise SystemExit(
            "the package is made with Python 3.11, Debian 12's: its wheels depend on it"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    print(build(options.output, options.version))


if __name__ == "__main__":
    main()
