"""Generation settings that transformers reads and refuses to write, and the tokens that a trained model ends with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from stages.contract import ModelRef
from stages.models.generation import write_generation
from stages.models.load import load_causal_lm


@pytest.mark.parametrize("settings", [{"temperature": 0.9, "top_p": 0.6}, {"do_sample": False, "top_k": 1}])
def test_a_model_whose_settings_contradict_each_other_is_written_and_passes_them_on(
    tmp_path: Path, tiny_model: Path, settings: dict
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model, source)
    written = {"eos_token_id": 2, "bos_token_id": 1, **settings}
    (source / "generation_config.json").write_text(json.dumps(written))
    model = load_causal_lm(ModelRef("m", source, "d"), torch.float32, torch.device("cpu"))
    model.save_pretrained(tmp_path / "target")
    assert model.generation_config.eos_token_id == 2
    write_generation(source, tmp_path / "target", (2,))
    assert json.loads((tmp_path / "target" / "generation_config.json").read_text()) == written


@pytest.mark.parametrize(("before", "after"), [(None, [5, 7]), (7, [5, 7]), ([7, 9], [5, 7, 9]), ([5, 7], [5, 7])])
def test_what_it_learnt_to_end_with_ends_it(tmp_path: Path, before: object, after: list[int]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({} if before is None else {"eos_token_id": before}))
    write_generation(tmp_path / "none", tmp_path, (5, 7))
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": after}


@pytest.mark.parametrize(
    "damaged", ["{", '{"eos_token_id": "x"}', '{"eos_token_id": [null, 7]}', '{"eos_token_id": true}']
)
def test_damaged_settings_do_not_lose_what_was_trained(tmp_path: Path, tiny_model: Path, damaged: str) -> None:
    """transformers loads a model beside them; so its training must reach the disk."""
    source = tmp_path / "source"
    shutil.copytree(tiny_model, source)
    (source / "generation_config.json").write_text(damaged)
    model = load_causal_lm(ModelRef("m", source, "d"), torch.float32, torch.device("cpu"))
    model.save_pretrained(tmp_path / "target")
    write_generation(source, tmp_path / "target", (7,))
    found = json.loads((tmp_path / "target" / "generation_config.json").read_text())["eos_token_id"]
    assert 7 in (found if isinstance(found, list) else [found])
