"""`doctor` on a cluster (execution.on: ray): the same versions and the same folder on every node, cores, GPUs, how fast they read."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.cluster import Cluster
from pipeline.cluster_crew import cluster_client
from schemas.config import RunConfig
from stages.checks.finding import Finding


def cluster_findings(config: RunConfig) -> Iterator[Finding]:
    """A line a node. Raises UserError for a cluster that a run would refuse."""
    client = cluster_client(config)
    try:
        seen = client.call(Cluster.check, config.folder.resolve() / "_tmp")
        gpus = {node.name: int(node.gpus) for node in client.call(Cluster.nodes)}
    finally:
        client.close()
    for name, look in sorted(seen.items()):
        rate = f"reads the run directory at {look.read_mb_per_s:,.0f} MB/s (a file that this node just wrote)"
        yield Finding("cluster", "ok", f"{name}: {look.cores} cores, {gpus.get(name, 0)} GPUs; {rate}")
    total = sum(gpus[name] for name in seen if name in gpus)
    what = f"{len(seen)} nodes with the same versions and the same folder, {total} GPUs"
    yield Finding("cluster", "ok", what, values={"nodes": len(seen), "gpus": total, "workers": total or len(seen)})
