"""The gradient of a LoRA adapter's own matrices, against autograd; adapters that cannot be sketched are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.errors import UserError
from stages.contract import ModelRef
from stages.gradients.batching import TokenBudget
from stages.gradients.layers import select_layers
from stages.gradients.preconditioner import Precondition, second_moments
from stages.gradients.projections import SketchLayout
from stages.gradients.sketcher import Sketcher
from stages.gradients.stage import Gradients
from stages.models.load import load_with_adapter
from tests.stages.gradients.one_sided_bench import config, files, table
from tests.stages.gradients.oracles import layer_projections
from tests.stages.stage_context import collect, context, shards

peft = pytest.importorskip("peft")
TARGETS = {"gpt2": ["c_attn", "c_fc"]}


def adapted(model, architecture, **options):
    """The model with a random adapter on it (B is not zero: both matrices have gradients)."""
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS.get(architecture, ["q_proj", "down_proj"]), **options
    )
    wrapped = peft.get_peft_model(model, settings)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return wrapped


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_sketch_of_an_adapter_is_its_projected_autograd_gradient(
    architecture, make_model, make_pairs, oracle_values
) -> None:
    model = adapted(make_model(architecture), architecture).get_base_model().eval()  # no dropout in the oracle
    coverage = select_layers(model, of="adapter")
    assert all("lora_A" in s.name or "lora_B" in s.name for s in coverage.layers)
    assert len(coverage.layers) == 2 * 2 * 2
    assert coverage.share == 1.0
    layout = SketchLayout.plan(coverage.layers, dim=16 * len(coverage.layers))
    pairs = make_pairs(3, seed=5)
    with Sketcher(model, layout, seed=2, prefix_sharing=True, of="adapter") as sketcher:
        assert sketcher.sharing, sketcher.sharing_note
        got = sketcher.run(pairs, TokenBudget(500))
        apart = sketcher.sketch(pairs)
    torch.testing.assert_close(got.sketch_ND, apart.sketch_ND, rtol=1e-3, atol=1e-4)
    weights = [model.get_submodule(slot.name).weight.requires_grad_(True) for slot in layout.layers]
    for n, pair in enumerate(pairs):
        value = oracle_values(model, pair.prompt, pair.chosen).sum()
        value = value - oracle_values(model, pair.prompt, pair.rejected).sum()
        parts = []
        for slot, gradient in zip(layout.layers, torch.autograd.grad(value, weights), strict=True):
            out_PO, in_PI = layer_projections(2, slot)
            parts.append((out_PO @ gradient @ in_PI.T).flatten())
        want = torch.cat(parts)
        assert torch.linalg.vector_norm(apart.sketch_ND[n] - want) <= 1e-5 * torch.linalg.vector_norm(want)


def test_an_adapter_can_be_preconditioned(make_model, make_pairs) -> None:
    model = adapted(make_model("llama"), "llama").get_base_model()
    layers = select_layers(model, of="adapter").layers
    factors, used = second_moments(model, layers, make_pairs(4), TokenBudget(200), 0, of="adapter")
    assert used == 4
    assert {name: tuple(len(side) for side in sides) for name, sides in factors.items()} == {
        layer.name: (layer.out_width, layer.in_width) for layer in layers
    }
    assert all(bool((side > 0).all()) for sides in factors.values() for side in sides)


def test_what_is_no_plain_adapter_is_refused(make_model) -> None:
    with pytest.raises(ValueError, match="no LoRA adapter"):
        select_layers(make_model("llama"), of="adapter")
    model = adapted(make_model("llama"), "llama", use_dora=True).get_base_model()
    with pytest.raises(ValueError, match="DoRA"):
        select_layers(model, of="adapter")


def test_matrices_that_are_no_linear_layers_are_reported(make_model) -> None:
    model = adapted(make_model("llama"), "llama", modules_to_save=["norm"]).get_base_model()
    coverage = select_layers(model, of="adapter")
    assert 0.8 < coverage.share < 1.0
    assert coverage.left_out
    assert all("modules_to_save" in name for name in coverage.left_out)
    assert "left out" in coverage.summary()


def test_an_adapter_is_loaded_on_its_base_unmerged(make_model, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model = make_model("llama")
    model.save_pretrained(base)
    wrapped = adapted(model, "llama")
    wrapped.save_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    want = wrapped.eval()(input_ids=ids).logits
    loaded = load_with_adapter(ModelRef("a", None, "x", (folder, base)), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(loaded(input_ids=ids).logits, want)
    assert select_layers(loaded, of="adapter").layers == select_layers(wrapped.get_base_model(), of="adapter").layers
    with pytest.raises(UserError, match="no LoRA adapter") as refused:
        load_with_adapter(ModelRef("m", base, "x"), torch.float32, torch.device("cpu"))
    assert "gradients.of" in (refused.value.where or "")


@pytest.mark.parametrize("precondition", ["none", "adam_factored"])
def test_the_gradients_of_an_adapter_with_their_error_and_preconditioned(
    tiny_model, tmp_path: Path, precondition: str
) -> None:
    """Through the stages with the defaults: the second seed and the second moments are of the adapter as well."""
    folder = tmp_path / "adapter"
    adapted(AutoModelForCausalLM.from_pretrained(tiny_model), "llama").save_pretrained(folder)
    policy = ModelRef("a", tiny_model, "x", (folder, tiny_model))
    plain = config(sketch={"method": "two_sided", "dim": 64, "error_pairs": 3, "precondition": precondition})
    config_ = plain.model_copy(update={"gradients": plain.gradients.model_copy(update={"of": "adapter"})})
    pairs, inputs = table(6, 3), {}
    models = {"policy": policy, "reference": policy}
    if precondition != "none":
        rows, _ = collect(Precondition(), context(tmp_path, config_, models, pairs=pairs))
        assert all("lora_" in name for name in rows["preconditioner"]["layer"].to_pylist())
        inputs["preconditioner"] = files(tmp_path, "preconditioner", [rows["preconditioner"]])
    (part,) = Gradients().run(context(tmp_path, config_, models, pairs=pairs, **inputs), shards(pairs, 6))
    assert part.tables["gradients"].num_rows == 5
    assert part.stats["sketch_cosine_error_pairs"] == 3
