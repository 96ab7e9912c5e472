"""The sketch is P_o G P_i^T of the gradient autograd gives, whatever the architecture, batch or dtype."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.gradients.batching import TokenBudget
from stages.gradients.layers import select_layers
from stages.gradients.projections import SketchLayout
from stages.gradients.sketcher import Sketcher
from tests.stages.gradients.oracles import layer_projections, project_gradients

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi", "gpt2", "cohere", "granite")


def autograd_gradients(model, pair, names, oracle_values, sides=(1.0, -1.0)) -> dict[str, torch.Tensor]:
    """G of d per layer from the model's own full logits: shares no code with the sketcher."""
    model.eval()
    weights = [model.get_submodule(name).weight for name in names]
    value = sides[0] * oracle_values(model, pair.prompt, pair.chosen).sum()
    value = value + sides[1] * oracle_values(model, pair.prompt, pair.rejected).sum()
    gradients = torch.autograd.grad(value, weights)
    transposed = [type(model.get_submodule(name)).__name__ == "Conv1D" for name in names]
    return {n: g.T if t else g for n, g, t in zip(names, gradients, transposed, strict=True)}


def expected_sketch(layout, seed, gradients) -> torch.Tensor:
    parts = []
    for slot in layout.layers:
        out_PO, in_PI = layer_projections(seed, slot)
        gradient = gradients[slot.name]
        parts.append((out_PO.to(gradient) @ gradient @ in_PI.to(gradient).T).flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sketch_equals_projected_autograd_gradient(
    architecture, make_model, make_pairs, oracle_values, fresh_seed
) -> None:
    model = make_model(architecture)
    coverage = select_layers(model)
    layout = SketchLayout.plan(coverage.layers, dim=len(coverage.layers) * 25)
    pairs = make_pairs(3, seed=fresh_seed)
    with Sketcher(model, layout, seed=5, both_sides=True) as sketcher:
        got = sketcher.sketch(pairs)
    names = [slot.name for slot in layout.layers]
    for n, pair in enumerate(pairs):
        for sketch_D, sides in (
            (got.sketch_ND[n], (1.0, -1.0)),
            (got.chosen_ND[n], (1.0, 0.0)),
            (got.rejected_ND[n], (0.0, 1.0)),
        ):
            want = expected_sketch(layout, 5, autograd_gradients(model, pair, names, oracle_values, sides))
            assert torch.linalg.vector_norm(sketch_D - want) <= 1e-5 * torch.linalg.vector_norm(want)
        for value, completion in ((got.logp_chosen_N[n], pair.chosen), (got.logp_rejected_N[n], pair.rejected)):
            want_value = oracle_values(model, pair.prompt, completion).sum().detach()
            torch.testing.assert_close(value, want_value, rtol=1e-5, atol=1e-5)


def test_sketch_is_exact_in_float64(make_model, make_pairs, oracle_values) -> None:
    model = make_model("llama", dtype=torch.float64)
    layout = SketchLayout.plan(select_layers(model).layers, dim=400)
    (pair,) = make_pairs(1, seed=4)
    with Sketcher(model, layout, seed=1) as sketcher:
        got = sketcher.sketch([pair]).sketch_ND[0]
    want = expected_sketch(layout, 1, autograd_gradients(model, pair, [s.name for s in layout.layers], oracle_values))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_pair_alone_and_in_a_padded_batch_agree(architecture, make_model, make_pairs) -> None:
    model = make_model(architecture)
    layout = SketchLayout.plan(select_layers(model).layers, dim=1000)
    pairs = make_pairs(6, seed=11)
    with Sketcher(model, layout, seed=0) as sketcher:
        alone = torch.cat([sketcher.sketch([pair]).sketch_ND for pair in pairs])
        together = sketcher.run(pairs, TokenBudget(10_000)).sketch_ND
        small = sketcher.run(pairs, TokenBudget(60)).sketch_ND
    for other in (together, small):
        assert torch.cosine_similarity(alone, other, dim=1).min() >= 0.9999
        torch.testing.assert_close(alone.norm(dim=1), other.norm(dim=1), rtol=1e-4, atol=0)


def test_bfloat16_sketch_is_close_to_float32(make_model, make_pairs) -> None:
    """Sums are float32; what is left is bfloat16's own error in the model (cosine >= 0.99 on these random weights)."""
    layout = SketchLayout.plan(select_layers(make_model("llama")).layers, dim=1000)
    pairs = make_pairs(4, seed=2)
    sketches = []
    for dtype in (torch.float32, torch.bfloat16):
        with Sketcher(make_model("llama", seed=3, dtype=dtype), layout, seed=0) as sketcher:
            sketches.append(sketcher.sketch(pairs).sketch_ND)
    assert sketches[1].dtype == torch.float32
    assert torch.cosine_similarity(*sketches, dim=1).min() >= 0.99


def test_swapping_chosen_and_rejected_flips_the_sign(make_model, make_pairs) -> None:
    model = make_model("qwen2")
    layout = SketchLayout.plan(select_layers(model).layers, dim=500)
    pair = make_pairs(1, seed=8)[0]
    swapped = type(pair)(pair.prompt, pair.rejected, pair.chosen)
    with Sketcher(model, layout, seed=0) as sketcher:
        a, b = sketcher.sketch([pair]).sketch_ND, sketcher.sketch([swapped]).sketch_ND
    torch.testing.assert_close(a, -b, rtol=1e-4, atol=1e-5)


class _Shapes(TorchDispatchMode):
    """Records the shape of every tensor any operation returns, and the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.kinds: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = out is not None and getattr(func, "is_view", False)
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor) and not is_view:
                self.shapes.append(tuple(value.shape))
                self.kinds.append(str(func))
        return out


@pytest.mark.parametrize("shared", [False, True])
def test_no_weight_gradient_per_row_matrix_prompt_logit_or_full_logits_is_ever_allocated(
    shared, make_model, make_pairs
) -> None:
    model = make_model("mistral")  # untied, so that nothing else has a weight's shape
    layout = SketchLayout.plan(select_layers(model).layers, dim=126)  # P = 3
    widths = (16, 32, 48)  # rows of so many tokens have activations of a weight's shape
    draws = (make_pairs(5, seed=seed) for seed in itertools.count())
    pairs = next(d for d in draws if max(p.joined if shared else p.longest for p in d) not in widths)
    with Sketcher(model, layout, seed=0, chunk_elements=4 * 100) as sketcher:
        sketcher.sketch(pairs, shared)  # projections are drawn
        with _Shapes() as record:
            sketcher.sketch(pairs, shared)
    weights = {(s.out_width, s.in_width) for s in layout.layers} | {(s.in_width, s.out_width) for s in layout.layers}
    assert record.shapes
    assert not [shape for shape in record.shapes if shape[-2:] in weights]
    logits = [shape for shape in record.shapes if shape and shape[-1] == 100]
    assert logits
    assert max(torch.Size(shape).numel() for shape in logits) <= 4 * 100
    completions = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    heads = [
        shape for shape, kind in zip(record.shapes, record.kinds, strict=True) if "mm" in kind and shape[-1] == 100
    ]
    assert sum(torch.Size(shape[:-1]).numel() for shape in heads) == completions, "one row of logits a completion token"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_of_layers_are_not_kept(make_model, make_pairs) -> None:
    """After the forward pass the only thing the hook holds of a layer's input is its projection [B, T, P]."""
    model = make_model("llama")
    layout = SketchLayout.plan(select_layers(model, include=["*.down_proj"]).layers, dim=18)
    inputs: list[weakref.ref] = []
    alive: list[int] = []
    layer = model.model.layers[0].mlp.down_proj
    handles = [
        layer.register_forward_pre_hook(lambda m, args: inputs.append(weakref.ref(args[0]))),
        model.model.norm.register_forward_hook(lambda m, a, o: alive.append(sum(r() is not None for r in inputs))),
    ]
    with Sketcher(model, layout, seed=0) as sketcher:
        sketcher.sketch(make_pairs(2))
    for handle in handles:
        handle.remove()
    assert alive == [0]


def test_model_is_left_as_it_was(make_model, make_pairs) -> None:
    model = make_model("gpt2")
    model.train()
    model.transformer.wpe.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    layout = SketchLayout.plan(select_layers(model).layers, dim=100)
    with pytest.raises(RuntimeError, match="stop"), Sketcher(model, layout, seed=0):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        raise RuntimeError("stop")
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks for m in model.modules())


def test_memory_failure_in_a_batch_changes_nothing(make_model, make_pairs, monkeypatch) -> None:
    model = make_model("llama")
    layout = SketchLayout.plan(select_layers(model).layers, dim=200)
    pairs = make_pairs(6, seed=3)
    with Sketcher(model, layout, seed=0) as sketcher:
        want = sketcher.run(pairs, TokenBudget(10_000))
        whole: Callable = sketcher._launch

        def fails_when_large(batch, shared):
            if len(batch) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(batch, shared)

        monkeypatch.setattr(sketcher, "_launch", fails_when_large)
        budget = TokenBudget(10_000)
        got = sketcher.run(pairs, budget)
    assert budget.backoffs >= 1
    torch.testing.assert_close(got.sketch_ND, want.sketch_ND, rtol=1e-4, atol=1e-5)
    assert got.chosen_ND is None


def test_wrong_layouts_and_float16_are_refused(make_model, make_pairs) -> None:
    layout = SketchLayout.plan(select_layers(make_model("llama")).layers, dim=100)
    with pytest.raises(ValueError, match="layout belongs to another model"), Sketcher(make_model("gpt2"), layout, 0):
        pass
    with pytest.raises(ValueError, match="float16"), Sketcher(make_model("llama", dtype=torch.float16), layout, 0):
        pass
    with pytest.raises(RuntimeError, match="enter the Sketcher"):
        Sketcher(make_model("llama"), layout, 0).sketch(make_pairs(1))


@pytest.mark.parametrize("method", ["one_sided", "exact"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi", "gpt2"])
def test_other_methods_equal_the_projected_autograd_gradient(
    architecture, method, make_model, make_pairs, oracle_values, fresh_seed
) -> None:
    model = make_model(architecture)
    layout = SketchLayout.plan(select_layers(model).layers, method=method, rank=5)
    pairs = make_pairs(2, seed=fresh_seed)
    with Sketcher(model, layout, seed=5) as sketcher:
        got = sketcher.sketch(pairs)
    for n, pair in enumerate(pairs):
        gradients = autograd_gradients(model, pair, [slot.name for slot in layout.layers], oracle_values)
        want = expected_sketch(layout, 5, gradients)
        assert torch.linalg.vector_norm(got.sketch_ND[n] - want) <= 1e-5 * torch.linalg.vector_norm(want)
        if method == "exact":
            flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
            assert torch.equal(want, flat)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_inner_products_of_exact_gradients_are_those_of_torch_func(
    architecture, make_model, make_pairs, fresh_seed
) -> None:
    """Per-pair gradients by torch.func on the whole model; two-sided sketches agree on average over 400 seeds."""
    model, pairs = make_model(architecture).eval(), make_pairs(3, seed=fresh_seed)
    layers = select_layers(model).layers
    names = [layer.name for layer in layers]
    weights = {f"{name}.weight": model.get_submodule(name).weight.detach() for name in names}

    def difference(given, pair):
        sums = []
        for completion in (pair.chosen, pair.rejected):
            ids = torch.tensor([pair.prompt + completion])
            logits = torch.func.functional_call(model, given, (ids,), {"use_cache": False}).logits[0].log_softmax(-1)
            at = torch.arange(len(completion)) + len(pair.prompt) - 1
            sums.append(logits[at, torch.tensor(completion)].sum())
        return sums[0] - sums[1]

    by_pair = [torch.func.grad(difference)(weights, pair) for pair in pairs]
    truth_NN = torch.stack([torch.stack([sum((a[k] * b[k]).sum() for k in a) for b in by_pair]) for a in by_pair])
    with Sketcher(model, SketchLayout.plan(layers, method="exact"), seed=0) as sketcher:
        exact_ND = sketcher.sketch(pairs).sketch_ND
    torch.testing.assert_close(exact_ND @ exact_ND.T, truth_NN, rtol=1e-4, atol=1e-4 * float(truth_NN.max()))

    layout = SketchLayout.plan(layers, dim=len(layers) * 36)
    is_conv = [type(model.get_submodule(name)).__name__ == "Conv1D" for name in names]
    gradients = [
        {n: g[f"{n}.weight"].T if t else g[f"{n}.weight"] for n, t in zip(names, is_conv, strict=True)} for g in by_pair
    ]
    draws = []
    for seed in range(400):
        sketch_ND = torch.stack([project_gradients(layout, seed, one.items()) for one in gradients])
        draws.append((sketch_ND @ sketch_ND.T).double())
    draws_RNN = torch.stack(draws)
    error_NN = draws_RNN.std(dim=0) / len(draws) ** 0.5
    assert ((draws_RNN.mean(dim=0) - truth_NN).abs() < 5 * error_NN).all()


def test_scales_act_before_the_projection(make_model, make_pairs, oracle_values) -> None:
    """Preconditioning inside the hooks equals preconditioning the materialised G, for every method."""
    model, (pair,) = make_model("qwen2"), make_pairs(1, seed=9)
    layers = select_layers(model).layers
    generator = torch.Generator().manual_seed(2)
    scales = {
        s.name: tuple(torch.rand(width, generator=generator) + 0.2 for width in (s.out_width, s.in_width))
        for s in layers
    }
    gradients = autograd_gradients(model, pair, [layer.name for layer in layers], oracle_values)
    scaled = {name: scales[name][0][:, None] * gradient * scales[name][1] for name, gradient in gradients.items()}
    for method in ("two_sided", "one_sided", "exact"):
        layout = SketchLayout.plan(layers, 400, method, 3)
        with Sketcher(model, layout, seed=4, scales=scales) as sketcher:
            got = sketcher.sketch([pair]).sketch_ND[0]
        want = expected_sketch(layout, 4, scaled)
        assert torch.linalg.vector_norm(got - want) <= 1e-5 * torch.linalg.vector_norm(want)
        again = project_gradients(layout, 4, gradients.items(), scales)
        assert torch.linalg.vector_norm(again - want) <= 1e-5 * torch.linalg.vector_norm(want)


def test_what_is_kept_of_a_batch_can_be_reduced(make_model, make_pairs) -> None:
    model, pairs = make_model("llama"), make_pairs(5, seed=2)
    layout = SketchLayout.plan(select_layers(model).layers, dim=300)
    sizes: list[int] = []

    def norms(indices, got):
        sizes.append(len(indices))
        return type(got)(got.sketch_ND.norm(dim=1, keepdim=True), got.logp_chosen_N, got.logp_rejected_N)

    with Sketcher(model, layout, seed=0) as sketcher:
        whole = sketcher.run(pairs, TokenBudget(60))
        got = sketcher.run(pairs, TokenBudget(60), reduce=norms)
    assert len(sizes) > 1 and sum(sizes) == 5
    torch.testing.assert_close(got.sketch_ND[:, 0], whole.sketch_ND.norm(dim=1))
