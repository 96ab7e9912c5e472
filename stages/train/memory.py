"""Running out of memory in training, said so that the user can do something about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from schemas.errors import UserError, first_line
from stages.models.device import is_out_of_memory


def less_memory(section: str) -> str:
    """What needs less, to be continued after "a"; section: of the config."""
    return (
        f"smaller {section}.micro_batch_size, or {section}.gradient_checkpointing, needs less memory. The same command continues"
        " from the last checkpoint."
    )


@contextmanager
def memory_named(section: str) -> Iterator[None]:
    """UserError instead of what torch raises when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"training ran out of memory: {first_line(error)}", where=section, fix=f"A {less_memory(section)}"
        ) from error
