"""`run` on models that are no plain decoder: a mixture of experts, a multimodal wrapper, a tied model with an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import tiny_config as small
from benchmarks.tiny_models import tiny_model as make

IDS = {"vocab_size": 1024, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}


@pytest.fixture
def curate(write_tiny, inline_command, tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """curate(model folder, key=value…): imported pairs to a trained model; (round folder, what was said)."""

    def run(folder: Path, *options: str, **changes: Any) -> tuple[Path, str]:
        path = write_tiny(
            prompts={},
            pairs={"sources": [{"path": "package:authored_pairs/{language}.jsonl", "limit": 5}], "test_fraction": 0.2},
            model__policy=str(folder),
            languages={"seen": ["en", "de"], "identify": False},
            evaluate={"authored": [], "win_rate": False, "pairs_per_language": 2},
            train__max_steps=1,
            **changes,
        )
        said = inline_command("run", str(path), *options)
        return tmp_path / "runs/t/round-0", said.output

    return run


def saved(folder: Path, tokenizer: Any, name: str, **fields: Any) -> Path:
    """A random model with long enough positions for the authored pairs."""
    config = small(name, **fields)
    for part in (config, config.get_text_config()):
        for key, value in {**IDS, "max_position_embeddings": 2048}.items():
            setattr(part, key, value)
    model = make(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_mixture_of_experts(curate, tmp_path, tiny_tokenizer) -> None:
    folder = saved(tmp_path / "moe", tiny_tokenizer, "qwen3_moe")
    root, said = curate(folder, "--until", "train", gradients__sketch__include=["*", "*.1.*.experts.*"])
    assert "routed experts hold" in said
    assert pl.read_parquet(root / "curated/*.parquet").height > 0
    schema = pl.read_parquet_metadata(next((root / "gradients").glob("*.parquet")))
    layers = [layer["name"] for layer in json.loads(schema["sketch_layout"])["layers"]]
    assert "model.layers.1.mlp.experts.gate_up_proj" in layers and "model.layers.0.self_attn.q_proj" in layers
    assert not any("layers.0.mlp.experts" in name for name in layers)
    before, after = load_file(folder / "model.safetensors"), load_file(root / "train/model/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed)


def test_a_wrapper_with_a_tower_for_images(curate, tmp_path, tiny_tokenizer) -> None:
    folder = saved(tmp_path / "gemma", tiny_tokenizer, "gemma3")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    root, said = curate(folder)
    assert (root / "train/model/preprocessor_config.json").exists(), "what reads images stays with the model"
    assert "14 layers" in said and "vision" not in said
    before, after = load_file(folder / "model.safetensors"), load_file(root / "train/model/model.safetensors")
    assert before.keys() == after.keys(), "the trained model is whole: its towers are saved with it"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("vision" in name for name in changed)


def test_a_tied_model_with_an_adapter_on_its_head(curate, tmp_path, tiny_tokenizer, monkeypatch) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = saved(tmp_path / "base", tiny_tokenizer, "llama", tie_word_embeddings=True)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    root, _ = curate(tmp_path / "adapter", "--until", "train")
    (merged,) = (path for path in (tmp_path / "cache/congrad/merged").iterdir() if path.is_dir())
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        torch.testing.assert_close(got, adapted(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    assert (root / "train/model/model.safetensors").exists()


def test_what_cannot_work_is_refused_before_anything_is_done(write_tiny, inline_command, tmp_path, tiny_model) -> None:
    """Before prompts are answered: weights under a wrapper's names, layers that cannot be sketched."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    save_file({f"_orig_mod.{n}": t for n, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    path = write_tiny(model__policy=str(folder))
    for more in ((), ("--dry-run",)):
        result = inline_command("run", str(path), *more, check=False)
        assert result.exit_code and "torch.compile" in result.output and "_orig_mod." in result.output
    path = write_tiny(gradients__sketch__include=["*.nothing.*"])
    result = inline_command("run", str(path), check=False)
    assert result.exit_code and "'*.nothing.*' matches none" in result.output
    assert not list(tmp_path.rglob("candidates"))


def test_a_dry_run_says_what_a_sketch_covers(write_tiny, inline_command) -> None:
    said = inline_command("run", str(write_tiny()), "--dry-run").output
    assert "14 layers, " in said and "left out: " in said
