"""What `fork` says: what is shared, what is left to do and why, and the command that does it."""

from __future__ import annotations

import shlex

from pipeline.fork import Forked
from pipeline.plan import State


def told(forked: Forked) -> str:
    """A line each."""
    folder = forked.config.folder
    size = ", ".join(f"{_bytes(n)} {how}" for n, how in ((forked.linked, "linked"), (forked.copied, "copied")) if n)
    shared = ", ".join(state.step.title for state in forked.shared)
    lines = [f"{sentence}." for sentence in forked.without]  # each begins with a key
    lines += [f"Shared with it: {shared or 'nothing'}" + (f" ({size})" if size else "")]
    if forked.left:
        lines.append(f"To do: {'; '.join(_why(state) for state in forked.left)}")
    return "\n".join([*lines, f"Go on: congrad run {shlex.quote(str(folder / 'run.yaml'))}"])


def _why(state: State) -> str:
    return state.step.title + (f" ({'; '.join(state.why)})" if state.kind == "changed" else "")


def _bytes(count: int) -> str:
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"
