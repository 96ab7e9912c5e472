"""Length-penalised DPO on top of TRL's loss."""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOTrainer


class LengthPenalisedDPOTrainer(DPOTrainer):
    """loss = -log sigmoid(beta * Delta + alpha * (|y_w| - |y_l|)), Delta = (s_w - s_ref_w) - (s_l - s_ref_l).

    docs/methods.md section 2; lengths count completion tokens, end of turn included. A longer winner gets its margin for
    free, so its push is smaller. alpha = 0 is TRL's own code path: DPO (arXiv 2305.18290).

    TRL computes the loss from Delta alone, so the length term is handed to it inside the reference: subtracting
    (alpha / beta) * (|y_w| - |y_l|) from s_ref_w adds exactly alpha * (|y_w| - |y_l|) to beta * Delta. The rewards TRL
    logs are put back to beta * (s - s_ref), without the length term. alpha > 0 needs reference log-probabilities in the
    batch (`precompute_ref_log_probs`) and `loss_type` sigmoid.
    """

    def __init__(self, *args: Any, alpha: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if alpha and (self.loss_types != ["sigmoid"] or not self.precompute_ref_logps):
            raise ValueError("the length penalty needs loss_type sigmoid and precomputed reference log-probabilities")
        self.alpha = alpha

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool) -> Any:
        if self.alpha == 0.0:
            return super()._compute_loss(model, inputs, return_outputs)
        chosen_B, rejected_B = inputs["completion_mask"].sum(dim=1).chunk(2)
        reference_B = inputs["ref_chosen_logps"]
        shift_B = self.alpha / self.beta * (chosen_B - rejected_B)
        logprobs: list[torch.Tensor] = []

        def recording(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            if outputs.get("log_probs") is not None:
                logprobs.append(outputs.log_probs.detach().sum(dim=1))
            return outputs

        result = super()._compute_loss(recording, {**inputs, "ref_chosen_logps": reference_B - shift_B}, return_outputs)
        mode = "train" if model.training else "eval"
        self._restore_rewards(mode, logprobs[0], reference_B, inputs["ref_rejected_logps"])
        return result

    def _restore_rewards(
        self, mode: str, logprob_2B: torch.Tensor, ref_chosen_B: torch.Tensor, ref_rejected_B: torch.Tensor
    ) -> None:
        """Overwrite the last logged rewards, which contain the length term, by beta * (s - s_ref)."""
        chosen_B, rejected_B = logprob_2B.chunk(2)
        reward_B = self.beta * (chosen_B - ref_chosen_B)
        margin_B = reward_B - self.beta * (rejected_B - ref_rejected_B)
        metrics = self._metrics[mode]
        for name, value_B in (("chosen", reward_B), ("margins", margin_B), ("accuracies", (margin_B > 0).float())):
            metrics[f"rewards/{name}"][-1] = self.accelerator.gather(value_B).mean().item()
