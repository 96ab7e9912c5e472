"""The losses of `loss.type` written down from their papers (and from what TRL 1.16 says it changes), for tests.

Each is a function of x = s - s_ref of chosen and rejected (of s where `LossConfig.reference_free`), their lengths and beta, and gives one
value per pair. `NAME+nll` has the likelihood term, of x: at a reference of 0 it is the loss's own, else off by a constant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
SETTINGS: dict[str, dict[str, float]] = {
    "robust": {"label_smoothing": 0.2},
    "exo_pair": {"label_smoothing": 0.01},
    "discopop": {"discopop_tau": 0.7},
    "simpo": {"gamma": 0.8},
}
NLL = 0.4


def settings_of(name: str, beta: float) -> dict[str, float | str]:
    """The `loss` section of a loss of `LOSSES`."""
    kind, _, more = name.partition("+")
    return {"type": kind, "beta": beta, **SETTINGS.get(kind, {}), **({"nll": NLL} if more else {})}


def _softplus(x: Tensor) -> Tensor:
    """-log sigmoid(-x)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _sigmoid(x: Tensor) -> Tensor:
    return (torch.tanh(x / 2) + 1) / 2


def _dpo(x_w: Tensor, x_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float) -> Tensor:
    return _softplus(-beta * (x_w - x_l))


def _hinge(x_w: Tensor, x_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float) -> Tensor:
    """SLiC-HF / RSO (arXiv 2309.06657)."""
    return (1 - beta * (x_w - x_l)).clamp_min(0)


def _robust(x_w: Tensor, x_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float) -> Tensor:
    """Robust DPO (arXiv 2403.00409, equation 12)."""
    e, z = SETTINGS["robust"]["label_smoothing"], beta * (x_w - x_l)
    return ((1 - e) * _softplus(-z) - e * _softplus(z)) / (1 - 2 * e)


def _exo(x_w: Tensor, x_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float) -> Tensor:
    """EXO-pref (arXiv 2402.00856, equation 16): KL of softmax(beta x) to (1 - e, e)."""
    e = SETTINGS["exo_pair"]["label_smoothing"]
    log_p = torch.log_softmax(beta * torch.stack([x_w, x_l]), dim=0)
    log_r = torch.log(torch.tensor([1 - e, e], dtype=x_w.dtype))[:, None]
    return (log_p.exp() * (log_p - log_r)).sum(dim=0)


def _discopop(x_w: Tensor, x_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float) -> Tensor:
    """Log-ratio modulated loss (arXiv 2406.08414, equation 5)."""
    z = beta * (x_w - x_l)
    mix = _sigmoid(z / SETTINGS["discopop"]["discopop_tau"])
    return (1 - mix) * _softplus(-z) + mix * torch.exp(-z)


def _ipo(x_w: Tensor, x_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036, equation 17) on means over tokens."""
    return (x_w / n_w - x_l / n_l - 1 / (2 * beta)) ** 2


def _sigmoid_norm(x_w: Tensor, x_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float) -> Tensor:
    """DPO's loss on means over tokens."""
    return _softplus(-beta * (x_w / n_w - x_l / n_l))


def _simpo(x_w: Tensor, x_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float) -> Tensor:
    """SimPO (arXiv 2405.14734, equation 6)."""
    return _softplus(SETTINGS["simpo"]["gamma"] - beta / n_w * x_w + beta / n_l * x_l)


def _with_nll(loss: Loss) -> Loss:
    """L + NLL of Iterative RPO (arXiv 2404.19733, equation 1), the likelihood per token of chosen."""
    return lambda x_w, x_l, n_w, n_l, beta: loss(x_w, x_l, n_w, n_l, beta) - NLL * x_w / n_w


def _nca(x_w: Tensor, x_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float) -> Tensor:
    """NCA with two answers (arXiv 2402.05369)."""
    return _softplus(-beta * x_w) + 0.5 * _softplus(beta * x_w) + 0.5 * _softplus(beta * x_l)


def _bco(x_w: Tensor, x_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float) -> Tensor:
    """BCO (arXiv 2404.04656) without its running reward shift."""
    return _softplus(-beta * x_w) + _softplus(beta * x_l)


def _sppo(x_w: Tensor, x_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float) -> Tensor:
    """SPPO (arXiv 2405.00675) with P = 1 and 0."""
    return (x_w - 1 / (2 * beta)) ** 2 + (x_l + 1 / (2 * beta)) ** 2


def _apo_zero(x_w: Tensor, x_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float) -> Tensor:
    """APO-zero (arXiv 2408.06266, equation 7)."""
    return 1 - _sigmoid(beta * x_w) + _sigmoid(beta * x_l)


def _apo_down(x_w: Tensor, x_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float) -> Tensor:
    """APO-down (arXiv 2408.06266, equation 8)."""
    return _sigmoid(beta * x_w) + 1 - _sigmoid(beta * (x_w - x_l))


LOSSES: dict[str, Loss] = {
    "sigmoid": _dpo,
    "hinge": _hinge,
    "robust": _robust,
    "exo_pair": _exo,
    "discopop": _discopop,
    "ipo": _ipo,
    "sigmoid_norm": _sigmoid_norm,
    "simpo": _simpo,
    "nca_pair": _nca,
    "bco_pair": _bco,
    "sppo_hard": _sppo,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    **{
        f"{name}+nll": _with_nll(loss) for name, loss in (("sigmoid", _dpo), ("simpo", _simpo), ("apo_zero", _apo_zero))
    },
}
