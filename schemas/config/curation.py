"""Config of generation, judging, pairing, gradients, conflict and selection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from schemas.config.base import Section, execution, other_than, semantic
from schemas.config.judging import GENERATED
from schemas.config.model import Sampling
from schemas.config.sources import PairSource


class GenerateConfig(Section):
    """Generate stage."""

    candidates: int = semantic(4, "answers per prompt", used_when=GENERATED, ge=2, le=4096)
    sampling: Sampling = semantic(Sampling(), "sampling parameters", used_when=GENERATED)
    shard_size: int = semantic(
        256, "prompts per shard: the unit of commit and of repeated work after a crash", used_when=GENERATED, ge=1
    )
    prefix_caching: bool = execution(
        True, "vllm: compute a shared prompt prefix once", used_when={"engine.kind": "vllm"}
    )


class PairsConfig(Section):
    """Pairs stage: from judged candidates, or imported."""

    sources: list[PairSource] = semantic([], "an existing preference data set: generation and judging are skipped")
    min_margin: float = semantic(
        0.1, "best minus worst mean score, imported pairs: chosen minus rejected score; less is a tie", ge=0
    )
    margin_in: Literal["score", "sd"] = semantic(
        "score",
        "what min_margin counts: points of the judge's scale, or standard deviations of a language's scores",
        used_when=GENERATED,
    )
    strategy: Literal["best_worst", "best_random", "best_mean", "sigma", "all"] = semantic(
        "best_worst",
        "which answers of a prompt make a pair: best and worst; best and any worse one; best and the one closest to the mean; those closest to mean + and - sigmas sd; or"
        " all pairs with min_margin",
        used_when=GENERATED,
    )
    sigmas: float = semantic(
        2.0,
        "sigma: standard deviations of the prompt's scores from their mean",
        used_when={".strategy": "sigma"} | GENERATED,
        gt=0,
    )
    cap: int = semantic(
        4, "all: most pairs of a prompt, the widest first", used_when={".strategy": "all"} | GENERATED, ge=1
    )
    length_control: bool = semantic(
        False,
        "subtract a fitted per-token cost so that chosen and rejected are equally long on average",
        used_when={".strategy": "best_worst"} | GENERATED,
    )
    max_repetition: float = semantic(
        1.0,
        "drop answers in which more than this share of 16-character substrings are repeats; 1: off",
        used_when=GENERATED,
        gt=0,
        le=1,
    )
    drop_refusals: bool = semantic(
        False,
        "drop answers with a phrase of refusal in their first two sentences (a declared list of phrases per language, docs/judges.md), and"
        " imported pairs with such an answer",
    )
    drop_truncated: bool = semantic(True, "drop answers that max_tokens cut", used_when=GENERATED)
    on_empty_language: Literal["skip", "fail"] = semantic(
        "fail", "a seen language without a single training prompt or pair: stop, or go on without it"
    )
    dev_fraction: float = semantic(
        0.05, "imported pairs: share of groups for choices", used_when={"pairs.sources": other_than([])}, ge=0, lt=1
    )
    test_fraction: float = semantic(
        0.1, "imported pairs: share of groups for figures", used_when={"pairs.sources": other_than([])}, ge=0, lt=1
    )

    @model_validator(mode="after")
    def _room_to_train(self) -> PairsConfig:
        if self.dev_fraction + self.test_fraction >= 1:
            raise ValueError("pairs.dev_fraction + pairs.test_fraction must leave something to train on")
        return self


class SketchConfig(Section):
    """Gradient compression (docs/methods.md section 3)."""

    method: Literal["two_sided", "one_sided", "exact"] = semantic(
        "two_sided",
        "two_sided: both sides of a layer's gradient are projected; one_sided: the wider side only, in two passes over "
        "the pairs; exact: nothing is, for small models",
    )
    dim: int = semantic(
        8192,
        "two_sided: at most so many numbers per pair, over all layers",
        used_when={".method": "two_sided"},
        ge=1,
        le=1 << 24,
    )
    rank: int = semantic(
        16, "one_sided: width of the compressed side", used_when={".method": "one_sided"}, ge=1, le=1 << 16
    )
    seed: int = semantic(
        0, "seed of the projections", used_when={".method": ("two_sided", "one_sided")}, ge=0, lt=1 << 63
    )
    both_sides: bool = semantic(
        False, "also store the sketches of chosen and rejected alone, for losses that weight the sides apart"
    )
    precondition: Literal["none", "adam_factored"] = semantic(
        "none", "adam_factored: gradients in Adam's metric, its second moments factored, before projection"
    )
    precondition_pairs: int = semantic(
        64,
        "adam_factored: pairs the second moments are estimated on",
        used_when={".precondition": "adam_factored"},
        ge=2,
    )
    error_pairs: int = execution(
        8,
        "pairs sketched again with another seed, to say how far cosines are off; 0: not measured",
        used_when={".method": ("two_sided", "one_sided")},
        ge=0,
    )
    include: list[str] = semantic(
        ["*"], "glob patterns of layer names to sketch; routed experts only by patterns with `experts` in them"
    )
    exclude: list[str] = semantic([], "glob patterns of layer names to leave out")


class GradientsConfig(Section):
    """Gradients stage."""

    sketch: SketchConfig = semantic(SketchConfig(), "compression")
    of: Literal["weights", "adapter"] = semantic(
        "weights", "gradient of the weights (an adapter is merged first), or of the policy's LoRA adapter alone"
    )
    shard_size: int = semantic(512, "pairs per shard", ge=1)
    aggregate_size: int = semantic(
        2048,
        "one_sided: pairs per shard of the first pass; each stores one sum per language",
        used_when={".sketch.method": "one_sided"},
        ge=1,
    )
    relevance: bool = semantic(
        True,
        "measure how much more likely each answer is under its prompt than under one that says nothing: a forward pass more",
    )
    relevance_null: int = semantic(
        256,
        "pairs a language whose answers are also looked at under another prompt: what no answer looks like",
        used_when={".relevance": True},
        ge=2,
        le=1 << 20,
    )
    token_budget: int | None = execution(
        None,
        "padded tokens per batch, halved when memory runs out; unset: 8192, and 2048 on the CPU, where a batch of more takes a minute",
        ge=64,
    )
    prefix_sharing: Literal["auto", "off"] = execution(
        "auto", "compute the prompt of a pair once where the model allows it; off in reference mode"
    )


_GATE: dict[str, Any] = {"gradients.relevance": True, ".sides": other_than("none")}


class RelevanceConfig(Section):
    """Pairs whose answer is no answer to their prompt leave before the directions are made (docs/methods.md section 4)."""

    sides: Literal["chosen", "rejected", "both", "none"] = semantic(
        "chosen",
        "the answers that must answer the prompt; none: no pair is dropped",
        used_when={"gradients.relevance": True},
    )
    off_topic_cost: float = semantic(
        3.0,
        "dropping pays where an off-topic pair that passes costs as much as this many good ones that are dropped; 1000: all up to the quantile",
        used_when=_GATE,
        gt=0,
        le=1e6,
    )
    quantile: float = semantic(
        0.95,
        "what is more relevant than this share of answers under other prompts of its language always passes",
        used_when=_GATE,
        gt=0,
        lt=1,
    )


_LEFT_OUT: dict[str, Any] = {".target": "train"}
"""Trusted pairs are not among those that are scored: nothing leaves."""
WEIGHTED_SURGERY = ("pcgrad", "mean", "unit_mean", "cagrad", "gradvac", "upgrad", "dualproj")
"""Those that take weights of languages: the same as `stages.surgery.methods.WEIGHTED`."""


class ConflictConfig(Section):
    """Conflict stage (docs/methods.md section 4)."""

    target: Literal["train", "dev"] = semantic(
        "train",
        "train: directions from the training pairs, each left out when it is scored; dev: directions from the dev split, a set you trust "
        "(pairs.sources[].split: dev): all training pairs are scored against all of its languages",
    )

    @field_validator("target", mode="before")
    @classmethod
    def _names_a_split(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            raise ValueError(
                "it is a split: give trusted pairs in pairs.sources with `split: dev`, and `target: dev` here"
            )
        return value

    relevance: RelevanceConfig = semantic(RelevanceConfig(), "the gate before the directions")

    weighting: Literal["loss", "none"] = semantic("loss", "g = c*d (the gradient of the loss) or d")
    direction: Literal["mean", "ema"] = semantic("mean", "how pairs make a language direction")
    ema_gamma: float = semantic(
        0.9, "ema: decay per minibatch; order-biased", used_when={".direction": "ema"}, gt=0, lt=1
    )
    ema_batch: int = semantic(32, "ema: pairs per minibatch", used_when={".direction": "ema"}, ge=1)
    surgery: Literal[
        "pcgrad",
        "mean",
        "unit_mean",
        "mgda",
        "cagrad",
        "nash_mtl",
        "imtl_g",
        "gradvac",
        "upgrad",
        "aligned_mtl",
        "dualproj",
    ] = semantic("pcgrad", "weights from the Gram matrix; cagrad, upgrad and dualproj need a solver installed")
    orders: int = semantic(
        64, "pcgrad: random orders it is averaged over", used_when={".surgery": "pcgrad"}, ge=1, le=1 << 20
    )
    language_weights: dict[str, Annotated[float, Field(ge=0)]] = semantic(
        {},
        "weight of each language's loss in the surgery; 1 for those not named, only ratios count",
        used_when={".surgery": WEIGHTED_SURGERY},
    )
    refit: bool = semantic(
        False,
        "solve the surgery again for the directions without the pair that is scored; costs a solve a pair",
        used_when=_LEFT_OUT,
    )
    scope: Literal["model", "layer"] = semantic("model", "surgery on the whole model or per layer group")
    metric: Literal["raw", "unit", "coordinate", "layer"] = semantic(
        "layer",
        "raw: sketches as they are; unit: to unit norm; coordinate, layer: then balanced by RMS over pairs; default with one_sided: unit",
    )
    metric_power: float = semantic(
        0.5, "coordinate: exponent of the RMS that is divided by", used_when={".metric": "coordinate"}, ge=0, le=100
    )
    score: Literal["all", "others"] = semantic(
        "all",
        "score against the merged direction of all languages (the paper's), or of the other languages alone",
        used_when=_LEFT_OUT,
    )
    leave_out: Literal["pair", "answers", "group"] = semantic(
        "answers",
        "what is left out of the directions when a pair is scored: the pair, all that share an answer with it, or its translations too; default with one_sided: pair",
        used_when=_LEFT_OUT,
    )

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits of the pairs that get a gradient."""
        return ("train",) if self.target == "train" else ("train", self.target)

    @property
    def against(self) -> Literal["all", "others"]:
        """What pairs are scored against: `score`, or all that trusted pairs say."""
        return self.score if self.target == "train" else "all"


class DiversityConfig(Section):
    """A cap on pairs whose gradients point alike."""

    cells: int = semantic(0, "k-means cells of the gradient sketches; 0: no cap", ge=0, le=1 << 20)
    share: float = semantic(
        0.1,
        "largest share of what a language keeps (quota: global: of all) that one cell may give",
        used_when={".cells": other_than(0)},
        gt=0,
        le=1,
    )

    @model_validator(mode="after")
    def _possible(self) -> DiversityConfig:
        if self.cells and self.cells * self.share < 1:
            raise ValueError(
                f"{self.cells} cells of at most {self.share:g} each cannot fill the selection: cells * share is below 1"
            )
        return self


BY_IMPLICIT_REWARDS = ("implicit", "smallest_gap", "lossdiff_irm", "fused_margin")
"""Values of `select.by` that mean nothing where the policy is its own reference."""


class SelectConfig(Section):
    """Select stage."""

    keep: float = semantic(0.5, "share kept per language", gt=0, le=1)
    by: Literal[
        "conflict",
        "random",
        "margin",
        "implicit",
        "smallest_gap",
        "medium_influence",
        "lossdiff_irm",
        "fused_margin",
        "logp_margin",
        "mean_direction",
        "own_language",
        "other_languages",
        "mid_band",
        "shortest",
        "longest",
        "bottom",
    ] = semantic("conflict", "what pairs are ranked by: the conflict score, or a baseline (docs/methods.md)")
    seed: int | None = semantic(
        None, "random: seed of the draw; none: the run's", used_when={".by": "random"}, ge=0, lt=1 << 63
    )
    quota: Literal["language", "global"] = semantic("language", "keep the share per language, or overall")
    diversity: DiversityConfig = semantic(DiversityConfig(), "cap on pairs whose gradients point alike")
