"""Forgetting: token-level negative preference optimisation on rejected answers. docs/methods.md section 7."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from stages.train.allo.collators import RejectedSide
from stages.train.allo.learn import TokenTrainer


def npo_loss(
    logps: torch.Tensor, ref_logps: torch.Tensor, weights: torch.Tensor, beta: float, count: torch.Tensor | float
) -> torch.Tensor:
    """-(1/n) sum w_t log sigmoid(-beta (log pi(y_t) - log pi_ref(y_t))), n = max(1, count); log 2 where pi = pi_ref and count = sum w.

    All [B, T]. w_t = 1 for the tokens to unlearn: descending lowers their probability. (The released code weights with the token's
    reward itself, so that it unlearns what the reward model likes.)
    """
    n = max(1.0, float(count))
    return -(weights * logsigmoid(-beta * (logps - ref_logps))).sum() / n


class ForgetTrainer(TokenTrainer):
    """`npo_loss` with `train.allo.beta` on rows with `token_weights` and `ref_token_logps` (lists, one entry a rejected token); n counts the
    weights of the whole optimizer step."""

    columns = ("token_weights", "ref_token_logps")
    collate = RejectedSide

    def items(self, batch: Mapping[str, torch.Tensor], own: int | None = None) -> float:
        """Tokens to unlearn."""
        return float(batch["token_weights"][:own].sum())

    def own_loss(self, model: Any, inputs: Mapping[str, Any], own: int, most: int, items: torch.Tensor | int) -> Any:
        """See PairTrainer: in one forward, tokens of other pairs without weight."""
        weights = inputs["token_weights"].clone()
        weights[own:] = 0
        return self.compute_loss(model, {**inputs, "token_weights": weights}, False, items)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the step's loss."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        )
        weights, reference = inputs["token_weights"][:, 1:], inputs["ref_token_logps"][:, 1:]
        logps = outputs.log_probs[:, -weights.shape[1] :]
        total = weights.sum() if num_items_in_batch is None else num_items_in_batch
        loss = npo_loss(logps, reference, weights, self.train_config.allo.beta, total) * self.args.world_size
        if total:  # of the step over all processes: TRL logs the mean over its micro-batches
            told = self.accelerator.gather((weights * (logps.detach() - reference)).sum()).sum()
            parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            self._metrics["train"]["log_ratio"].append(float(told / total * parts))
        return (loss, outputs) if return_outputs else loss
