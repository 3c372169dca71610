"""`python -I -m worker`: what the unit runs, the same as `hostd run`."""

from worker.cli.service import run

if __name__ == "__main__":
    run(prog_name="hostd run")
