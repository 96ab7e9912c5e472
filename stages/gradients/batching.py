"""Length-sorted batches under a token budget, and a back-off when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from schemas.config import RunConfig
from stages.contract import Context
from stages.models.device import device_of, free_memory, is_out_of_memory

Result = TypeVar("Result")

_TOKENS, _CPU_TOKENS = 8192, 2048
_GOLDEN = (5**0.5 - 1) / 2


def pack(lengths: Sequence[int], token_budget: int, rows_per_item: int = 1) -> list[list[int]]:
    """Batches of item indices, longest items first, with padded tokens of a batch <=
    `token_budget`.

    lengths [N]: the longest row of each item (a pair: the longer of its two sides, `rows_per_item`
    = 2). Padded tokens are rows times the batch's longest row. An item longer than the budget goes
    alone. Ties keep their order, so the result depends on the lengths only. Longest first: if
    memory is short it is short in the first batch.

    Raises ValueError for a budget or a length below 1.
    """
    if token_budget < 1:
        raise ValueError(f"token budget must be at least 1, got {token_budget}")
    if any(length < 1 for length in lengths):
        raise ValueError("every length must be at least 1")
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room == 0:
            batches.append([])
            room = max(1, token_budget // (lengths[index] * rows_per_item))
        batches[-1].append(index)
        room -= 1
    return batches


def spread(batches: list[list[int]]) -> list[list[int]]:
    """The first batch first, the others so that long and short ones alternate evenly: what is done says how long the rest takes."""
    order = sorted(range(1, len(batches)), key=lambda n: n * _GOLDEN % 1.0)
    return [batches[n] for n in (0, *order)] if batches else []


class Memo(Protocol[Result]):
    """Remembers results of items beyond the process. known: those that are there already."""

    @property
    def known(self) -> Mapping[int, Result]:
        """Item -> its result."""

    def add(self, indices: Sequence[int], results: Sequence[Result]) -> None:
        """More results."""


def batch_tokens(config: RunConfig) -> int:
    """`gradients.token_budget`, or what it is where it is not set."""
    if config.gradients.token_budget is not None:
        return config.gradients.token_budget
    return _CPU_TOKENS if device_of(config).type == "cpu" else _TOKENS


class TokenBudget:
    """Runs batches under a token budget that is halved, and stays halved, when memory runs out."""

    def __init__(self, tokens: int, halved: Callable[[int, int], None] = lambda used, left: None) -> None:
        """halved: told the padded tokens that did not fit, and the budget from then on."""
        if tokens < 1:
            raise ValueError(f"token budget must be at least 1, got {tokens}")
        self.tokens = tokens
        self.backoffs = 0
        self._halved = halved

    @classmethod
    def remembered(cls, ctx: Context, key: str, tokens: int) -> TokenBudget:
        """The budget of config field `key`, or the smaller one that memory taught this run; halving is said aloud."""

        def halved(used: int, left: int) -> None:
            ctx.limit(key, left, f"{used:,} padded tokens in a batch do not fit in memory")

        return cls(ctx.limited(key, tokens), halved)

    @classmethod
    def of_gradients(cls, ctx: Context) -> TokenBudget:
        """Of batches with a backward pass; in reference mode each item goes alone."""
        tokens = 1 if ctx.config.execution.deterministic else batch_tokens(ctx.config)
        return cls.remembered(ctx, "gradients.token_budget", tokens)

    def run(
        self,
        lengths: Sequence[int],
        compute: Callable[[list[int]], Sequence[Result]],
        rows_per_item: int = 1,
        misfits: list[int] | None = None,
        memo: Memo[Result] | None = None,
    ) -> list[Result]:
        """One result per item, in item order. `compute` gets item indices and returns one result
        per index. What `memo` knows is left out of the batches, which are cut as if it were not known.

        A batch that runs out of memory is packed again, with everything not yet done, under half
        the padded tokens that batch had. An item that does not fit alone is appended to `misfits`
        and has no result; without `misfits` the original error is raised, the item's length named.
        """
        results: dict[int, Result] = {} if memo is None else dict(memo.known)
        whole = spread(pack(lengths, self.tokens, rows_per_item))
        todo = [left for batch in whole if (left := [i for i in batch if i not in results])]
        while todo:
            batch = todo[0]
            failure: BaseException | None = None
            try:
                outputs = compute(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1 and misfits is None:
                    size = f"{rows_per_item} x {lengths[batch[0]]} tokens"
                    error.add_note(f"one item of {size} does not fit in memory")
                    raise
                # the traceback's frames would keep the tensors alive
                failure = error.with_traceback(None)
            if failure is not None:
                del failure
                free_memory()
                if len(batch) == 1 and misfits is not None:
                    misfits += batch
                    todo.pop(0)
                    continue
                self.backoffs += 1
                used = len(batch) * rows_per_item * max(lengths[i] for i in batch)
                self.tokens = max(1, min(self.tokens, used) // 2)
                self._halved(used, self.tokens)
                rest = sorted(i for waiting in todo for i in waiting)
                repacked = spread(pack([lengths[i] for i in rest], self.tokens, rows_per_item))
                todo = [[rest[i] for i in positions] for positions in repacked]
                continue
            if len(outputs) != len(batch):
                raise ValueError(f"{len(outputs)} results for a batch of {len(batch)}")
            results.update(zip(batch, outputs, strict=True))
            todo.pop(0)
            if memo is not None:
                memo.add(batch, outputs)
        return [results[i] for i in sorted(results)]
