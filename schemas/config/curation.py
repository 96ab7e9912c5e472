"""Config of generation, judging, pairing, gradients, conflict and selection."""

from __future__ import annotations

from typing import Literal

from schemas.config.base import Section, execution, semantic
from schemas.config.model import Sampling
from schemas.config.sources import PairSource


class GenerateConfig(Section):
    """Generate stage."""

    candidates: int = semantic(4, "answers per prompt", ge=2)
    sampling: Sampling = semantic(Sampling(), "sampling parameters")
    shard_size: int = semantic(256, "prompts per shard: the unit of commit and of repeated work after a crash", ge=1)
    prefix_caching: bool = execution(True, "vllm: compute a shared prompt prefix once")


class JudgeConfig(Section):
    """Judge stage (METHODS.md section 1)."""

    method: Literal["expected_score", "additive"] = semantic("expected_score", "how an answer is scored, 0 to 5")
    votes: int = semantic(1, "additive: reasoned votes per answer", ge=1)
    min_mass: float = semantic(0.5, "expected_score: least probability on the score tokens", ge=0, le=1)
    rubric: str = semantic(
        "package:rubrics/{language}.yaml", "rubric files; a missing language falls back to en, said aloud"
    )
    sampling: Sampling = semantic(Sampling(temperature=0.7, max_tokens=256), "additive: sampling of the reasoning")
    shard_size: int = semantic(1024, "candidates per shard", ge=1)


class PairsConfig(Section):
    """Pairs stage: from judged candidates, or imported."""

    sources: list[PairSource] = semantic([], "an existing preference data set: generation and judging are skipped")
    min_margin: float = semantic(0.1, "best minus worst mean score; less is a tie", ge=0)
    length_control: bool = semantic(
        False, "subtract a fitted per-token cost so that chosen and rejected are equally long on average"
    )
    drop_truncated: bool = semantic(True, "answers cut by max_tokens leave first")
    on_empty_language: Literal["skip", "fail"] = semantic("skip", "a seen language without a single training pair")
    dev_fraction: float = semantic(0.05, "imported pairs: share of groups for choices", ge=0, lt=1)
    test_fraction: float = semantic(0.1, "imported pairs: share of groups for figures", ge=0, lt=1)


class SketchConfig(Section):
    """Gradient compression (METHODS.md section 3)."""

    dim: int = semantic(8192, "numbers per pair, over all layers", ge=1)
    seed: int = semantic(0, "seed of the projections")
    include: list[str] = semantic(["*"], "glob patterns of layer names to sketch")
    exclude: list[str] = semantic([], "glob patterns of layer names to leave out")


class LossConfig(Section):
    """The preference loss, shared by gradients, conflict and train."""

    beta: float = semantic(0.1, "DPO temperature", gt=0)
    alpha: float = semantic(0.0, "length penalty: loss = -log sigmoid(beta*Delta + alpha*(|chosen|-|rejected|))", ge=0)


class GradientsConfig(Section):
    """Gradients stage."""

    sketch: SketchConfig = semantic(SketchConfig(), "compression")
    shard_size: int = semantic(512, "pairs per shard", ge=1)
    token_budget: int = execution(8192, "padded tokens per batch; halved when memory runs out", ge=64)


class ConflictConfig(Section):
    """Conflict stage (METHODS.md section 4)."""

    weighting: Literal["loss", "none"] = semantic("loss", "g = c*d (the DPO gradient) or d")
    direction: Literal["mean", "ema"] = semantic("mean", "how pairs make a language direction")
    ema_gamma: float = semantic(0.9, "ema: decay per minibatch; order-biased", gt=0, lt=1)
    ema_batch: int = semantic(32, "ema: pairs per minibatch", ge=1)
    surgery: str = semantic("pcgrad", "weights from the Gram matrix: pcgrad, mean, unit_mean, ...")
    orders: int = semantic(64, "random orders PCGrad is averaged over", ge=1)
    scope: Literal["model", "layer"] = semantic("model", "surgery on the whole model or per layer group")
    metric: Literal["raw", "unit", "coordinate", "layer"] = semantic(
        "unit",
        "raw: sketches as they are; unit: to unit norm; coordinate, layer: then balanced by RMS over pairs",
    )
    metric_power: float = semantic(0.5, "coordinate: exponent of the RMS that is divided by", ge=0)
    score: Literal["all", "others"] = semantic(
        "all", "score against the merged direction, or the other languages' only"
    )
    leave_out: Literal["pair", "group"] = semantic(
        "group", "what leaves the directions with a pair: itself, or its translation group and shared answers"
    )


class SelectConfig(Section):
    """Select stage."""

    keep: float = semantic(0.5, "share kept per language", gt=0, le=1)
    by: Literal[
        "conflict",
        "random",
        "margin",
        "implicit",
        "logp_margin",
        "mean_direction",
        "own_language",
        "other_languages",
        "mid_band",
        "shortest",
        "longest",
        "bottom",
    ] = semantic("conflict", "what pairs are ranked by: the conflict score, or a baseline (docs/methods.md)")
    quota: Literal["language", "global"] = semantic("language", "keep the share per language, or overall")
