"""A model's name to a folder on this machine and its content hash. Imports no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from schemas.errors import UserError, first_line
from schemas.ids import content_id
from stages.contract import ModelRef
from stages.models import embedded
from stages.models.cache import cache_folder
from stages.models.folder import CONTENT, PROCESSORS, check_folder, content_files, folder_digest, is_adapter
from stages.models.merge import base_of, merged_adapter

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


_LONGEST_CHAIN = 8
"""Adapters on adapters; a longer chain is one that comes back to itself."""


def _is_closed(folder: Path) -> bool:
    """Whether it cannot be told what is there, for want of permission."""
    try:
        os.stat(folder)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def resolve(name: str, revision: str | None = None, cache: Path | None = None, depth: int = 0) -> ModelRef:
    """Find or fetch the model that a user named.

    name: a folder, a hub id, or embedded:NAME. A PEFT adapter (folder or hub id) is merged into its base, once.
    revision: hub revision; refused for a model that is here. depth: adapters that led here. cache: where converted and merged models go (default: the user's cache folder).
    digest: of a folder, hash over names and SHA-256 of its config, tokenizer and safetensors files; of a hub id, hash of
    the commit and the file list; of a merged adapter, hash of both digests.
    Raises UserError for a model that is missing, damaged, or has only pickle weights.
    """
    cache = cache or cache_folder()
    here = os.path.isdir(os.path.expanduser(name))
    if revision is not None and (here or name.startswith(embedded.PREFIX)):
        raise UserError(
            f"{name} is on this machine, and a revision is of a model on the hub",
            where=f"revision: {revision}",
            fix="Leave the revision out, or give the model's hub id.",
        )
    if name.startswith(embedded.PREFIX):
        folder = embedded.fetch(name.removeprefix(embedded.PREFIX), cache)
        check_folder(folder, name)
        return ModelRef(name, folder, folder_digest(folder, cache))
    folder = Path(os.path.expanduser(name))
    if here:
        check_folder(folder, name)
        found = ModelRef(name, folder.resolve(), folder_digest(folder, cache))
    elif name.startswith((".", "~", os.sep)) or not _HUB_ID.fullmatch(name):
        if _is_closed(folder):
            raise UserError(
                f"The model folder {name} may not be looked into: permission denied",
                where="model",
                fix="Give this user the right to read and search it and the folders above it.",
            )
        raise UserError(
            f"There is no model folder {name}",
            where="model",
            fix="Give a folder, a hub id such as google/gemma-2-2b-it, or embedded:NAME "
            f"({', '.join(sorted(embedded.MODELS))}).",
        )
    else:
        found = _from_hub(name, revision)
    assert found.path is not None
    if not is_adapter(found.path):
        return found
    base_name, base_revision = base_of(found)
    if depth == _LONGEST_CHAIN or (os.path.isdir(base_name) and Path(base_name).resolve() == found.path):
        raise UserError(
            f"The adapter {found.name} names itself as its base model",
            where=f"{found.path / 'adapter_config.json'}, base_model_name_or_path",
            fix="Write the base model's folder or hub id there.",
        )
    try:
        base = resolve(base_name, None if os.path.isdir(base_name) else base_revision, cache, depth + 1)
    except UserError as error:
        raise UserError(
            f"The base model of the adapter {found.name} is not usable: {error.what}",
            where=error.where or str(found.path / "adapter_config.json"),
            fix=error.fix,
        ) from error
    return merged_adapter(found, base, cache)


def _from_hub(name: str, revision: str | None) -> ModelRef:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [*CONTENT, *PROCESSORS]
    pinned = revision is not None and _COMMIT.fullmatch(revision) is not None
    try:
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=pinned))
        except LocalEntryNotFoundError:
            if not pinned:
                raise
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"The model {name} is no folder here and could not be fetched from the Hugging Face hub: {first_line(error)}",
            where="model",
            fix="Check the name and the revision, log in with `hf auth login` if it is gated, or give a local folder.",
        ) from error
    check_folder(folder, name)
    files = [[path.name, path.stat().st_size] for path in content_files(folder)]
    digest = content_id("hub model", name, folder.name, files)
    return ModelRef(name, folder, digest, hub=name, revision=folder.name)
