"""Rewards of tokens as probabilities, from a reward model. docs/methods.md section 7."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForTokenClassification

from schemas.errors import UserError, first_line, foreign
from stages.gradients.batching import TokenBudget
from stages.gradients.rows import BatchRow, RowBatch
from stages.models.device import free_memory
from stages.models.load import load_causal_lm
from stages.text.vocabulary import refuse_other_tokens
from stages.train.allo.tokens import implicit_rewards
from stages.train.model import Precision
from stages.train.scoring import forward_budget
from stages.train.session import Session

_WHERE = "train.allo.reward_model"


def model_rewards(session: Session, rows: Sequence[BatchRow], ref_logps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The reward [n] in [0, 1] of each completion token of every row, from `train.allo.reward_model`.

    dpo_model: sigmoid(beta log pi_rm/pi_ref) of a causal model trained by DPO from the reference. classifier: the probability that the
    token is good, with one label its sigmoid, with two the softmax of label 1. Raises UserError when the model cannot be loaded, has other
    labels, or another tokenizer than the policy: its tokens would be others.
    """
    allo, trust, numbers = session.train.allo, session.config.model.trust_remote_code, session.numbers
    ref = session.ctx.models["token_reward"]
    other = "Use a reward model made from the same base model, or train.allo.token_reward: implicit."
    refuse_other_tokens(ref, session.renderer.tokenizer, "its rewards", _WHERE, other, trust)
    if allo.token_reward == "dpo_model":
        model = load_causal_lm(ref, numbers.load, numbers.device, trust)  # as the reference: rounding is no reward
        logps = session.scorer().stream(model, rows, len(rows), "rewarded answer")
        found = [implicit_rewards(own, base, allo.beta) for own, base in zip(logps, ref_logps, strict=True)]
    else:
        model = _classifier(ref.name, str(ref.path), numbers, trust)
        found = _classified(model, rows, forward_budget(session.ctx), numbers.device)
    del model
    free_memory()
    return found


def _classifier(name: str, folder: str, numbers: Precision, trust: bool) -> torch.nn.Module:
    with foreign(lambda e: UserError(f"The token classifier {name} cannot be loaded: {first_line(e)}", where=_WHERE)):
        model, info = AutoModelForTokenClassification.from_pretrained(
            folder,
            dtype=numbers.compute,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        raise UserError(
            f"{name} is no token classifier: it has no weights {missing}",
            where=_WHERE,
            fix="Give a token-classification model, or use train.allo.token_reward: dpo_model for a causal one.",
        )
    if model.config.num_labels not in (1, 2):
        raise UserError(
            f"{name} has {model.config.num_labels} labels: which of them is a good token is not known",
            where=_WHERE,
            fix="Use a classifier with one label (good), or two (bad, good).",
        )
    return model.to(numbers.device).eval()


@torch.no_grad()
def _classified(
    model: torch.nn.Module, rows: Sequence[BatchRow], budget: TokenBudget, device: torch.device
) -> list[torch.Tensor]:
    def compute(indices: list[int]) -> list[torch.Tensor]:
        batch = RowBatch.build([rows[i] for i in indices], device)
        lengths = torch.tensor([len(rows[i]) for i in indices], device=device)
        mask = torch.arange(batch.ids_BT.shape[1], device=device) < lengths[:, None]
        logits = model(input_ids=batch.ids_BT, attention_mask=mask.long()).logits.double().cpu()
        good = logits[..., 0].sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1)[..., 1]
        return [good[b, len(rows[i].prompt) : len(rows[i])].clone() for b, i in enumerate(indices)]

    return budget.run([len(row) for row in rows], compute)
