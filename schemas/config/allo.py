"""Config of ALLO: few entries of the weights, forgetting before learning, key tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from schemas.config.base import FilePath, Section, execution, other_than, semantic

_FORGETS = {".forget": True}
_LEARNS = {".learn": True}
_SOME_TOKENS = {".learn": True, ".key_fraction": other_than(1.0)}


class AlloConfig(Section):
    """Low-redundancy alignment (arXiv 2406.12606): train few entries of the weights, forget before learning, on key tokens."""

    mask: Literal["none", "warmup", "gradient"] = semantic(
        "none", "none: off; warmup: |change| in a short DPO warm-up that is then undone; gradient: summed |gradient|"
    )
    warmup_steps: int = semantic(50, "optimizer steps of the warm-up, or batches whose gradients are summed", ge=1)
    unit: Literal["weight", "row"] = semantic("weight", "what is selected: single weights (the paper's code), or rows")
    forget: bool = semantic(True, "first unlearn the low-reward tokens of rejected answers (token-level NPO)")
    forget_ratio: float = semantic(
        0.05, "share of weights (rows) that forgetting trains", used_when=_FORGETS, gt=0, le=1
    )
    forget_epochs: float = semantic(
        1.0, "passes over the pairs in forgetting", used_when=_FORGETS | {".forget_max_steps": -1}, gt=0
    )
    forget_max_steps: int = semantic(
        -1, "optimizer steps of forgetting, instead of forget_epochs; -1: by epochs", used_when=_FORGETS, ge=-1
    )
    forget_learning_rate: float | None = semantic(None, "default: train.learning_rate", used_when=_FORGETS, gt=0)
    learn: bool = semantic(True, "then DPO, its rejected side on key tokens only, over train.epochs or train.max_steps")
    learn_ratio: float = semantic(0.1, "share of weights (rows) that learning trains", used_when=_LEARNS, gt=0, le=1)
    key_fraction: float = semantic(
        0.5,
        "share of a rejected answer's tokens, of lowest reward, that learning uses",
        used_when=_LEARNS,
        gt=0,
        le=1,
    )
    beta: float = semantic(
        0.1,
        "of forgetting, and of implicit token rewards sigmoid(beta * log ratio)",
        used_when=(_FORGETS, _SOME_TOKENS | {".token_reward": ("implicit", "dpo_model")}),
        gt=0,
    )
    token_reward: Literal["implicit", "dpo_model", "classifier"] = semantic(
        "implicit",
        "log pi/pi_ref of the model after the warm-up, or of reward_model trained by DPO; or reward_model classifies tokens",
        used_when=(_FORGETS, _SOME_TOKENS),
    )
    reward_model: FilePath | None = execution(
        None,
        "dpo_model, classifier: a model with the policy's tokenizer: hub id, folder, embedded:NAME",
        used_when={".token_reward": ("dpo_model", "classifier")},
    )
    allow_empty_layers: bool = semantic(False, "train although a matrix has no selected weight; else that is an error")
    factor_bytes: int = execution(
        1 << 30,
        "most memory for what unit: weight needs together with train.orthalign",
        used_when={".unit": "weight", "train.orthalign.objectives": other_than([])},
        ge=1,
    )

    @property
    def on(self) -> bool:
        """Whether training goes through ALLO's phases."""
        return self.mask != "none"

    @property
    def needs_rewards(self) -> bool:
        """Whether rejected tokens are rewarded."""
        return self.forget or self.key_fraction < 1

    @property
    def needs_warmup(self) -> bool:
        """Whether there is a DPO warm-up: for the mask, or as the token reward."""
        return self.mask == "warmup" or (self.needs_rewards and self.token_reward == "implicit")

    @model_validator(mode="after")
    def _sensible(self) -> AlloConfig:
        if not self.on:
            return self
        if not (self.forget or self.learn):
            raise ValueError("train.allo.forget and train.allo.learn are both false: nothing would be trained")
        if self.forget_max_steps == 0:
            raise ValueError("train.allo.forget_max_steps is 0: use forget: false, -1, or a positive number of steps")
        if self.needs_rewards and self.token_reward != "implicit" and self.reward_model is None:
            raise ValueError(f"train.allo.token_reward: {self.token_reward} needs train.allo.reward_model")
        return self
