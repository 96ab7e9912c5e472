"""A merged adapter says what model and adapter said, or is refused with the difference."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import tiny_config, tiny_model
from schemas.errors import UserError
from stages.models.merging import merge_checked, with_adapter

IDS = torch.arange(3, 20)[None]


def adapted(name: str, targets: list[str] | str, **fields):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    return get_peft_model(tiny_model(tiny_config(name, **fields)), lora).eval()


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"], ["embed_tokens"], ["lm_head", "q_proj"]])
@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_model_is_the_adapted_one(targets, tied: bool, tmp_path) -> None:
    """With tied embeddings PEFT's merge alone is off by more than the logits themselves."""
    model = adapted("llama", targets, tie_word_embeddings=tied)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        merged = merge_checked(model, "mine")
        torch.testing.assert_close(merged(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-3)
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path, dtype=torch.float32).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-3)
    assert merged.config.tie_word_embeddings == (tied and targets == "all-linear")


def test_a_layer_shared_with_one_that_is_not_adapted_is_refused_with_the_difference() -> None:
    model = tiny_model(tiny_config("llama"))
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=r".*layers\.0\.mlp\.up_proj", lora_alpha=64, init_lora_weights=False)
    with pytest.raises(UserError, match=r"mine cannot be merged.*differ by [\d.]+%"):
        merge_checked(get_peft_model(model, lora).eval(), "mine")


def test_an_adapter_that_is_not_finite_is_refused() -> None:
    model = adapted("llama", ["q_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(float("nan"))
    with pytest.raises(UserError, match="mine cannot be merged"):
        merge_checked(model, "mine")


def test_an_adapter_whose_file_lacks_tensors_is_refused_with_their_names(tmp_path) -> None:
    adapted("llama", ["q_proj"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gone = next(name for name in tensors if "layers.1" in name and "lora_B" in name)
    save_file({name: value for name, value in tensors.items() if name != gone}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"mine lacks tensors.*layers\.1\.self_attn\.q_proj\.lora_B"):
        with_adapter(tiny_model(tiny_config("llama")), tmp_path, "mine")


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ({"hidden_size": 64}, r"does not fit its base model: size mismatch for .*q_proj\.lora_A"),
        ({"num_hidden_layers": 1}, r"2 of its tensors have no place in this one \(.*layers\.1\.self_attn.*lora_A"),
    ],
    ids=["width", "depth"],
)
def test_an_adapter_of_another_base_is_refused(base: dict, says: str, tmp_path) -> None:
    adapted("llama", ["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"mine .*{says}"):
        with_adapter(tiny_model(tiny_config("llama", **base)), tmp_path, "mine")


WHOLE = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"target_modules": ["q_proj"]}, "lora_B"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "lora_magnitude_vector"),
        (WHOLE, "lm_head.weight"),
    ],
    ids=["lora", "embeddings", "dora", "whole"],
)
def test_every_tensor_of_an_adapter_has_a_place_and_every_place_a_tensor(fields: dict, kind: str, tmp_path) -> None:
    lora = LoraConfig(r=2, init_lora_weights=False, **fields)
    get_peft_model(tiny_model(tiny_config("llama")), lora).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    with_adapter(tiny_model(tiny_config("llama")), tmp_path, "mine")
    name = next(name for name in tensors if kind in name)
    odd = name.replace("base_model.model.", "base_model.model.other.")
    save_file({**tensors, odd: tensors[name].clone()}, file)
    with pytest.raises(UserError, match=rf"1 of its tensors have no place in this one \(.*other.*{kind.split('.')[0]}"):
        with_adapter(tiny_model(tiny_config("llama")), tmp_path, "mine")
    save_file({other: value for other, value in tensors.items() if other != name}, file)
    with pytest.raises(UserError, match=f"lacks tensors that its config names: .*{kind.split('.')[0]}"):
        with_adapter(tiny_model(tiny_config("llama")), tmp_path, "mine")


def test_an_adapter_that_peft_cannot_merge_is_refused_in_its_words() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(UserError, match=r"mine cannot be merged: .*lora_bias"):
        merge_checked(get_peft_model(tiny_model(tiny_config("llama")), lora).eval(), "mine")
