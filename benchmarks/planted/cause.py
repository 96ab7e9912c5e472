"""Whether the score is a cause: one optimizer step on the best-scored half of a language's pairs against one on the
worst-scored half, and what either does to the loss of the OTHER languages on other questions.

The step is AdamW's first one (moments start at zero, so it is lr * g / (|g| + eps)) on the weights that are sketched, in
float32; g is the gradient of the mean DPO loss with the model itself as reference. After it the weights are read again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import polars as pl
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.planted.damage import DamagedSet
from benchmarks.planted.sketches import Sketches, messages
from schemas.config.model import TextConfig
from stages.contract import ModelRef
from stages.gradients.layers import select_layers
from stages.gradients.logprobs import Head, completion_logprobs
from stages.gradients.rows import Pair, RowBatch
from stages.models.load import load_causal_lm
from stages.text.render import load_renderer

BETA = 0.1
_EPS = 1e-8


class Stepper:
    """A model in float32 whose sketched weights can take one step and be put back."""

    def __init__(
        self, model: ModelRef, device: str = "cpu", asked: Callable[[str], list[dict[str, str]]] = messages
    ) -> None:
        """asked: the conversation of a prompt."""
        self._ref, self._asked = model, asked
        self._model = load_causal_lm(model, torch.float32, torch.device(device))
        self._renderer = load_renderer(model, TextConfig(), False)
        self._head = Head.of(self._model)
        self._model.requires_grad_(False)
        modules = dict(self._model.named_modules())
        names = [layer.name for layer in select_layers(self._model).layers]
        self.weights = {f"{name}.weight": modules[name].weight for name in names}
        self._start = {} if model.path is None else self._files()

    def margins(self, pairs: Sequence[Pair]) -> Tensor:
        """s(y_w) - s(y_l) of every pair [N], one pair a batch."""
        with torch.no_grad():
            return torch.stack([self.margin(pair) for pair in pairs])

    def step(self, pairs: Sequence[Pair], learning_rate: float, report: Callable[[], None]) -> None:
        """Move the weights one step down the mean loss of `pairs`. With the model as reference every pair's loss has the
        slope -beta / 2 in its margin."""
        for weight in self.weights.values():
            weight.requires_grad_(True)
        for pair in pairs:
            (-0.5 * BETA / len(pairs) * self.margin(pair)).backward()
            report()
        with torch.no_grad():
            for weight in self.weights.values():
                gradient, weight.grad = weight.grad, None
                weight.requires_grad_(False)
                weight -= learning_rate * gradient / (gradient.abs() + _EPS)

    def restore(self) -> None:
        """The weights as they were, read again from the model's files."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                with safe_open(self._start[name], framework="pt") as file:
                    weight.copy_(file.get_tensor(name))

    def ids(self, frame: pl.DataFrame) -> list[Pair]:
        """Token ids as the gradients stage had them."""
        found = []
        for row in frame.iter_rows(named=True):
            answers = [[{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")]
            ids = self._renderer.pair_ids(self._asked(row["prompt"]), *answers)
            found.append(Pair(tuple(ids.prompt), tuple(ids.chosen), tuple(ids.rejected)))
        return found

    def margin(self, pair: Pair) -> Tensor:
        """s(y_w) - s(y_l) of one pair, differentiable in the weights that are free."""
        batch = RowBatch.build(pair.rows, self._head.weight.device)
        value_2C = completion_logprobs(self._model, batch, self._head)
        return value_2C[0].sum() - value_2C[1].sum()

    def _files(self) -> dict[str, str]:
        found = dict[str, str]()
        assert self._ref.path is not None
        for path in sorted(self._ref.path.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= {name: str(path) for name in file.keys()}  # noqa: SIM118
        missing = [name for name in self.weights if name not in found]
        if missing:
            raise ValueError(f"{missing[0]} is not in the model's safetensors files: its weights could not be put back")
        return found


def measure(
    stepper: Stepper,
    damaged: DamagedSet,
    intact: Sketches,
    score_N: Tensor,
    languages: Sequence[str],
    *,
    most: int = 16,
    questions: int = 8,
    learning_rate: float = 5e-6,
    say: Callable[[str], None],
) -> pl.DataFrame:
    """Rows: stepped (language), half (top | bottom), damaged (share of the step's pairs), language, change, error.

    The step takes pairs of even questions, the loss is measured on intact pairs of `questions` odd ones. change: mean of
    -log sigmoid(beta * change of margin) - log 2, below 0 is better; error: its standard error over the pairs. most: at
    most so many pairs a half, the highest and the lowest scored.
    """
    even_N = damaged.question_N % 2 == 0
    n = len(damaged.languages)
    picked = [
        q * n + place for q in range(1, 2 * questions, 2) for place in range(n) if q * n + place < intact.frame.height
    ]
    held_out = intact.frame[picked]
    pairs = stepper.ids(held_out)
    say(f"cause: the losses of {len(pairs)} held-out pairs before")
    before_N = stepper.margins(pairs)
    rows = list[dict[str, Any]]()
    for code in languages:
        own = (even_N & (damaged.language_N == damaged.languages.index(code))).nonzero()[:, 0]
        order = own[torch.argsort(score_N[own], descending=True, stable=True)]
        size = min(most, len(order) // 2)
        for half, chosen in (("top", order[:size]), ("bottom", order[-size:])):
            frame = damaged.frame[chosen.tolist()]
            done = iter(range(1, size + 1))
            stepper.step(stepper.ids(frame), learning_rate, lambda: say(f"cause: {code} {half} {next(done)} of {size}"))  # noqa: B023
            change_N = stepper.margins(pairs) - before_N
            stepper.restore()
            loss_N = -torch.nn.functional.logsigmoid(BETA * change_N) - math.log(2)
            for other in damaged.languages:
                where = torch.tensor([language == other for language in held_out["language"]])
                part_N = loss_N[where].double()
                rows.append(
                    {
                        "stepped": code,
                        "half": half,
                        "damaged": float(damaged.damaged_N[chosen].double().mean()),
                        "language": other,
                        "change": float(part_N.mean()),
                        "error": float(part_N.std() / max(1, len(part_N)) ** 0.5),
                    }
                )
    return pl.DataFrame(rows)
