"""Config of the preference loss. docs/methods.md section 2; docs/methods.md has each loss's formula."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from schemas.config.base import Section, semantic

_SORTS = (
    "sorts the pairs of a micro-batch before it compares them: the result would change with train.micro_batch_size, and a"
    " pair has no gradient of its own to be curated by"
)
_REFUSED = {
    "aot": _SORTS,
    "aot_unpaired": _SORTS,
    "kto": "takes single answers with a label, and what is curated here is pairs: give TRL's KTOTrainer the answers of candidates with a label made of their scores in judgements",
    "rpo": "is DPO with a likelihood term on chosen (DPO + NLL): set type: sigmoid and loss.nll to its weight",
    "cpo": "is not offered: simpo with loss.nll is the same without the sum over tokens (CPO-SimPO)",
    "orpo": "is a loss of odds, which no curation weight is derived for in this version: simpo needs no reference either",
    "sft": "looks at the chosen answers alone: there is no preference in it to curate by",
}
_SMOOTHING = {"robust": 0.1, "exo_pair": 1e-3}
_ALWAYS_APART = ("ipo", "sigmoid_norm", "simpo", "apo_down")
_AWAY_FROM_REFERENCE = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero")


class LossConfig(Section):
    """The preference loss, shared by gradients, conflict and train."""

    type: Literal[
        "sigmoid",
        "hinge",
        "robust",
        "exo_pair",
        "discopop",
        "ipo",
        "sigmoid_norm",
        "simpo",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
    ] = semantic("sigmoid", "TRL's name of the loss; sigmoid is DPO (docs/methods.md section 2 has the formulas)")
    beta: float = semantic(0.1, "DPO temperature; ipo: tau; simpo: its paper's are 2 to 10", gt=0)
    alpha: float = semantic(
        0.0,
        "sigmoid: length penalty, loss = -log sigmoid(beta*Delta + alpha*(|chosen|-|rejected|))",
        used_when={".type": "sigmoid"},
        ge=0,
    )
    gamma: float | None = semantic(
        None,
        "simpo: margin by which chosen should lead, default 0.5; the paper's are 0.3 to 1 times beta",
        used_when={".type": "simpo"},
        ge=0,
    )
    nll: float = semantic(
        0.0,
        "weight of chosen's negative log-likelihood per token, added to any loss (DPO + NLL, arXiv 2404.19733)",
        ge=0,
    )
    label_smoothing: float | None = semantic(
        None,
        "robust: share of wrong labels, default 0.1; exo_pair: epsilon, default 0.001",
        used_when={".type": tuple(_SMOOTHING)},
        gt=0,
        lt=0.5,
    )
    discopop_tau: float | None = semantic(
        None, "discopop: temperature of its blend, default 0.05", used_when={".type": "discopop"}, gt=0
    )

    @property
    def smoothing(self) -> float:
        """`label_smoothing`, or the value the loss's paper recommends; 0 for a loss without one."""
        return _SMOOTHING.get(self.type, 0.0) if self.label_smoothing is None else self.label_smoothing

    @property
    def tau(self) -> float:
        """`discopop_tau`, or the paper's."""
        return 0.05 if self.discopop_tau is None else self.discopop_tau

    @property
    def target(self) -> float:
        """`gamma`, or what TRL takes; 0 for a loss without one."""
        if self.type != "simpo":
            return 0.0
        return 0.5 if self.gamma is None else self.gamma

    @property
    def reference_free(self) -> bool:
        """Whether it compares log-probabilities as they are, so that no reference model has any part in it."""
        return self.type == "simpo"

    @property
    def in_trl(self) -> str:
        """TRL's `loss_type` that computes it, given what `stages.train.loss` puts in the reference's place."""
        return "sigmoid_norm" if self.type == "simpo" else self.type

    @property
    def label(self) -> str:
        """The loss in words, with the settings that only it has."""
        return self._label + (f" + {self.nll:g} NLL" if self.nll else "")

    @property
    def _label(self) -> str:
        if self.type == "sigmoid":
            return "length-penalised DPO" if self.alpha else "DPO"
        if self.type == "discopop":
            return f"discopop, tau {self.tau:g}"
        if self.type == "simpo":
            return f"SimPO, gamma {self.target:g}"
        return f"{self.type}, label smoothing {self.smoothing:g}" if self.smoothing else self.type

    def weights_sides_apart(self, at_reference: bool) -> bool:
        """Whether the gradients of chosen and rejected have different weights; at_reference: the policy is the reference,
        where most losses weigh both alike."""
        return self.nll > 0 or self.type in _ALWAYS_APART or (self.type in _AWAY_FROM_REFERENCE and not at_reference)

    @field_validator("type", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, str) and value in _REFUSED:
            raise ValueError(f"{value} {_REFUSED[value]}")
        return value
