"""A model folder: is it one we can load safely (safetensors only), and what is its content hash. Imports no torch."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from schemas.errors import UserError, first_line
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

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What a multimodal wrapper reads images and sound by: downloaded and passed on, not hashed, since text is read without."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_ADAPTER_WEIGHTS = "adapter_model.safetensors"  # without it PEFT would read adapter_model.bin
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)
_PROMPT_LEARNING = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT")
"""Kinds of adapters that add to the prompt and cannot be merged into weights."""
_FOREIGN = {
    "*.gguf": "GGUF (llama.cpp): give the model it was made from",
    "*.distcp": "a distributed checkpoint: python -m torch.distributed.checkpoint.format_utils dcp_to_torch, then save_pretrained",
    "*.h5": "TensorFlow: load it with from_tf=True of an older transformers and save_pretrained",
    "*.msgpack": "Flax: load it with from_flax=True of an older transformers and save_pretrained",
    "*.onnx": "ONNX: give the model it was exported from",
}
"""Weights of other kinds, and what to do."""
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


def pass_processors_on(source: Path, target: Path) -> None:
    """Copy what a multimodal wrapper reads images and sound by to a folder that its changed weights are saved in."""
    for name in PROCESSORS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def check_folder(folder: Path, name: str) -> None:
    """Raise UserError unless the folder is a model (or adapter) with whole safetensors weights and a tokenizer."""
    if not os.path.isdir(folder):
        raise UserError(f"The model {name} is not there", where=str(folder), fix="Check the path or the hub id.")
    _check_readable(folder, name)
    adapter = is_adapter(folder)
    _refuse_foreign(folder, name)
    config = read_json(folder / ("adapter_config.json" if adapter else "config.json"), name)
    weights = sorted(folder.glob(_ADAPTER_WEIGHTS if adapter else "*.safetensors"))
    if not weights:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"The model {name} has only pickle weights ({', '.join(pickles[:3])}), which can run code when loaded",
                where=str(folder),
                fix="Use a version with safetensors weights, or convert it where you trust the file: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other folder).",
            )
        wanted = _ADAPTER_WEIGHTS if adapter else "*.safetensors"
        raise UserError(f"The model {name} has no {wanted} weights", where=str(folder), fix="Check the folder.")
    tensors = {path: _tensors(path, name) for path in weights}
    if adapter and config.get("peft_type") in _PROMPT_LEARNING:
        raise UserError(
            f"The adapter {name} is {config['peft_type']}: it adds to every prompt and cannot be merged into weights",
            where=str(folder / "adapter_config.json"),
            fix="Give a LoRA adapter, or another that PEFT can merge.",
        )
    if adapter and config.get("peft_type") == "LORA":
        _check_rank(config, name, folder)
    if not adapter:
        _check_index(folder, name, tensors)
        _check_depth(config, name, folder, sum(map(len, tensors.values())))
    if not adapter and not any((folder / tokenizer).is_file() for tokenizer in _TOKENIZERS):
        raise UserError(
            f"The model {name} has no tokenizer",
            where=str(folder),
            fix=f"The folder needs one of {', '.join(_TOKENIZERS)}.",
        )


def _check_readable(folder: Path, name: str) -> None:
    """Raise UserError for what this user may not read: safetensors would say that there is no such file."""
    refused = [folder]
    if os.access(folder, os.R_OK | os.X_OK):
        refused = [path for path in sorted(folder.iterdir()) if path.exists() and not os.access(path, os.R_OK)]
    if refused:
        raise UserError(
            f"The model {name} may not be read by this user",
            where=str(refused[0]),
            fix="Change its owner or permissions (chmod -R a+rX; safetensors writes files that only their owner may read).",
        )


def _refuse_foreign(folder: Path, name: str) -> None:
    """Raise UserError for a folder without safetensors whose weights are of another kind."""
    if any(folder.glob("*.safetensors")):
        return
    for pattern, what in _FOREIGN.items():
        file = next(iter(sorted(folder.glob(pattern))), None)
        if file is not None:
            kind, _, fix = what.partition(": ")
            raise UserError(
                f"The model {name} has no safetensors weights, and {file.name} is {kind}",
                where=str(folder),
                fix=f"{fix[0].upper()}{fix[1:]}.",
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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that loaders read: those the index names, or the only one, or all."""
    index = folder / _INDEX
    if index.is_file() and not (folder / _SINGLE).is_file():
        return [folder / file for file in sorted(set(read_json(index, folder.name)["weight_map"].values()))]
    single = folder / _SINGLE
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def is_quantised(folder: Path) -> bool:
    """Whether the folder's weights are packed by some quantisation."""
    return bool(read_json(folder / "config.json", folder.name).get("quantization_config"))


def _check_index(folder: Path, name: str, tensors: Mapping[Path, Sequence[str]]) -> None:
    """The weight index names files that are there and hold what it says; without one there is model.safetensors."""
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _SINGLE).is_file():
            found = ", ".join(sorted(path.name for path in tensors)[:3])
            raise UserError(
                f"The model {name} has no {_SINGLE} and no {_INDEX} that names its files ({found})",
                where=str(folder),
                fix="Save it with save_pretrained, or rename its only file.",
            )
        return
    files = read_json(index, name).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"The weight index of the model {name} has no weight_map", where=str(index))
    missing = sorted(set(files.values()) - {path.name for path in tensors})
    if missing:
        raise UserError(
            f"The model {name} lacks weight files: {', '.join(missing[:3])}",
            where=str(index),
            fix="Download or copy the model again.",
        )
    held = {path.name: set(keys) for path, keys in tensors.items()}
    absent = sorted(tensor for tensor, file in files.items() if tensor not in held[file])
    if absent:
        raise UserError(
            f"The weight index of the model {name} names {len(absent)} tensors that their files do not hold: "
            f"{', '.join(absent[:3])}",
            where=str(index),
            fix="Download or copy the model again: files of two versions are mixed.",
        )


def _check_depth(config: dict[str, Any], name: str, folder: Path, tensors: int) -> None:
    """No more layers than tensors: a model of 10^8 layers must not even be laid out."""
    for key, value in _counts(config):
        if value > tensors:
            raise UserError(
                f"config.json of the model {name} says {key}: {value:,}, and its files hold {tensors} tensors",
                where=str(folder / "config.json"),
                fix="Correct config.json, or download the model again.",
            )


def _check_rank(config: dict[str, Any], name: str, folder: Path) -> None:
    """No larger rank than any axis of a LoRA's tensors: matrices of rank 10^7 must not be made before shapes are compared."""
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    most = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    with safe_open(folder / _ADAPTER_WEIGHTS, "numpy") as file:
        axes = [size for key in file.keys() for size in file.get_slice(key).get_shape()]  # noqa: SIM118
    if most > max(axes, default=0):
        raise UserError(
            f"adapter_config.json of the adapter {name} says r: {most:,}, and no tensor of its file is that large",
            where=str(folder / "adapter_config.json"),
            fix="Correct adapter_config.json, or save the adapter again.",
        )


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(key, value) of what says how many layers there are, in sub-configurations too."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif key in _LAYER_COUNTS and isinstance(value, int):
            yield key, value


def _tensors(path: Path, name: str) -> list[str]:
    """Names in a safetensors file whose header is sound and whose size is what it says: finds cut downloads and Git LFS
    pointers at once."""
    try:
        with safe_open(path, "numpy") as file:
            found = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The weights of the model {name} are damaged: {first_line(error)}",
            where=str(path),
            fix="Download or copy the file again (a Git LFS pointer needs `git lfs pull`).",
        ) from error
    if not found:
        raise UserError(
            f"The weights of the model {name} are empty: the file holds no tensor",
            where=str(path),
            fix="Save the model again: with FSDP or DeepSpeed its full state dict.",
        )
    return found
