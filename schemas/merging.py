"""The merge rules of `train.optimizer`: what a run must know of one before anything is loaded. What they compute: stages/train/optimizers/rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OptimizerName = Literal["adamw", "ondare", "onties", "anchor"]


@dataclass(frozen=True)
class MergeFacts:
    """alpha: default weight of the task vector; None: it must be given.

    anchored: it pulls to a place, measured from where training starts, so that it needs no pretrained model and makes no sense where the
        start moves with every objective or phase. Else its task vector is theta_SFT - theta_base.
    drops: it keeps a share of the entries, `reserve`, by default `share`, and has the released code's form beside the paper's.
    """

    alpha: float | None
    share: float = 1.0
    anchored: bool = False
    drops: bool = True


_ALPHA, _SHARE = (
    1e-7,
    0.01,
)  # the released training script's (QwenLM/online_merging_optimizers, LLaMA-Factory/run_dpo_om.sh)

MERGES: dict[str, MergeFacts] = {
    "ondare": MergeFacts(_ALPHA, _SHARE),
    "onties": MergeFacts(_ALPHA, _SHARE),
    "anchor": MergeFacts(None, anchored=True, drops=False),
}


def over_phases() -> str:
    """Names of the rules that can be followed over objectives and phases, for advice."""
    return ", ".join(name for name, facts in MERGES.items() if not facts.anchored)
