"""`python -I -m worker`, the command of the systemd unit: equivalent to `hostd run`."""

import sys

from worker.cli.main import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]], prog_name="hostd")
