"""Benchmarks of lm-evaluation-harness: what a task is, how it is run in a process of its own, and what comes of it."""
