"""Log-probabilities of completions, in the numbers of the trainer's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from transformers import PreTrainedModel

from stages.contract import Context
from stages.gradients.batching import TokenBudget, batch_tokens
from stages.gradients.logprobs import logprobs_of_rows
from stages.gradients.rows import BatchRow
from stages.train.callbacks import beats
from stages.train.model import Precision

ROWS_AT_A_TIME = 256


def forward_budget(ctx: Context) -> TokenBudget:
    """Padded tokens of a forward without gradients: gradients.token_budget, or what memory left of it in this run."""
    return TokenBudget.remembered(ctx, "gradients.token_budget", batch_tokens(ctx.config))


@dataclass(frozen=True)
class Scorer:
    """Scores rows as the trainer's forward does: of the policy's own weights it gives the policy's own numbers, so that the
    margins of DPO and the ratios of NPO start at 0. A model of which that should hold is loaded in `numbers.load`.

    beats(rows, unit): announces the work; what it returns is told the rows of each forward and may raise Stopped.
    """

    numbers: Precision
    budget: TokenBudget
    beats: Callable[[int, str], Callable[[int], None]]

    @classmethod
    def of(cls, ctx: Context, numbers: Precision) -> Scorer:
        """With the run's token budget, progress and stop signal."""
        return cls(numbers, forward_budget(ctx), partial(beats, ctx))

    def token_logps(
        self, model: PreTrainedModel, rows: Sequence[BatchRow], done: Callable[[int], None] = lambda rows: None
    ) -> list[torch.Tensor]:
        """log pi of each completion's tokens, float32 on the CPU. done: told the rows of each forward."""
        with self.numbers.forward():
            return logprobs_of_rows(model, rows, self.budget, done=lambda computed: done(len(computed)))

    def stream(self, model: PreTrainedModel, rows: Iterable[BatchRow], count: int, unit: str) -> Iterator[torch.Tensor]:
        """`token_logps` of `count` rows one after another, with progress; unit: what a row is called."""
        if not count:
            return
        beat, left = self.beats(count, unit), iter(rows)
        while block := list(islice(left, ROWS_AT_A_TIME)):
            yield from self.token_logps(model, block, beat)
