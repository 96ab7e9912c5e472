"""The class of each judge method of `schemas.judging`."""

from __future__ import annotations

from collections.abc import Mapping

from schemas.judging import JudgeMethod
from stages.judge.comparing import Pairwise
from stages.judge.method import Method
from stages.judge.rewards import ImplicitReward, RewardModel
from stages.judge.scoring import Additive, ExpectedScore

CLASSES: Mapping[JudgeMethod, type[Method]] = {
    "expected_score": ExpectedScore,
    "additive": Additive,
    "reward_model": RewardModel,
    "implicit_reward": ImplicitReward,
    "pairwise": Pairwise,
}
