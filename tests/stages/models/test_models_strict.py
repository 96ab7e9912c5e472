"""Files that do not fit their architecture are refused with their names, by every way a model is loaded; what is harmless is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import tiny_config, tiny_model
from schemas.errors import UserError
from stages.contract import ModelRef
from stages.models.load import load_causal_lm, load_text_model
from stages.models.resolve import resolve
from stages.models.strict import skeleton

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    save_file(change(tensors), weights, {"format": "pt"})


def renamed(prefix: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {n: v for n, v in t.items() if n != UP}, rf"1 are missing \({UP}\)"),
        (
            lambda t: t | {"model.layers.7.mlp.up_proj.weight": t[UP].clone()},
            r"not the architecture's \(model\.layers\.7\.",
        ),
        (lambda t: t | {UP: t[UP][:, :5].contiguous()}, rf"{UP} 128x5 instead of 128x64"),
        (renamed("_orig_mod."), r"torch\.compile \(save model\._orig_mod\)"),
        (renamed("module."), r"DataParallel or DDP"),
        (renamed("base_model.model."), r"PEFT \(save model\.merge_and_unload"),
        (lambda t: t | {"v_head.summary.weight": torch.zeros(1, 64)}, r"not the architecture's \(v_head"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_their_names(folder: Path, change: Any, words: str) -> None:
    rewrite(folder, change)
    model = ModelRef("mine", folder, "")
    for load in (lambda: skeleton(model), lambda: load_causal_lm(model, torch.float32, CPU)):
        with pytest.raises(UserError, match=words) as caught:
            load()
        assert "LlamaForCausalLM" in str(caught.value) and str(folder) in str(caught.value)


def test_harmless_tensors_and_ties_are_no_alarm(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    model = ModelRef("mine", folder, "")
    assert next(skeleton(model).parameters()).is_meta
    load_causal_lm(model, torch.float32, CPU)
    for name in ("gemma3_text", "gpt2", "qwen3_moe"):  # tied, Conv1D, experts that are put together from parts
        tiny_model(tiny_config(name)).save_pretrained(tmp_path / name)
        for file in folder.glob("tokenizer*"):
            shutil.copy(file, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config
        load_causal_lm(ModelRef(name, tmp_path / name, ""), torch.float32, CPU)


def test_experts_that_cannot_be_put_together_are_named(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "moe"
    tiny_model(tiny_config("qwen3_moe", vocab_size=1024)).save_pretrained(target)
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, target)
    model = ModelRef("moe", target, "")
    skeleton(model)
    weights = load_file(target / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    save_file({**weights, name: weights[name][:3].contiguous()}, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj cannot be put together"):
        skeleton(model)


def test_a_tokenizer_larger_than_the_embedding_is_refused_and_a_padded_vocabulary_is_not(
    folder: Path, tiny_tokenizer: Any
) -> None:
    def rows(count: int) -> ModelRef:
        def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {n: torch.zeros(count, 64) if n in (EMBED, "lm_head.weight") else t for n, t in tensors.items()}

        rewrite(folder, change)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": count}))
        return ModelRef("mine", folder, "")

    EMBED = "model.embed_tokens.weight"
    skeleton(rows(1024))
    skeleton(rows(1088))
    with pytest.raises(UserError, match=r"has 24 tokens that the model has no embedding for .*ids to 1023, 1000 rows"):
        skeleton(rows(1000))


def test_a_mark_that_text_never_gets_may_lie_beyond_the_rows_and_a_pad_may_not(folder: Path) -> None:
    """google/gemma-3-1b-it has a mark for images one beyond its rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    skeleton(ModelRef("mine", folder, ""))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"no embedding for \(\[PAD\]\).*resize_token_embeddings"):
        skeleton(ModelRef("mine", folder, ""))


@pytest.mark.parametrize(
    ("header", "body", "words"),
    [
        ({}, b"", "holds no tensor"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, bytes(8), "damaged"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(9), "damaged"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8), "damaged"),
        ({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, bytes(4), "damaged"),
        ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, bytes(4), "damaged"),
    ],
)
def test_empty_and_damaged_headers_are_refused(
    folder: Path, tmp_path: Path, header: Any, body: bytes, words: str
) -> None:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(UserError, match=words):
        resolve(str(folder), cache=tmp_path / "cache")


def test_an_index_of_another_version_and_files_under_other_names_are_refused(folder: Path, tmp_path: Path) -> None:
    one = folder / "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(one)
    with pytest.raises(UserError, match=r"no model\.safetensors and no .*index\.json"):
        resolve(str(folder), cache=tmp_path / "cache")
    index = {"weight_map": dict.fromkeys([*load_file(one), "model.layers.9.w"], one.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names 1 tensors that their files do not hold: model\.layers\.9\.w"):
        resolve(str(folder), cache=tmp_path / "cache")


def test_a_hundred_million_layers_are_refused_before_they_are_laid_out(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {"num_hidden_layers": 10**8}}))
    with pytest.raises(UserError, match=r"num_hidden_layers: 100,000,000, and its files hold 21 tensors"):
        resolve(str(folder), cache=tmp_path / "cache")


@pytest.mark.vllm
def test_vllm_is_given_no_model_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from schemas.config import RunConfig
    from stages.engines import vllm

    rewrite(folder, renamed("_orig_mod."))
    monkeypatch.setattr("vllm.LLM", lambda **options: pytest.fail("vLLM was asked"))
    config = RunConfig.model_validate(
        {
            "name": "t",
            "model": {"policy": "m"},
            "languages": {"seen": ["en"]},
            "pairs": {"sources": [{"path": "p.parquet"}]},
        }
    )
    with pytest.raises(UserError, match=r"_orig_mod"):
        vllm.load(ModelRef("mine", folder, ""), config, None)


def test_towers_of_a_wrapper_take_no_memory_and_text_is_read_as_before(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "gemma3"
    made = tiny_model(tiny_config("gemma3"))
    made.save_pretrained(target)
    whole = load_causal_lm(ModelRef("g", target, ""), torch.float32, CPU)
    text = load_text_model(ModelRef("g", target, ""), torch.float32, CPU)
    ids = torch.arange(5, 14)[None]
    assert torch.equal(text(input_ids=ids).logits, whole(input_ids=ids).logits)
    tower = sum(p.numel() for name, p in whole.named_parameters() if "vision" in name or "projector" in name)
    assert sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in text.parameters()) == tower > 0


@pytest.mark.parametrize(
    ("name", "auto", "words"),
    [
        ("bert", "AutoModelForMaskedLM", r"is an encoder, which does not continue texts \(BertForMaskedLM\)"),
        ("roberta", "AutoModelForMaskedLM", r"is an encoder, which does not continue texts \(RobertaForMaskedLM\)"),
        (
            "t5",
            "AutoModelForSeq2SeqLM",
            r"encoder-decoder \(sequence-to-sequence\) model \(T5ForConditionalGeneration\)",
        ),
        ("bart", "AutoModelForSeq2SeqLM", r"encoder-decoder .*BartForConditionalGeneration"),
        ("llama", "AutoModelForSequenceClassification", r"its head is for SequenceClassification"),
    ],
)
def test_models_that_do_not_continue_texts_are_refused_by_what_they_are(
    tmp_path: Path, tiny_tokenizer: Any, name: str, auto: str, words: str
) -> None:
    config = tiny_config(name, vocab_size=1024)
    getattr(transformers, auto).from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    for load in (lambda model: skeleton(model), lambda model: load_causal_lm(model, torch.float32, CPU)):
        with pytest.raises(UserError, match=words):
            load(ModelRef("mine", tmp_path, ""))


def test_a_configuration_of_a_wrong_type_is_a_clear_refusal(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "2"}))
    with pytest.raises(UserError, match="num_hidden_layers"):
        skeleton(ModelRef("mine", folder, ""))
