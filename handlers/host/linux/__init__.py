"""System calls, /proc, files and threads: what any mechanism may stand on."""
