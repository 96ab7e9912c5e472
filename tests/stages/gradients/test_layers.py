"""Linear layers of the backbone are taken, everything else is accounted for, what cannot work is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

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


_TINY = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "head_dim": 8}


@pytest.mark.parametrize(
    "config",
    [
        transformers.MixtralConfig(**_TINY, **_HEADS, num_local_experts=2),
        transformers.Qwen3MoeConfig(**_TINY, **_HEADS, **_EXPERTS, decoder_sparse_step=1, mlp_only_layers=[]),
        transformers.OlmoeConfig(**_TINY, **_HEADS, num_experts=2, num_experts_per_tok=1),
        transformers.Qwen2MoeConfig(**_TINY, **_HEADS, **_EXPERTS),
        transformers.DeepseekV3Config(
            **_TINY,
            **_HEADS,
            n_routed_experts=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
            num_experts_per_tok=1,
        ),
        transformers.GptOssConfig(**_TINY, **_HEADS, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
        transformers.GraniteMoeConfig(**_TINY, **_HEADS, num_local_experts=2, num_experts_per_tok=1),
        transformers.Llama4TextConfig(**_TINY, **_HEADS, head_dim=8, num_local_experts=2),
    ],
    ids=lambda config: config.model_type,
)
def test_mixtures_of_experts_are_refused(config) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"mixture of experts.*use a dense model"):
        select_layers(model)


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
