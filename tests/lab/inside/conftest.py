"""Collected in the lab only: on the machine that boots the lab they would prove nothing."""

import os

collect_ignore_glob = [] if os.environ.get("HOSTD_LAB") else ["test_*.py"]
