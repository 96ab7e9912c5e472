"""A model that is going to be cut over processes: mapped from its files, and in float32 what it is when it is read in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import tiny_config, tiny_model
from stages.contract import ModelRef
from stages.models.load import load_causal_lm, load_to_cut, widen

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["llama", "gemma4_text", "gpt_oss", "recurrent_gemma"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_once_it_is_float32_it_is_the_model_that_is_read_in_float32(kind, dtype, tmp_path):
    made = tiny_model(tiny_config(kind)).to(dtype)
    made.save_pretrained(tmp_path)
    ref = ModelRef("m", tmp_path, "d")
    found, wanted = load_to_cut(ref), load_causal_lm(ref, torch.float32, CPU)
    assert found.dtype == dtype
    widen(found)
    assert found.config.to_dict() == wanted.config.to_dict()
    for mine, theirs in (
        (found.state_dict(), wanted.state_dict()),
        (dict(found.named_buffers()), dict(wanted.named_buffers())),
    ):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name


def test_files_of_several_dtypes_are_read_in_float32_whole(tiny_model: Path, tmp_path):
    tiny = tmp_path / "mixed"
    tiny.mkdir()
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tiny_model / "model.safetensors").items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-4
    save_file(tensors, tiny / "model.safetensors", {"format": "pt"})
    (tiny / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    loaded = load_to_cut(ModelRef("m", tiny, "d"))
    assert loaded.dtype == torch.float32 and torch.equal(loaded.model.norm.weight, tensors["model.norm.weight"])
