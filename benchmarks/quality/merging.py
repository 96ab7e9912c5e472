"""Offline merging of a trained model with the SFT model, after the fact: the baselines of online merging (arXiv 2405.17931).

Both models are seen as differences to the pretrained one: s = SFT - base, t = trained - base. `share` is the weight of s.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stages.train.optimizers.masks import keep_top_, random_mask

Weights = Mapping[str, torch.Tensor]


def linear(sft: Weights, trained: Weights, share: float) -> dict[str, torch.Tensor]:
    """share * SFT + (1 - share) * trained: no base is needed."""
    return {name: torch.lerp(trained[name], sft[name], share) for name in trained}


def dare(
    base: Weights, sft: Weights, trained: Weights, share: float, reserve: float, seed: int
) -> dict[str, torch.Tensor]:
    """base + share * F(s) + (1 - share) * F(t), F keeping each entry with probability `reserve`, scaled 1 / reserve (2311.03099)."""
    merged = {}
    for name, origin in base.items():
        kept = []
        for side, model in (("sft", sft), ("trained", trained)):
            mask = random_mask(reserve, (seed, side, name), 0, origin.numel()).view(origin.shape)
            kept.append((model[name] - origin) * mask / reserve)
        merged[name] = origin + share * kept[0] + (1 - share) * kept[1]
    return merged


def ties(base: Weights, sft: Weights, trained: Weights, share: float, reserve: float) -> dict[str, torch.Tensor]:
    """base + the weighted mean, entry by entry, of those of F(s), F(t) that have the sign of their weighted sum; F keeps the
    `reserve` largest entries of a tensor (2306.01708, with weights share and 1 - share)."""
    merged = {}
    for name, origin in base.items():
        parts = torch.stack([keep_top_((model[name] - origin).clone(), reserve) for model in (sft, trained)])
        weights = torch.tensor([share, 1 - share]).view(2, *[1] * origin.ndim)
        elected = (weights * parts).sum(0).sign()
        agrees = (parts.sign() == elected) & (parts != 0)
        total = (weights * agrees).sum(0)
        merged[name] = origin + (weights * parts * agrees).sum(0) / total.clamp_min(1e-12)
    return merged
