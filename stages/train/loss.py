"""TRL's preference losses, and what this project adds to them: a length penalty, SimPO's margin, a likelihood term."""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOTrainer

from schemas.config.loss import LossConfig


class PreferenceTrainer(DPOTrainer):
    """DPOTrainer with the run's loss (docs/methods.md section 2); lengths |y| count completion tokens, end of turn included.

    - alpha: -log sigmoid(beta * Delta + alpha * (|y_w| - |y_l|)), Delta = (s_w - s_ref_w) - (s_l - s_ref_l): a longer winner gets its
      margin for free, so its push is smaller.
    - simpo (arXiv 2405.14734): -log sigmoid(beta * (s_w / |y_w| - s_l / |y_l|) - gamma), TRL's sigmoid_norm without a reference:
      the reference log-probabilities of the rows are 0.
    - nll (arXiv 2404.19733): nll * -s_w / |y_w| is added to the loss of every pair. TRL's own term, loss_type sft, is a mean over the
      tokens of a micro-batch, which depends on what shares it.

    The first two TRL computes itself, handed to it inside the reference: what is subtracted from s_ref_w is added to the log-ratio
    of chosen. The rewards TRL logs are put back to beta * (s - s_ref), of SimPO to beta * s / |y|. Without any of these it is TRL's own
    code path. The first two need reference log-probabilities in the batch (`precompute_ref_log_probs`).
    """

    def __init__(self, *args: Any, preference: LossConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.loss_types != [preference.in_trl] or not self.precompute_ref_logps:
            raise ValueError(
                f"loss {preference.type} needs loss_type {preference.in_trl} and precomputed reference log-probabilities"
            )
        self.preference = preference

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool) -> Any:
        counts_2B = inputs["completion_mask"].sum(dim=1).chunk(2)
        shift_B = self._shift(*counts_2B)
        if shift_B is None and not self.preference.nll:
            return super()._compute_loss(model, inputs, return_outputs)
        logprobs: list[torch.Tensor] = []

        def recording(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            if outputs.get("log_probs") is not None:
                logprobs.append(outputs.log_probs.sum(dim=1))
            return outputs

        given = inputs if shift_B is None else {**inputs, "ref_chosen_logps": inputs["ref_chosen_logps"] - shift_B}
        result = super()._compute_loss(recording, given, return_outputs)
        logp_2B = logprobs[0].chunk(2)
        mode = "train" if model.training else "eval"
        if shift_B is not None:
            references = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
            self._restore_rewards(mode, [x.detach() for x in logp_2B], references, counts_2B)
        if not self.preference.nll:
            return result
        nll_B = -logp_2B[0] / counts_2B[0]
        self._metrics[mode]["nll"].append(self.accelerator.gather(nll_B.detach()).mean().item())
        more = self.preference.nll * nll_B.mean()
        return (result[0] + more, result[1]) if return_outputs else result + more

    def _shift(self, chosen_B: torch.Tensor, rejected_B: torch.Tensor) -> torch.Tensor | None:
        """What chosen gets beyond its log-ratio, of answers of so many tokens; None: nothing."""
        if self.preference.alpha:
            return self.preference.alpha / self.beta * (chosen_B - rejected_B)
        if self.preference.reference_free:
            return -self.preference.target / self.beta * chosen_B
        return None

    def _restore_rewards(
        self, mode: str, logp_2B: Any, references_2B: tuple[torch.Tensor, torch.Tensor], counts_2B: Any
    ) -> None:
        """Overwrite the last logged rewards, which contain the shift."""
        rewards = [self.beta * (own - ref) for own, ref in zip(logp_2B, references_2B, strict=True)]
        if self.preference.reference_free:
            rewards = [reward_B / count_B for reward_B, count_B in zip(rewards, counts_2B, strict=True)]
        chosen_B, rejected_B = rewards
        margin_B = chosen_B - rejected_B
        named = {"chosen": chosen_B, "rejected": rejected_B, "margins": margin_B, "accuracies": (margin_B > 0).float()}
        for name, value_B in named.items():
            self._metrics[mode][f"rewards/{name}"][-1] = self.accelerator.gather(value_B).mean().item()
