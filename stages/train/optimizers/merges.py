"""The three merges as functions of AdamW's step and the task vector; METHODS.md section 5.

delta: AdamW's step, -(lr / bias correction) * m / (sqrt(v) + eps), without weight decay.  tau = theta_SFT - theta_base.
a: weight of the task vector.  F keeps a share p of the entries. All functions take flat or shaped float tensors of one
parameter or several, overwrite `delta` and return the update that is added to the weights.

Where the released code (QwenLM/online_merging_optimizers, commit 8e53529) differs from the paper, both are here.
"""

from __future__ import annotations

import torch


def ondare_(delta: torch.Tensor, tau: torch.Tensor, a: float) -> torch.Tensor:
    """(1 - a) F(delta) + a F(tau), both masked (and, as released, scaled by 1/p) by the caller (paper, equation 6)."""
    return delta.mul_(1 - a).add_(tau, alpha=a)


def onties_(delta: torch.Tensor, tau: torch.Tensor, a: float) -> torch.Tensor:
    """Consensus of x = (1 - a) F(delta) and y = a F(tau), the paper's weighted election.

    Same sign: x + y. Opposite signs: the larger magnitude; equal opposite magnitudes cancel.
    """
    x, y = delta.mul_(1 - a), tau * a
    total = x + y
    # total has the sign of the larger one: with it, x and y are what agrees (where they do not cancel).
    won = total.sign()
    x.mul_(won).clamp_(min=0)
    y.mul_(won).clamp_(min=0)
    return x.add_(y).mul_(won)


def onties_released_(delta: torch.Tensor, tau: torch.Tensor, a: float) -> torch.Tensor:
    """As released: the vote is sign(F(tau) + F(delta)), unweighted, 0 counting as +; then the weighted sum of what
    agrees with the vote. Since tau is orders of magnitude larger than a step, it wins nearly every vote it takes part in.
    """
    positive = (delta + tau) >= 0
    x = delta.mul_((delta > 0) == positive)
    y = tau * ((tau > 0) == positive)
    return x.mul_(1 - a).add_(y, alpha=a)


def anchor_(delta: torch.Tensor, pull: torch.Tensor, a: float) -> torch.Tensor:
    """(1 - a) delta + a pull, pull = theta_SFT - theta: exactly the merge (1 - a)(theta + delta) + a theta_SFT."""
    return delta.mul_(1 - a).add_(pull, alpha=a)


def rescale_(
    masked: torch.Tensor, before: torch.Tensor, now: torch.Tensor, eps: float, clamp: float | None
) -> torch.Tensor:
    """Released option: scale one parameter's masked values from the L1 norm they have now back to the one before; norms
    below 1e-8 are left as they are."""
    factor = torch.where(before >= 1e-8, before / (now + eps), torch.ones_like(before))
    masked.mul_(factor)
    return masked if clamp is None else masked.clamp_(-clamp, clamp)
