"""The task vector theta_SFT - theta_base, built once from two checkpoints as a stream.

python -m stages.train.optimizers.build_vector SFT_FOLDER BASE_FOLDER OUT.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from schemas.errors import UserError
from schemas.ids import content_id
from stages.models.cache import cache_folder, file_hashes
from stages.train.optimizers.stream import Checkpoint, write_stream

_FLOATS = {"F64", "F32", "F16", "BF16"}
FINGERPRINT = "fingerprint"


@dataclass(frozen=True)
class TrainedParameter:
    """A parameter of the model that will be trained: its shape, and other names the checkpoint may use for it (tied weights
    are stored under one of their names)."""

    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()


def build_task_vector(
    sft: Path | str,
    base: Path | str,
    out: Path | str,
    *,
    names: tuple[str, str] = ("the SFT model", "the base model"),
    parameters: Mapping[str, TrainedParameter] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write theta_SFT - theta_base to `out`, differences taken in float32, stored in `dtype`.

    parameters: what is needed, by name (default: every tensor of the SFT checkpoint). At no time is more than a slice of a
    tensor in memory. The file's metadata holds a fingerprint of both models' weights. Raises UserError, naming the tensor, when one
    is missing, has another shape, is not a float, is not finite, or is tied in one model and not in the other; and when
    every difference is zero.
    """
    sft, base, out = Path(sft), Path(base), Path(out)
    later, earlier = Checkpoint(sft, names[0]), Checkpoint(base, names[1])
    if parameters is None:
        parameters = {name: TrainedParameter(later.shape(name)) for name in sorted(later.names())}
    sources = {name: (_find(later, name, want), _find(earlier, name, want)) for name, want in parameters.items()}
    moved, last = False, list(parameters)[-1]

    def differences(name: str) -> Iterator[torch.Tensor]:
        nonlocal moved
        for a, b in zip(later.slices(sources[name][0]), earlier.slices(sources[name][1]), strict=True):
            part = a.float() - b.float()
            if not bool(torch.isfinite(part).all()):
                raise UserError(f"The task vector of {name} is not finite", where=" or ".join(names))
            moved = moved or bool(part.any())
            yield part
        if not moved and name == last:
            raise UserError(
                f"The task vector is zero: {names[0]} and {names[1]} have the same weights",
                where="merge.base",
                fix="Name the pretrained model that the SFT model was made from.",
            )

    hashes = [
        sorted(file_hashes(sorted(folder.glob("*.safetensors")), cache_folder()).values()) for folder in (sft, base)
    ]
    fingerprint = content_id("task vector", hashes, sorted(parameters), str(dtype))
    shapes = {name: want.shape for name, want in parameters.items()}
    write_stream(out, shapes, dtype, differences, {FINGERPRINT: fingerprint})


def _find(checkpoint: Checkpoint, name: str, want: TrainedParameter) -> str:
    """The name under which the checkpoint holds a parameter."""
    found = [alias for alias in (name, *want.aliases) if alias in checkpoint.names()]
    if not found:
        near = sorted(
            other for other in checkpoint.names() if other.rpartition("model.")[2] == name.rpartition("model.")[2]
        )
        raise UserError(
            f"{checkpoint.name} has no tensor {name}",
            where="merge",
            fix=(f"It has {near[0]}: save both models with the same version of transformers. " if near else "")
            + "Both models need the same architecture and names.",
        )
    for other in found:
        shape, kind = checkpoint.shape(other), checkpoint.dtype(other)
        if shape != tuple(want.shape):
            raise UserError(
                f"{name} has shape {list(shape)} in {checkpoint.name} and {list(want.shape)} in the model that is trained",
                where="merge",
                fix="Both models need the same architecture and vocabulary.",
            )
        if kind not in _FLOATS:
            raise UserError(
                f"{name} is stored as {kind} in {checkpoint.name}",
                where="merge",
                fix="Use unquantised weights (bfloat16, float16 or float32).",
            )
    _same(checkpoint, found, name)
    return found[0]


def _same(checkpoint: Checkpoint, found: Sequence[str], name: str) -> None:
    """Weights that are tied in training must be one tensor in the checkpoint too."""
    for other in found[1:]:
        pairs = zip(checkpoint.slices(found[0]), checkpoint.slices(other), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise UserError(
                f"{name} is tied to {other} in the model that is trained, but they differ in {checkpoint.name}",
                where="merge",
                fix="Both models need the same tie_word_embeddings.",
            )


if __name__ == "__main__":
    build_task_vector(*sys.argv[1:4])
