"""A disk that fails while torch writes: torch says "iostream error" or "unexpected pos", and the system's word for it is lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

_BLOCK = bytes(1 << 20)
_MOST_BLOCKS = 64


@contextmanager
def writing(folder: Path, agreed: Callable[[Exception | None], Exception | None] = lambda met: met) -> Iterator[None]:
    """Around what writes `folder`: raises the system's OSError where torch hides it, and removes what was written by half, so that
    there is room for what the same command writes next.

    agreed: of several processes that write there, what any of them met: all raise it, once none writes any more.
    """
    met: Exception | None = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        met = _refused(folder) if isinstance(error, RuntimeError) else error
        if met is None:  # not the disk
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if met is not error:
            met.__cause__ = error
    met = agreed(met)
    if met is not None:
        shutil.rmtree(folder, ignore_errors=True)  # the other processes remove it too
        raise met


def _refused(folder: Path) -> OSError | None:
    """What the system says when somebody writes there; None when it takes 64 MiB."""
    probe = folder / ".probe"
    try:
        with probe.open("wb", buffering=0) as file:
            for _ in range(_MOST_BLOCKS):
                if file.write(_BLOCK) < len(_BLOCK):
                    file.write(_BLOCK)  # a short write is followed by the error
            os.fsync(file.fileno())
    except OSError as error:
        return OSError(error.errno, error.strerror, str(folder))
    finally:
        with suppress(OSError):
            probe.unlink()
    return None
