"""An order, or the work of a training, as this machine can carry it out: its files are seen here, its models are this machine's."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config_digests import config_files
from pipeline.messages import Order
from pipeline.probe import refuse_other_versions, versions
from schemas.errors import UserError
from schemas.files import await_whole
from schemas.manifests import FileRecord
from stages.contract import ModelRef
from stages.models.resolve import resolve

if TYPE_CHECKING:
    from stages.train.seat import Work  # loads torch

VISIBLE_SECONDS = 60.0
"""A file that another machine wrote may be seen late (NFS caches attributes for up to a minute)."""


def settled_order(order: Order) -> Order:
    """The order as this node can carry it out: its files are seen here, its models are this node's. Raises UserError for a node
    that has other versions, files or models than the driver."""
    here = socket.gethostname()
    if order.versions:
        refuse_other_versions(here, versions(), order.versions)
    inputs = [record for name in order.inputs for record in _at_once(order, name)]
    if unseen := await_whole(order.root, inputs, order.visible_seconds, thorough=False):
        raise UserError(
            f"Node {here} does not see {len(unseen)} of the run's files after {order.visible_seconds:.0f} s",
            where=str(order.root / unseen[0].path),
            fix="Every node must see the run directory at the same path.",
        )
    for name, digest in config_files(order.spec, order.config).items() if order.outside else ():
        if order.outside.get(name) != digest:
            raise UserError(
                f"The file {name} is another one on node {here} than where the run was started",
                where=f"stage {order.spec.name}",
                fix="Put it where every node sees the same file, for example beside the run directory.",
            )
    return replace(order, models={role: _own(model, order.root, here) for role, model in order.models.items()})


def settled_work(work: Work) -> Work:
    """See the module. Raises UserError as `settled_order`."""
    here, root = socket.gethostname(), work.config.folder
    deadline = time.monotonic() + VISIBLE_SECONDS
    for path in (path for paths in work.inputs.values() for path in paths):
        while not path.is_file():
            if time.monotonic() > deadline:
                raise UserError(
                    f"Node {here} does not see a file of the run after {VISIBLE_SECONDS:.0f} s",
                    where=str(path),
                    fix="Every node must see the run directory at the same path.",
                )
            time.sleep(0.2)
    return replace(work, models={role: _own(model, root, here) for role, model in work.models.items()})


def _at_once(order: Order, name: str) -> list[FileRecord]:
    """Files of a table that are read in any case; of the one that shards are cut from, a shard waits for its own (`runner.read_range`)."""
    cut = order.spec.kind == "shard" and name == order.spec.reads[0].rstrip("?")
    return [] if cut else order.inputs[name]


def _own(model: ModelRef, root: Path, here: str) -> ModelRef:
    """The same model on this node. What the run trained lies in the run directory."""
    if model.path is None or model.path.resolve().is_relative_to(root.resolve()):
        return model
    try:
        found = resolve(model.name, model.revision or None)
    except UserError as error:
        raise UserError(f"On node {here}: {error.what}", where=error.where, fix=error.fix) from error
    if found.digest != model.digest:
        raise UserError(
            f"The model {model.name} is another one on node {here} than where the run was started",
            where=str(found.path),
            fix="Give all nodes the same files, or a folder that all of them see.",
        )
    return found
