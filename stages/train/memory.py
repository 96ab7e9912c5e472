"""Running out of memory in training, said so that the user can do something about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from schemas.errors import UserError, first_line
from stages.gradients.batching import is_out_of_memory

LESS_MEMORY = (
    "smaller train.micro_batch_size, or train.gradient_checkpointing, needs less memory. The same command continues from the last"
    " checkpoint."
)


@contextmanager
def memory_named() -> Iterator[None]:
    """UserError instead of what torch raises when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"training ran out of memory: {first_line(error)}", where="train", fix=f"A {LESS_MEMORY}"
        ) from error
