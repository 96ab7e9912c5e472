"""The task vector at training time: tensors by parameter name, kept where the user wants them, fetched ahead."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open

from schemas.errors import UserError
from schemas.ids import content_id
from stages.train.optimizers.build_vector import FINGERPRINT
from stages.train.optimizers.shard import LocalRows

Keep = Literal["device", "cpu", "disk"]


class TaskVector:
    """name -> tensor (bfloat16 or wider). Never part of a state_dict: only `fingerprint` is.

    keep: device: copied to the parameter's device at first use and left there; cpu: in memory, copied to the device when
    needed; disk: a memory-mapped file, read when needed. With cpu and disk the next tensors are fetched by a thread while
    the current ones are used. Of a sharded parameter only the rows this process holds are kept (device, cpu).
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        fingerprint: str,
        keep: Keep = "device",
    ) -> None:
        self.fingerprint, self.keep = fingerprint, keep
        self._tensors = dict(tensors)
        self._held: dict[str, torch.Tensor] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[tuple[str, ...], Future[list[torch.Tensor]]] | None = None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], keep: Keep = "device") -> TaskVector:
        """From tensors in memory. Raises UserError when all are zero or one is not a finite float."""
        _check(tensors)
        content = hashlib.blake2b(digest_size=16)
        for name in sorted(tensors):
            content.update(tensors[name].detach().to("cpu", torch.float64).numpy().tobytes())
        shapes = [[name, list(tensors[name].shape)] for name in sorted(tensors)]
        return cls(tensors, content_id("task vector", shapes, content.hexdigest()), keep)

    @classmethod
    def open(cls, path: Path | str, keep: Keep = "disk") -> TaskVector:
        """A file of `build_task_vector`, memory-mapped: with keep device or cpu read when first used."""
        file = safe_open(str(path), framework="pt", device="cpu")
        fingerprint = (file.metadata() or {}).get(FINGERPRINT)
        if fingerprint is None:
            raise UserError("This is not a task vector", where=str(path), fix="Build it with build_task_vector.")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no Mapping)
        return cls(tensors, fingerprint, keep)

    def check(self, name: str, parameter: torch.Tensor) -> None:
        """Raise UserError, naming the parameter, unless there is a tensor of its shape."""
        if name not in self._tensors:
            raise UserError(
                f"The task vector has no tensor {name}", where="merge", fix="Base, SFT and trained model must match."
            )
        if self._tensors[name].shape != parameter.shape:
            raise UserError(
                f"The task vector of {name} has shape {list(self._tensors[name].shape)}, the parameter"
                f" {list(parameter.shape)}",
                where="merge",
                fix="Base, SFT and trained model must have the same architecture and vocabulary.",
            )

    def whole(self, name: str) -> torch.Tensor:
        """One tensor as it was given or is on disk."""
        return self._tensors[name]

    def prefetch(self, names: Sequence[str], shards: Sequence[LocalRows], device: torch.device) -> None:
        """Start fetching what the next `fetch` will ask for."""
        if self.keep == "device":
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="task-vector")
        self._ahead = (tuple(names), self._thread.submit(self._copy, tuple(names), tuple(shards), device))

    def fetch(self, names: Sequence[str], shards: Sequence[LocalRows], device: torch.device) -> list[torch.Tensor]:
        """The rows this process holds of these parameters' tensors, on `device`."""
        if self.keep == "device":
            return [self._hold(name, shard, device) for name, shard in zip(names, shards, strict=True)]
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == tuple(names):
            return ahead[1].result()
        return self._copy(tuple(names), tuple(shards), device)

    def _copy(self, names: tuple[str, ...], shards: tuple[LocalRows, ...], device: torch.device) -> list[torch.Tensor]:
        """Blocking; also faults the pages of a memory-mapped file in."""
        held = zip(names, shards, strict=True)
        if self.keep == "disk":
            return [self._rows(name, shard).to(device, copy=True) for name, shard in held]
        return [self._hold(name, shard, torch.device("cpu")).to(device, copy=True) for name, shard in held]

    def _hold(self, name: str, shard: LocalRows, device: torch.device) -> torch.Tensor:
        """The rows, kept on `device` from the first time on."""
        if name not in self._held or self._held[name].device != device:
            self._held[name] = self._rows(name, shard).to(device, copy=True)
        return self._held[name]

    def _rows(self, name: str, shard: LocalRows) -> torch.Tensor:
        return shard.take(self._tensors[name])


def _check(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"The task vector of {name} is {tensor.dtype}", where="merge", fix="It must be a float.")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"The task vector of {name} is not finite", where="merge")
    if not any(bool(tensor.any()) for tensor in tensors.values()):
        raise UserError(
            "The task vector is zero: SFT and base have the same weights",
            where="merge",
            fix="Name the pretrained model that the SFT model was made from.",
        )
