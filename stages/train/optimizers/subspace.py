"""Protected subspaces: the directions in which earlier objectives changed a matrix. docs/methods.md section 6, arXiv 2509.24610."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from schemas.errors import UserError
from schemas.ids import canonical_json
from stages.train.optimizers.change import Change
from stages.train.optimizers.shard import LocalRows, add_up

Side = Literal["left", "right", "both"]
Bases = tuple[torch.Tensor | None, torch.Tensor | None]
_SIDES: dict[Side, tuple[str, ...]] = {"left": ("left",), "right": ("right",), "both": ("left", "right")}


@dataclass(frozen=True)
class Protected:
    """Orthonormal bases by parameter name: left Q [O, q] of output directions, right Q [I, q] of input directions."""

    left: Mapping[str, torch.Tensor]
    right: Mapping[str, torch.Tensor]

    @classmethod
    def none(cls) -> Protected:
        """Nothing is protected yet."""
        return cls({}, {})

    def extended(
        self,
        changes: Mapping[str, torch.Tensor | Change],
        side: Side = "left",
        energy: float = 0.95,
        q_max: int = 64,
    ) -> Protected:
        """With the leading singular vectors of an objective's weight changes appended.

        changes: W_after - W_before, [O, I] each, from the master weights, or what `Change` kept of it. Per matrix the fewest
        singular vectors that hold `energy` of the squared norm are taken, at most `q_max` (ours: a change that looks like noise
        would otherwise claim most of the space); what the basis already spans is not added again. Raises UserError, naming the
        parameter, for a change that is not a finite matrix, when all changes are zero, and when a basis becomes the whole space, in
        which nothing could be trained any more.
        """
        if not 0 < energy <= 1 or q_max < 1:
            raise UserError(f"energy is {energy}, q_max {q_max}", where="orthalign", fix="0 < energy <= 1, q_max >= 1.")
        bases = {"left": dict(self.left), "right": dict(self.right)}
        changed = False
        for name, given in changes.items():
            change = given if isinstance(given, Change) else Change.of(name, given, q_max)
            kept = change.first(min(change.count(energy), q_max))
            if not len(kept.values):
                continue
            changed = True
            found = {"left": kept.left, "right": kept.right}
            for where in _SIDES[side]:
                bases[where][name] = _append(bases[where].get(name), found[where])
                _leaves_room(name, bases[where][name])
        if not changed:
            raise UserError("The objective changed nothing: there is no subspace to protect", where="orthalign")
        return Protected(bases["left"], bases["right"])

    @property
    def fingerprint(self) -> str:
        """Hash of the bases; "" when nothing is protected."""
        if not self:
            return ""
        content = hashlib.blake2b(digest_size=16)
        for where, bases in (("left", self.left), ("right", self.right)):
            for name in sorted(bases):
                content.update(canonical_json([where, name, list(bases[name].shape)]).encode())
                content.update(bases[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return content.hexdigest()

    def __bool__(self) -> bool:
        return bool(self.left or self.right)

    def covers(self, name: str) -> bool:
        """Whether the parameter has protected directions."""
        return name in self.left or name in self.right

    def save(self, path: Path | str) -> None:
        """As one safetensors file."""
        tensors = {f"left/{n}": q for n, q in self.left.items()}
        save_file(tensors | {f"right/{n}": q for n, q in self.right.items()}, path)

    @classmethod
    def load(cls, path: Path | str) -> Protected:
        """What `save` wrote."""
        tensors = load_file(path)
        sides = [{n.removeprefix(s): q for n, q in tensors.items() if n.startswith(s)} for s in ("left/", "right/")]
        return cls(*sides)

    def bases(self, name: str, like: torch.Tensor, shard: LocalRows | None = None) -> Bases:
        """Left (its rows that `shard` says) and right basis of a parameter, on the device and in the dtype of `like`."""
        left, right = self.left.get(name), self.right.get(name)
        if left is not None and shard is not None:
            left = shard.take(left)
        return (
            None if left is None else left.to(like.device, like.dtype),
            None if right is None else right.to(like.device, like.dtype),
        )

    def project_(self, name: str, update: torch.Tensor) -> None:
        """Remove the protected directions from an update [O, I], in place."""
        take_out_(update, self.bases(name, update))

    def leak(self, name: str, displacement: torch.Tensor) -> float:
        """|what lies in the protected subspaces| / |displacement|, in float64; 0 for no displacement."""
        inside = displacement.double().clone()
        self.project_(name, inside)
        norm = float(displacement.double().norm())
        return float((displacement.double() - inside).norm()) / norm if norm else 0.0

    def check(self, name: str, parameter: torch.Tensor) -> None:
        """Raise UserError unless the parameter is a matrix that the bases fit."""
        for axis, bases in enumerate((self.left, self.right)):
            q = bases.get(name)
            if q is not None and (parameter.ndim != 2 or parameter.shape[axis] != q.shape[0]):
                raise UserError(
                    f"The protected subspace of {name} is in {q.shape[0]} dimensions, the parameter is"
                    f" {list(parameter.shape)}",
                    where="protected",
                )
            if q is not None:
                _leaves_room(name, q)


def take_out_(update: torch.Tensor, bases: Bases, peers: dist.ProcessGroup | None = None) -> None:
    """u - Q (Q^T u), then u - (u Q) Q^T, in place. peers: the processes with the other rows of the update, if it is not whole: Q^T u
    [q, I] is summed over them."""
    left, right = bases
    if left is not None:
        update.addmm_(left, add_up(left.T @ update, peers), alpha=-1)
    if right is not None:
        update.addmm_(update @ right, right.T, alpha=-1)


def _leaves_room(name: str, basis: torch.Tensor) -> None:
    if basis.shape[1] >= basis.shape[0]:
        raise UserError(
            f"The protected subspace of {name} is all {basis.shape[0]} dimensions: nothing is left to train",
            where="protected",
            fix="Lower energy or q_max.",
        )


def _append(basis: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """[basis, what of `new` is outside it], orthonormal to float64, stored as float32."""
    if basis is None:
        return new.float().contiguous()
    old, _ = torch.linalg.qr(basis.double())
    for _ in range(2):  # once leaves rounding of the size of what was removed
        new = new - old @ (old.T @ new)
    u, s, _ = torch.linalg.svd(new, full_matrices=False)
    return torch.cat([basis.double(), u[:, s > 1e-6]], dim=1).float().contiguous()


def is_stack(weights: torch.Tensor) -> bool:
    """Whether weights [E, O, I] are a stack of matrices, a mixture's experts; a depthwise convolution's [C, 1, K] are one matrix."""
    return weights.ndim > 2 and min(weights.shape[1:]) > 1


def refuse_unprotected(model: nn.Module, method: str) -> None:
    """Raise UserError for weights whose directions cannot be protected: stored [I, O] (GPT-2's Conv1D), outputs and inputs would be taken for
    each other; experts in a stack [E, O, I], where they are trained, would be left out."""
    name = next((name for name, module in model.named_modules() if isinstance(module, Conv1D)), None)
    if name is not None:
        raise UserError(
            f"{name} is a Conv1D, whose weight is stored transposed: outputs and inputs would be taken for each other",
            where="train.orthalign",
            fix="Train this model without objectives, or use one made of nn.Linear layers.",
        )
    stack = next((name for name, p in model.named_parameters() if is_stack(p)), None)
    if method == "full" and stack is not None:
        raise UserError(
            f"{stack} is a stack of matrices (a mixture of experts), whose directions objectives in sequence do not protect",
            where="train.orthalign",
            fix="Set train.method: lora, which leaves such stacks as they are, or train without objectives.",
        )
