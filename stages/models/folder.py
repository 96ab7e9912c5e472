"""A model folder: is it one we can load safely (safetensors only), and what is its content hash. Imports no torch."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from schemas.ids import content_id
from stages.models.cache import file_hashes

CONTENT = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "chat_template.json",
    "*.py",
)
"""Files that make a model what it is: what is downloaded from the hub and hashed."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_ADAPTER_WEIGHTS = "adapter_model.safetensors"  # without it PEFT would read adapter_model.bin
_LONGEST_HEADER = 100 << 20  # of a safetensors file, as the library has it
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter and no model of its own."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def content_files(folder: Path) -> list[Path]:
    """The folder's files that count, in order of name."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and any(fnmatch.fnmatch(path.name, p) for p in CONTENT)
    )


def folder_digest(folder: Path, cache: Path) -> str:
    """Hash over the sorted (file name, SHA-256) of the files that count."""
    hashes = file_hashes(content_files(folder), cache)
    return content_id("model folder", [[path.name, hashes[path]] for path in sorted(hashes)])


def check_folder(folder: Path, name: str) -> None:
    """Raise UserError unless the folder is a model (or adapter) with whole safetensors weights and a tokenizer."""
    if not folder.is_dir():
        raise UserError(f"The model {name} is not there", where=str(folder), fix="Check the path or the hub id.")
    adapter = is_adapter(folder)
    read_json(folder / ("adapter_config.json" if adapter else "config.json"), name)
    weights = sorted(folder.glob(_ADAPTER_WEIGHTS if adapter else "*.safetensors"))
    if not weights:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"The model {name} has only pickle weights ({', '.join(pickles[:3])}), which can run code when loaded",
                where=str(folder),
                fix="Use a version with safetensors weights, or convert it with save_pretrained on a machine you trust "
                "the file on.",
            )
        wanted = _ADAPTER_WEIGHTS if adapter else "*.safetensors"
        raise UserError(f"The model {name} has no {wanted} weights", where=str(folder), fix="Check the folder.")
    for path in weights:
        _check_safetensors(path, name)
    for index in folder.glob("*.safetensors.index.json"):
        files = read_json(index, name).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise UserError(f"The weight index of the model {name} has no weight_map", where=str(index))
        missing = sorted(set(files.values()) - {path.name for path in weights})
        if missing:
            raise UserError(
                f"The model {name} lacks weight files: {', '.join(missing[:3])}",
                where=str(index),
                fix="Download or copy the model again.",
            )
    if not adapter and not any((folder / tokenizer).is_file() for tokenizer in _TOKENIZERS):
        raise UserError(
            f"The model {name} has no tokenizer",
            where=str(folder),
            fix=f"The folder needs one of {', '.join(_TOKENIZERS)}.",
        )


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in a model's file; UserError if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"The model {name} has no {path.name}",
            where=str(path.parent),
            fix="Give a folder as save_pretrained writes it, or a hub id.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} of the model {name} cannot be read: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise UserError(f"{path.name} of the model {name} is not a JSON object", where=str(path))
    return value


def _check_safetensors(path: Path, name: str) -> None:
    """The header parses and the file is as long as it says: finds cut downloads and Git LFS pointers at once."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError("the header is longer than the file, or than 100 MB")
            header = json.loads(file.read(length))
        ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
        if 8 + length + max(ends, default=0) != size:
            raise ValueError(f"it should be {8 + length + max(ends, default=0)} bytes long and is {size}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"The weights of the model {name} are damaged: {error}",
            where=str(path),
            fix="Download or copy the file again (a Git LFS pointer needs `git lfs pull`).",
        ) from error
