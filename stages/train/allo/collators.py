"""Batches of pairs whose rejected side counts only in some tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stages.train.columns import Collate


@dataclass
class KeyTokens:
    """TRL's batch, chosen rows then rejected ones, with `completion_mask` of a rejected row on its `key_tokens` only (positions in the
    completion); rows without that column stay whole."""

    whole: Collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.whole(examples)
        mask = batch["completion_mask"]
        for row, example in enumerate(examples, len(examples)):
            if "key_tokens" in example:
                mask[row] = 0
                mask[row, len(example["prompt_ids"]) + torch.tensor(example["key_tokens"])] = 1
        return batch


@dataclass
class RejectedSide:
    """The rejected rows [B, T] of TRL's batch, with `token_weights` and `ref_token_logps` [B, T] at the completion's positions and 0
    elsewhere."""

    whole: Collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.whole(examples)
        rejected = {n: batch[n][len(examples) :] for n in ("input_ids", "attention_mask", "completion_mask")}
        for name in ("token_weights", "ref_token_logps"):
            values = torch.zeros(rejected["input_ids"].shape, dtype=torch.float32)
            for row, example in enumerate(examples):
                start = len(example["prompt_ids"])
                values[row, start : start + len(example[name])] = torch.tensor(example[name], dtype=torch.float32)
            rejected[name] = values
        return rejected
