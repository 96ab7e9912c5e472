"""Model folders with odd values and damaged files are refused in words, or loaded: never a traceback."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from schemas.config.model import TextConfig
from schemas.errors import UserError
from stages.contract import ModelRef
from stages.models.resolve import resolve
from stages.models.strict import skeleton
from stages.text.render import load_renderer

DIGITS = "9" * 5000
VALUES: list[Any] = [
    -1, 0, 3, 10**9, 10**18, DIGITS, "x", "16", "", None, [], {}, [1, 2], {"a": 1}, float("nan"), float("inf"), -0.5, True,
    "\ud800", "\x1b[31m",
]  # fmt: skip
KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "intermediate_size",
    "layer_types", "rope_parameters", "dtype", "model_type", "architectures", "auto_map", "quantization_config", "pad_token_id",
    "eos_token_id", "text_config", "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip
SEED, CASES = 7, 60


def put(path: Path, key: str, value: Any) -> None:
    values = json.loads(path.read_text())
    text = json.dumps(values | {key: 0 if value is DIGITS else value})
    path.write_text(text.replace(f'"{key}": 0', f'"{key}": {DIGITS}') if value is DIGITS else text)


def flipped(path: Path, random: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(8):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(bytes(data))


def looked_at(folder: Path, cache: Path) -> bool:
    """Whether the folder is taken. Raises whatever is no UserError."""
    try:
        model = resolve(str(folder), cache=cache)
        skeleton(model)
        load_renderer(model, TextConfig())
    except UserError as error:
        assert len(str(error)) < 4000
        return False
    return True


def test_odd_values_and_damaged_files_end_in_words(tiny_model: Path, tmp_path: Path) -> None:
    """Sixty of the cases that `CASES, SEED` can be raised to: docs/hostile-text.md has what more of them found."""
    chance, taken = random.Random(SEED), 0
    for number in range(CASES):
        folder = Path(shutil.copytree(tiny_model, tmp_path / str(number)))
        if chance.random() < 0.7:
            put(folder / "config.json", chance.choice(KEYS), chance.choice(VALUES))
        else:
            flipped(chance.choice(sorted(folder.iterdir())), chance)
        taken += looked_at(folder, tmp_path / "cache")
        shutil.rmtree(folder)
    assert 5 < taken < CASES - 20


CHANGES: dict[str, Callable[[Path], object]] = {
    "a validator of transformers": lambda m: put(m / "config.json", "vocab_size", "many"),
    "an index of transformers": lambda m: put(m / "config.json", "dtype", [1, 2]),
    "an assertion of torch": lambda m: put(m / "config.json", "pad_token_id", 10**5),
    "a bare exception of tokenizers": lambda m: (m / "tokenizer.json").write_text('{"version": "1.0", "x": }'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_library_raises_over_a_folder_is_said_with_its_name(
    change: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "odd-model"))
    CHANGES[change](folder)
    with pytest.raises(UserError, match=r"odd-model cannot be loaded"):
        skeleton(ModelRef("odd-model", folder, ""))


def adapter(folder: Path, base: Path) -> Path:
    folder.mkdir()
    save_file({"a": np.zeros(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "revision": "main"}))
    return folder


def test_an_adapter_that_is_its_own_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names itself as its base model"):
        resolve(str(adapter(tmp_path / "one", tmp_path / "one")), cache=tmp_path / "cache")
    adapter(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="names itself as its base model"):
        resolve(str(adapter(tmp_path / "b", tmp_path / "a")), cache=tmp_path / "cache")


def test_a_revision_of_a_model_that_is_here_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is on this machine, and a revision is of a model on the hub"):
        resolve(str(tiny_model), "v2", tmp_path / "cache")
    with pytest.raises(UserError, match="revision"):
        resolve("embedded:anything", "v2", tmp_path / "cache")
