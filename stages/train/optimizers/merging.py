"""The merge as a step of the chain: AdamW's step and the task vector in, the update out."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stages.train.optimizers import masks, merges
from stages.train.optimizers.active import ActiveEntries
from stages.train.optimizers.bucket import Bucket
from stages.train.optimizers.settings import Merge
from stages.train.optimizers.shard import Shard, add_up
from stages.train.optimizers.task_vector import TaskVector
from stages.train.optimizers.telemetry import Telemetry

CLAMP = 1.0
"""The released OnDARE clamps the task vector, and a rescaled step, to [-1, 1]."""


class Merging:
    """Applies `Merge` settings to buckets. vector: raw; what is constant over a run is trimmed once (`settle`).

    active: entries that may change; the shares that OnTIES keeps are of them.
    """

    def __init__(self, vector: TaskVector | None, seed: int, active: ActiveEntries) -> None:
        self.raw, self.seed, self.active = vector, seed, active
        self._trimmed: TaskVector | None = None

    @property
    def settled(self) -> bool:
        """Whether `settle` has nothing left to do."""
        return self._trimmed is not None or self.raw is None

    def settle(self, settings: Mapping[str, Merge]) -> None:
        """Trim the task vector where the trim is the same at every step; settings: of each merged parameter."""
        if self.settled or self.raw is None:
            return
        trims = {name: merge for name, merge in settings.items() if _trims(merge)}
        if not trims:
            self._trimmed = self.raw
            return
        # What `_trim` reads, and no more: only OnTIES without masks cuts the same from one run to the next.
        again = not self.active and all(merge.merge == "onties" for merge in trims.values())
        read = sorted((name, m.merge, m.preset, m.reserve, m.rescale) for name, m in trims.items())
        key = repr((read, None if again else (self.seed, self.active.fingerprint)))
        self._trimmed = self.raw.trimmed(lambda name, tau: self._trim(name, tau, trims.get(name)), key, again)

    def forget(self) -> None:
        """The settings changed: trim again."""
        self._trimmed = None

    def prefetch(self, names: list[str], shards: list[Shard], device: torch.device) -> None:
        """Have the task vector of the next bucket read ahead."""
        if self._trimmed is not None:
            self._trimmed.prefetch(names, shards, device)

    def __call__(self, bucket: Bucket, merge: Merge, a: float, telemetry: Telemetry | None) -> None:
        """Replace the bucket's AdamW step by the merged update."""
        delta = bucket.update
        tau = self._task(bucket)
        if merge.merge == "anchor":
            displacement = bucket.gather(bucket.state("displacement"))
            tau = displacement.neg_() if tau is None else tau.sub_(displacement)
        assert tau is not None
        for name, view, shard in zip(bucket.names, bucket.views(tau), bucket.shards, strict=True):
            self.active.zero_(name, view, shard)
        if telemetry is not None:
            telemetry.merge(delta, tau, a, bucket.peers)
        if merge.merge == "anchor":
            bucket.update = merges.anchor_(delta, tau, a)
            return
        released = merge.preset == "released"
        norms = _norms(bucket, delta) if merge.rescale else None
        self._mask(bucket, merge, delta, tau)
        if norms is not None:
            self._rescale(bucket, merge, delta, norms)
        if merge.merge == "ondare":
            bucket.update = merges.ondare_(delta, tau, a)
        elif released:
            bucket.update = merges.onties_released_(delta, tau, a)
        else:
            bucket.update = merges.onties_(delta, tau, a)

    def _task(self, bucket: Bucket) -> torch.Tensor | None:
        if self._trimmed is None:
            return None
        return bucket.gather(self._trimmed.fetch(bucket.names, bucket.shards, bucket.update.device))

    def _mask(self, bucket: Bucket, merge: Merge, delta: torch.Tensor, tau: torch.Tensor) -> None:
        """F: of AdamW's step always; of the task vector where it is drawn anew every step."""
        if merge.reserve >= 1:
            return
        if merge.merge == "onties":
            active = [self.active.count(n, shard.numel) for n, shard in zip(bucket.names, bucket.shards, strict=True)]
            masks.keep_top_of_(bucket.views(delta), bucket.shards, merge.reserve, merge.preset == "released", active)
            return
        delta.mul_(self._random(bucket, merge, "step"))
        if merge.preset == "released":
            delta.div_(merge.reserve)
        else:
            tau.mul_(self._random(bucket, merge, "task"))

    def _random(self, bucket: Bucket, merge: Merge, what: str) -> torch.Tensor:
        keys = [(self.seed, bucket.group["phase"], bucket.step, what, name) for name in bucket.names]
        device, shards = bucket.update.device, bucket.shards
        return torch.cat(
            [masks.random_mask(merge.reserve, k, *s.entries, device) for k, s in zip(keys, shards, strict=True)]
        )

    def _rescale(self, bucket: Bucket, merge: Merge, delta: torch.Tensor, before: torch.Tensor) -> None:
        ondare = merge.merge == "ondare"
        eps, clamp = (bucket.group["eps"], CLAMP) if ondare else (0.0, None)
        for view, norm, now in zip(bucket.views(delta), before, _norms(bucket, delta), strict=True):
            merges.rescale_(view, norm, now, eps, clamp)

    def _trim(self, name: str, tau: torch.Tensor, merge: Merge | None) -> torch.Tensor:
        """F(tau) where it is constant: its largest entries (OnTIES), or one random draw (OnDARE as released)."""
        if merge is None:
            return tau
        released = merge.preset == "released"
        if merge.merge == "onties":
            tau = tau.clone()
            self.active.zero_(name, tau)
            norm = tau.abs().sum()
            kept = masks.keep_top_(tau, merge.reserve, released, self.active.count(name, tau.numel()))
            return merges.rescale_(kept, norm, kept.abs().sum(), 0.0, None) if merge.rescale else kept
        mask = masks.random_mask(merge.reserve, (self.seed, "task", name), 0, tau.numel(), tau.device)
        return (tau * mask.view(tau.shape)).div_(merge.reserve).clamp_(-CLAMP, CLAMP)


def _norms(bucket: Bucket, flat: torch.Tensor) -> torch.Tensor:
    """L1 norm of each parameter's part of `flat`, over all processes."""
    return add_up(torch.stack([view.abs().sum() for view in bucket.views(flat)]), bucket.peers)


def _trims(merge: Merge) -> bool:
    return merge.merge == "onties" or (merge.merge == "ondare" and merge.preset == "released")
