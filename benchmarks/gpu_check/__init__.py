"""Whether a GPU computes the right things, and how fast: one command on a bare machine. `python -m benchmarks.gpu_check --help`."""
