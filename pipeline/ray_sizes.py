"""What a worker of a stage takes of the nodes of a Ray cluster, and how many there is room for."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.cluster import Cluster, Node
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.spec import StageSpec


class Sizes:
    """Of the nodes that live now, all of them free."""

    def __init__(self, cluster: Cluster, config: RunConfig) -> None:
        self._cluster, self._config = cluster, config
        self._on_gpus: dict[str, tuple[int, int]] = {}

    def needs(self, spec: StageSpec) -> tuple[int, int]:
        """(cores, GPUs) of a worker. Without execution.threads, all of the smallest node's, shared between the workers it holds. Of a stage
        that had GPUs once, the same while all nodes with GPUs are gone: it waits for them."""
        nodes, gpus = [node for node in self._cluster.nodes() if node.cpus >= 1], 0
        if self._config.execution.device != "cpu" and spec.holds_gpu(self._config):
            nodes_with = [node for node in nodes if node.gpus >= 1]
            if not nodes_with and spec.name in self._on_gpus:
                return self._on_gpus[spec.name]
            if not nodes_with and self._config.execution.device == "cuda":
                raise UserError(
                    "execution.device is cuda, but no node of the Ray cluster has a GPU", where="execution.device"
                )
            if nodes_with:
                most = int(max(node.gpus for node in nodes_with))
                nodes, gpus = nodes_with, max(1, spec.gpus_per_worker(self._config, most))
        threads = self._config.execution.threads
        shares = [node.cpus // max(1, node.gpus // gpus if gpus else 1) for node in nodes]
        found = threads or max(1, int(min(shares, default=1))), gpus
        if gpus:
            self._on_gpus[spec.name] = found
        return found

    def workers(self, spec: StageSpec) -> int:
        """How many there is room for."""
        return sum(self._room(spec))

    def spanned(self, spec: StageSpec) -> int:
        """Nodes that a worker spans. Raises UserError where fewer hold their share of it."""
        there = max(1, sum(room > 0 for room in self._room(spec)))
        wanted = spec.spans(self._config, there)
        if wanted > there:
            cores, gpus = self.needs(spec)
            raise UserError(
                f"Stage {spec.name} is to run on {wanted} nodes and {there} of the Ray cluster can take part: each with {cores} core(s)"
                f" and {gpus} GPU(s)",
                where=spec.machines,
                fix="Add nodes, or set it to 0, which takes those there are. The same command continues from the last checkpoint.",
            )
        return wanted

    def refuse_too_few(self, specs: Sequence[StageSpec]) -> None:
        """Raise UserError for a stage of which no node holds a worker, or that spans more nodes than there are."""
        for spec in specs:
            if not self.workers(spec):
                cores, gpus = self.needs(spec)
                raise UserError(
                    f"No node of the Ray cluster holds a worker of stage {spec.name}: {cores} core(s) and {gpus} GPU(s)",
                    where="execution",
                    fix="Add such a node, or ask for less (execution.threads, engine.tensor_parallel, train.processes).",
                )
            if spec.machines:
                self.spanned(spec)

    def _room(self, spec: StageSpec) -> list[int]:
        cores, gpus = self.needs(spec)
        return [_holds(node, cores, gpus) for node in self._cluster.nodes()]


def _holds(node: Node, cores: int, gpus: int) -> int:
    return int(min(node.cpus // cores, node.gpus // gpus if gpus else node.cpus // cores))
