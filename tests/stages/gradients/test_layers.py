"""Linear layers of the backbone are taken, everything else is accounted for, what cannot work is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.tiny_models import skeleton, tiny_config
from stages.gradients.layers import select_layers


@pytest.mark.parametrize(("architecture", "per_block"), [("llama", 7), ("gpt2", 4), ("phi", 6), ("gemma2", 7)])
def test_backbone_linear_layers_are_taken_and_the_rest_reported(architecture, per_block, make_model) -> None:
    model = make_model(architecture)
    coverage = select_layers(model)
    assert len(coverage.layers) == 2 * per_block
    distinct = {id(p): p for p in model.parameters()}
    assert coverage.total_parameters == sum(p.numel() for p in distinct.values())
    assert coverage.covered_parameters + sum(coverage.left_out.values()) == coverage.total_parameters
    assert not any("embed" in s.name or "lm_head" in s.name or "norm" in s.name for s in coverage.layers)
    assert any("embed" in name or "wte" in name for name in coverage.left_out)
    assert f"{coverage.share:.1%}" in coverage.summary()


def test_conv1d_shapes_are_out_by_in(make_model) -> None:
    shapes = {s.name: (s.out_width, s.in_width) for s in select_layers(make_model("gpt2")).layers}
    assert shapes["transformer.h.0.mlp.c_fc"] == (128, 32)
    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32)


def test_patterns(make_model) -> None:
    model = make_model("llama")
    names = [s.name for s in select_layers(model, include=["*.mlp.*"], exclude=["*.1.*"]).layers]
    assert names == [f"model.layers.0.mlp.{k}_proj" for k in ("gate", "up", "down")]
    with pytest.raises(ValueError, match="matches none"):
        select_layers(model, include=["*.attention.*"])
    with pytest.raises(ValueError, match="nothing can be sketched"):
        select_layers(model, exclude=["*"])


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "qwen2_moe"]
)
def test_routed_experts_are_left_out_by_default_and_said(family) -> None:
    model = skeleton(tiny_config(family))
    coverage = select_layers(model)
    assert not any(".experts." in layer.name for layer in coverage.layers)
    assert any("q_proj" in layer.name or "kv_b_proj" in layer.name for layer in coverage.layers)
    held = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert coverage.routed == held > 0
    assert f"routed experts hold {held / coverage.total_parameters:.1%}" in coverage.summary()


def test_only_patterns_that_say_experts_take_them() -> None:
    model = skeleton(tiny_config("qwen3_moe"))
    assert select_layers(model, ["*", "*.layers.*"]).layers == select_layers(model).layers
    chosen = select_layers(model, ["*", "*.experts.*"], exclude=["*.1.*"])
    experts = [layer for layer in chosen.layers if ".experts." in layer.name]
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    assert [layer.name for layer in experts] == [f"model.layers.0.mlp.experts.{k}_proj" for k in ("gate_up", "down")]
    assert (experts[0].out_width, experts[0].in_width) == (weight.shape[0] * weight.shape[1], weight.shape[2])


def test_experts_whose_rows_are_lost_are_refused_by_name_when_asked_for() -> None:
    model = skeleton(tiny_config("llama4_text"))
    assert select_layers(model).layers
    with pytest.raises(ValueError, match=r"'\*\.experts\.\*'.*feed_forward\.experts\.gate_up_proj belongs to routed"):
        select_layers(model, ["*", "*.experts.*"])


def test_shared_experts_are_ordinary_layers() -> None:
    names = [layer.name for layer in select_layers(skeleton(tiny_config("deepseek_v3"))).layers]
    assert "model.layers.1.mlp.shared_experts.up_proj" in names


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen2_5_vl", "llava"])
def test_of_a_wrapper_only_the_text_model_counts(name) -> None:
    model = skeleton(tiny_config(name))
    coverage = select_layers(model)
    text = {**dict(model.get_decoder().named_parameters()), "head": model.get_output_embeddings().weight}
    assert coverage.total_parameters == sum({id(p): p.numel() for p in text.values()}.values())
    assert not any("vision" in name or "projector" in name for name in coverage.left_out)
    assert all(layer.name.startswith("model.language_model.") for layer in coverage.layers)


def test_layers_without_a_call_or_a_gradient_are_left_out_with_the_reason() -> None:
    mamba = select_layers(skeleton(tiny_config("mamba")))
    assert set(mamba.unsketchable.values()) == {"has a weight that is also used outside of its calls"} or all(
        name.endswith("dt_proj") for name in mamba.unsketchable
    )
    assert any(name.endswith("dt_proj") for name in mamba.unsketchable)
    indexer = select_layers(skeleton(tiny_config("glm_moe_dsa"))).unsketchable
    assert {why for name, why in indexer.items() if "indexer" in name} == {"gets no gradient"}
    with pytest.raises(ValueError, match=r"'\*\.dt_proj' matches only what cannot be sketched: .*dt_proj"):
        select_layers(skeleton(tiny_config("mamba")), ["*.dt_proj"])
    assert select_layers(skeleton(tiny_config("mamba")), exclude=["*.dt_proj"]).layers == mamba.layers


def test_a_weight_used_besides_its_layer_is_left_out(make_model) -> None:
    model = make_model("llama")
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + x @ mlp.up_proj.weight.T @ mlp.down_proj.weight.T
    found = select_layers(model).unsketchable
    assert set(found) == {f"model.layers.0.mlp.{name}_proj" for name in ("up", "down")}
    assert set(found.values()) == {"has a weight that is also used outside of its calls"}


def test_a_layer_with_the_embeddings_weight_is_left_out(make_model) -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.register_module("extra", torch.nn.Linear(32, 100, bias=False))
    model.model.layers[1].mlp.extra.weight = model.model.embed_tokens.weight
    assert select_layers(model).unsketchable == {
        "model.layers.1.mlp.extra": "has the weight of model.embed_tokens",
    }


def test_layers_that_share_one_weight_are_one_layer(make_model) -> None:
    model = make_model("llama")
    before = len(select_layers(model).layers)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    coverage = select_layers(model)
    assert len(coverage.layers) == before - 1
    assert coverage.covered_parameters == sum(layer.out_width * layer.in_width for layer in coverage.layers)


def test_packed_rows_are_seen_without_weights(make_model) -> None:
    """A layer that is given some tokens only: no look at the module tells."""
    model = make_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: (
        torch.nn.functional.pad(mlp.down_proj(mlp.up_proj(x[:, ::2].flatten(0, 1)[:-1])), (0, 0, 0, 1)).new_zeros(())
        + x
        + 0 * mlp.gate_proj(x).sum()
    )
    found = select_layers(model).unsketchable
    assert "rows cannot be told apart" in found["model.layers.0.mlp.up_proj"]


def test_adapters_are_refused(make_model) -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.lora_A = nn.ModuleDict()
    with pytest.raises(ValueError, match="merge"):
        select_layers(model)


def test_peft_models_are_refused(make_model) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PEFT adapter"):
        select_layers(wrapped)


def test_a_model_without_linear_layers_is_refused(make_model) -> None:
    model = make_model("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="nothing can be sketched"):
        select_layers(model)
    assert isinstance(model, torch.nn.Module)
