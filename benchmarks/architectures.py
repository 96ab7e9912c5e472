"""Sketches against autograd on a tiny random model of every architecture: the table of docs/models.md.

    python -m benchmarks.architectures                      all, as a Markdown table
    python -m benchmarks.architectures llama qwen3_moe      some

Per architecture: what a sketch covers by default, whether prompts are shared, and the relative error of the sketch of a pair
against autograd's gradient of the model's own logits, projected; the same with routed experts; whether it can be trained: TRL's forward in
training mode gives the model's own log-probabilities. Or the words of the refusal.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass, field

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl.trainer.utils import add_fused_lm_head

from benchmarks.tiny_models import model_types, skeleton, tiny_config, tiny_model
from schemas.errors import UserError, first_line
from stages.gradients.batching import TokenBudget
from stages.gradients.layers import Coverage, linear_layers, select_layers, stacked_layers
from stages.gradients.logprobs import check_head
from stages.gradients.projections import SketchLayout, apply_side, side_maps
from stages.gradients.rows import Pair
from stages.gradients.sketcher import Sketcher, Unsketchable
from stages.models.text_model import is_wrapper
from stages.train.forward import check_forward, make_plain
from stages.train.model import Precision
from stages.train.scoring import Scorer

SEED, DIM = 3, 2000
PAIRS = (
    Pair((11, 5, 23, 8, 17, 6), (9, 31, 7, 12, 19, 14, 10), (21, 13, 27, 18, 15)),
    Pair((33, 45, 3), (61, 30), (72, 88, 41, 5, 4, 19)),
)
FINE = 1e-3
"""Relative error in float32: what wrong rows, masks or projections exceed by far."""

_ANYTHING = (ImportError, LookupError, RuntimeError, ValueError, AttributeError, TypeError, StrictDataclassError)


@dataclass
class Outcome:
    """Of one architecture. refusal: empty when it can be sketched; error: largest of the pairs', prompts apart and shared;
    experts: the same with routed experts, where there are any and they can be; untrained: why training it is refused, or empty."""

    name: str
    kind: str = ""
    refusal: str = ""
    share: float = 0.0
    routed: float = 0.0
    sharing: bool = False
    error: float = float("nan")
    experts: float | None = None
    untrained: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        """Refused in words, or right."""
        return bool(self.refusal) or max(self.error, self.experts or 0.0) <= FINE


def gradient(model: PreTrainedModel, pair: Pair, coverage: Coverage, layout: SketchLayout) -> Tensor:
    """The oracle: autograd's gradient of s(chosen) - s(rejected) by the model's own logits, one unpadded row a side, projected."""
    modules, stacks = linear_layers(model), stacked_layers(model)
    weights = [stacks[s.name].weight if s.name in stacks else modules[s.name][0].weight for s in coverage.layers]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(any(parameter is weight for weight in weights))
    sides = []
    for row in pair.rows:
        ids = torch.tensor([row.prompt + row.completion])
        logp_TV = model(input_ids=ids, use_cache=False, return_dict=True).logits[0].float().log_softmax(-1)
        first = len(row.prompt)
        sides.append(sum(logp_TV[first - 1 + k, token] for k, token in enumerate(row.completion)))
    found = torch.autograd.grad(sides[0] - sides[1], weights)  # type: ignore[operator]
    for parameter, wanted in flags:
        parameter.requires_grad_(wanted)
    parts = []
    for slot, g in zip(layout.layers, found, strict=True):
        if slot.name in stacks:
            g = (g.transpose(1, 2) if stacks[slot.name].module.is_transposed else g).reshape(-1, slot.in_width)
        elif isinstance(modules[slot.name][0], Conv1D):
            g = g.T
        out, in_ = (None if m is None else m.to(g) for m in side_maps(SEED, slot))
        parts.append(apply_side(apply_side(g, in_).T, out).T.reshape(-1))
    return torch.cat(parts)


def error_of(model: PreTrainedModel, coverage: Coverage, share: bool) -> tuple[float, bool]:
    """(largest relative error of the pairs, computed in one batch; whether prompts are shared)."""
    layout = SketchLayout.plan(coverage.layers, DIM)
    wanted = [gradient(model, pair, coverage, layout) for pair in PAIRS]
    with Sketcher(model, layout, SEED, prefix_sharing=share) as sketcher:
        got = [sketcher.sketch(PAIRS)]
        if sketcher.sharing:
            got.append(sketcher.sketch(PAIRS, shared=True))
    worst = max(float((one.sketch_ND[n] - want).norm() / want.norm()) for one in got for n, want in enumerate(wanted))
    return worst, sketcher.sharing


def refusal_to_train(model: PreTrainedModel) -> str:
    """What the train stage says of it; empty when it trains it. The model is used up."""
    numbers = Precision(torch.device("cpu"), torch.float32, torch.float32)
    scorer = Scorer(numbers, TokenBudget(1000), lambda rows, unit: lambda done: None)
    before = scorer.token_logps(model, PAIRS[0].rows)
    make_plain(model)
    add_fused_lm_head(model)
    try:
        check_forward(before, model, PAIRS[0].rows, scorer, "train")
    except UserError as error:
        return error.what.partition(": its losses")[0]
    return ""


def outcome(name: str) -> Outcome:
    """Try one architecture."""
    try:
        config = tiny_config(name)
        model = tiny_model(config)
    except _ANYTHING as error:  # a package that is missing, a configuration that cannot be small
        return Outcome(name, refusal=f"not tried, no tiny model: {type(error).__name__}: {first_line(error)}")
    found = Outcome(name, type(model).__name__)
    try:
        check_head(model)
        coverage = select_layers(model)
        found.share, found.routed = coverage.share, coverage.routed / coverage.total_parameters
        found.error, found.sharing = error_of(model, coverage, share=True)
        found.notes += sorted(set(coverage.unsketchable.values()))
        if is_wrapper(model):
            found.notes.append("text model of a wrapper")
    except (ValueError, Unsketchable) as error:
        found.refusal = first_line(error)
        return found
    try:
        if select_layers(skeleton(config)).layers != coverage.layers:
            found.notes.append("without weights other layers are seen")
    except ValueError as error:
        found.notes.append(f"without weights: {first_line(error)}")
    if coverage.routed:
        try:
            found.experts, _ = error_of(model, select_layers(model, ["*.experts.*"]), share=found.sharing)
        except ValueError as error:
            found.notes.append(first_line(error))
    found.untrained = refusal_to_train(model)
    return found


def table(outcomes: list[Outcome]) -> str:
    """The Markdown table."""
    lines = [
        "| model type | class | sketched | routed experts | shared prompts | error | error with experts | trained | said |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | --- | --- |",
    ]
    for one in outcomes:
        said = one.refusal or "; ".join([*one.notes, *([one.untrained] if one.untrained else [])])
        figures = [f"{one.share:.0%}", f"{one.routed:.0%}" if one.routed else "", "yes" if one.sharing else "no"]
        figures += [f"{one.error:.0e}", "" if one.experts is None else f"{one.experts:.0e}"]
        figures.append("no" if one.untrained else "yes")
        figures = [""] * 6 if one.refusal else figures
        lines.append(f"| `{one.name}` | {one.kind} | {' | '.join(figures)} | {said.replace('|', '/')} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names or model_types()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes = [outcome(name) for name in names]
    sys.stdout.write(table(outcomes) + "\n")
    wrong = [one.name for one in outcomes if not one.fine]
    sys.stderr.write(
        f"{len(outcomes)} tried, {sum(not o.refusal for o in outcomes)} sketched, "
        f"{sum(not o.refusal and not o.untrained for o in outcomes)} of them trained; wrong: {wrong}\n"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
