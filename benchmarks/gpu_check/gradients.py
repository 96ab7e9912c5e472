"""Sketches of gradients on the device: right against the CPU in float64, whatever the batch, prompts shared or not; and tokens a second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_check.report import Row, Sizes, against, right
from benchmarks.optimizer_step import seconds
from schemas.errors import first_line

_PART = "gradients"


def _model(hidden: int, layers: int, vocabulary: int, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = max(4, hidden // 64)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device, dtype).eval()


def _sketches(model: Any, layout: Any, pairs: Any, shared: bool = False, tokens: int = 1 << 14) -> torch.Tensor:
    from stages.gradients.batching import TokenBudget
    from stages.gradients.sketcher import Sketcher

    with Sketcher(model, layout, seed=0, prefix_sharing=shared) as sketcher:
        if shared and not sketcher.sharing:
            raise RuntimeError(f"prompts are not shared: {sketcher.sharing_note}")
        return sketcher.run(pairs, TokenBudget(tokens)).sketch_ND.double().cpu()


def _away(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest distance of two rows over the norm of the second."""
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


def correct(sizes: Sizes) -> Iterator[Row]:
    """A small model on the device against the same weights in float64 on the CPU."""
    from benchmarks.gradients import make_pairs
    from stages.gradients.layers import select_layers
    from stages.gradients.projections import SketchLayout

    exact = _model(64, 2, 512, torch.float64, "cpu")
    layout = SketchLayout.plan(select_layers(exact).layers, 512)
    pairs = make_pairs(6, 40, 512, 0.5)
    oracle = _sketches(exact, layout, pairs)
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.15)):
        model = _model(64, 2, 512, dtype, sizes.device)
        plain = _sketches(model, layout, pairs)
        kind = str(dtype).removeprefix("torch.")
        yield right(_PART, f"sketches in {kind} against float64", _away(plain, oracle), most)
        yield right(
            _PART,
            f"shared prompts in {kind} against float64",
            _away(_sketches(model, layout, pairs, True), oracle),
            most,
        )
        alone = torch.cat([_sketches(model, layout, [pair]) for pair in pairs])
        yield right(_PART, f"pairs alone against in a batch, {kind}", _away(alone, plain), most)


def waits(sizes: Sizes) -> Iterator[Row]:
    """Whether the host waits for the device between the start of a batch and its results' copies."""
    from benchmarks.gradients import make_pairs
    from stages.gradients.layers import select_layers
    from stages.gradients.projections import SketchLayout
    from stages.gradients.sketcher import Sketcher

    model = _model(64, 2, 512, torch.bfloat16, sizes.device)
    layout, pairs = SketchLayout.plan(select_layers(model).layers, 512), make_pairs(6, 40, 512, 0.5)
    for shared in (False, True):
        what = f"a batch waits for the device, prompts {'shared' if shared else 'apart'}"
        if sizes.device == "cpu":
            yield Row(_PART, what, "", "no", "not run", "there is no GPU")
            continue
        with Sketcher(model, layout, seed=0, prefix_sharing=shared) as sketcher:
            sketcher.sketch(pairs, shared)
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                sketcher._launch(pairs, shared)
                yield Row(_PART, what, "no", "no", "met")
            except RuntimeError as error:
                yield Row(_PART, what, "yes", "no", "missed", first_line(error))
            finally:
                torch.cuda.set_sync_debug_mode(before)


def ceiling(sizes: Sizes) -> float:
    """Multiplications and additions a second of a large product in bfloat16."""
    n = sizes.matrix
    a = torch.randn(n, n, device=sizes.device).bfloat16()
    b = torch.randn(n, n, device=sizes.device).bfloat16()
    work = a @ b
    best = min(seconds(lambda: torch.mm(a, b, out=work), sizes.device) for _ in range(5))
    return 2 * n**3 / best


def speed(sizes: Sizes) -> Iterator[Row]:
    """Tokens a second of sketching and of a DPO backward on a model of about 1B, and what share of the matrix ceiling that is."""
    from benchmarks.gradients import dpo_backward, make_pairs, peak_bytes
    from stages.gradients.layers import select_layers
    from stages.gradients.projections import SketchLayout
    from stages.gradients.sketcher import Sketcher

    most = ceiling(sizes)
    yield Row(
        "speed",
        "matrix ceiling, bfloat16",
        f"{most / 1e12:.2f} TFLOP/s",
        "",
        "measured",
        f"{sizes.matrix} x {sizes.matrix}",
    )
    model = _model(sizes.model_hidden, sizes.model_layers, sizes.vocabulary, torch.bfloat16, sizes.device)
    coverage = select_layers(model)
    layout = SketchLayout.plan(coverage.layers)
    pairs = make_pairs(sizes.pairs, sizes.tokens, sizes.vocabulary, 0.5)
    linear = sum(shape.out_width * shape.in_width for shape in coverage.layers)
    size = f"{coverage.total_parameters / 1e9:.2f}B parameters, {sizes.pairs} pairs of 2 x {sizes.tokens} tokens, half of them prompt"
    times = {}
    for shared in (False, True):
        name = "sketches, shared prompts" if shared else "sketches"
        with Sketcher(model, layout, seed=0, prefix_sharing=shared) as sketcher:
            if shared and not sketcher.sharing:
                yield Row("speed", name, "", "", "not run", sketcher.sharing_note)
                continue
            given = pairs[: max(1, len(pairs) // 2)] if not shared else pairs
            sketcher.sketch(given, shared)
            best = min(seconds(lambda: sketcher.sketch(given, shared), sizes.device) for _ in range(sizes.repeats))  # noqa: B023
            peak = peak_bytes(lambda: sketcher.sketch(given, shared), sizes.device)  # noqa: B023
        passed = sum((len(p.prompt) if shared else 2 * len(p.prompt)) + len(p.chosen) + len(p.rejected) for p in given)
        said = sum(len(p.chosen) + len(p.rejected) for p in given)  # tokens whose logits are needed
        flops = 4 * (linear * passed + sizes.model_hidden * sizes.vocabulary * said)
        share = flops / best / most
        times[name] = best / len(given)
        note = f"{passed / best:,.0f} tokens/s, {len(given) / best:.1f} pairs/s, {peak / 2**30:.1f} GiB; {size}"
        yield Row(
            "speed",
            f"{name}: share of the matrix ceiling",
            f"{share:.0%}",
            ">= 50%",
            against(sizes, share >= 0.5),
            note,
        )
    half = pairs[: max(1, len(pairs) // 4)]
    dpo_backward(model, half, sizes.device)
    plain = min(
        seconds(lambda: dpo_backward(model, half, sizes.device), sizes.device) for _ in range(sizes.repeats)
    ) / len(half)
    for name, aim in (("sketches", 0.7), ("sketches, shared prompts", 0.53)):
        if name in times:
            ratio = times[name] / plain
            note = f"{plain * 1e3:.1f} ms a pair"
            yield Row(
                "speed",
                f"{name} over a DPO backward",
                f"{ratio:.2f} x",
                f"<= {aim:g} x",
                against(sizes, ratio <= aim),
                note,
            )
