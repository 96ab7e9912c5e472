"""A damaged set through the project's own conflict stage and filters, for any setting of the conflict section."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import polars as pl
import pyarrow as pa
import torch

from benchmarks.planted.damage import DamagedSet
from schemas.config.curation import ConflictConfig
from stages.conflict.directions import signed_directions
from stages.conflict.groups import leaving_together
from stages.conflict.metric import fit_metric
from stages.conflict.scoring import score_sketches
from stages.conflict.stream import as_slice, scaled
from stages.conflict.table import score_rows
from stages.gradients.cuts import COLUMNS, cuts, relevant
from stages.gradients.omegas import ema_omegas, mean_omegas
from stages.gradients.projections import SketchLayout
from stages.select.filters import FILTERS, ranking
from stages.surgery.methods import surgery

BASELINES = tuple(
    name
    for name, one in FILTERS.items()
    if name != "conflict" and not one.implicit and "chosen_score" not in one.columns
)
"""Left out: what needs a judge's scores, or implicit rewards, which are zero in round 0 (policy = reference)."""
STOOD_FOR = ("smallest_gap", "lossdiff_irm")
"""Of these, filters that a study ranks by the margin of mean-token log-probabilities in place of the implicit one."""

_HELD = 10.0
"""A held back pair ranks so far below its own relevance, under every score."""


@dataclass(frozen=True)
class Setting:
    """The conflict section's values, as in schemas.config.curation.ConflictConfig; `q` is metric_power.

    leave_out `kind`: all pairs of the question's kind leave together, a stricter test than any the pipeline makes: what
    is found is then not another question from the same template.
    """

    metric: str = "unit"
    q: float = 0.5
    direction: str = "mean"
    surgery: str = "pcgrad"
    scope: str = "model"
    score: str = "all"
    leave_out: str = "answers"

    def changed(self, **values: Any) -> Setting:
        """A copy with other values."""
        return replace(self, **values)

    def __str__(self) -> str:
        metric = f"{self.metric} q={self.q:g}" if self.metric == "coordinate" else self.metric
        return f"{metric}, {self.direction}, {self.surgery}, {self.scope}, {self.score}, {self.leave_out}"


def configured() -> Setting:
    """The conflict section's defaults."""
    config = ConflictConfig()
    return Setting(
        config.metric,
        config.metric_power,
        config.direction,
        config.surgery,
        config.scope,
        config.score,
        config.leave_out,
    )


def gate(damaged: DamagedSet) -> torch.Tensor:
    """Which pairs pass the relevance gate with the config's defaults [N]."""
    frame = damaged.frame.select("language", *COLUMNS)
    found = cuts(frame.filter(pl.col("null_chosen").is_not_null()), damaged.languages, ConflictConfig().relevance)
    return torch.tensor(relevant(frame, found).to_list())


def gated(
    damaged: DamagedSet, setting: Setting, layout: SketchLayout | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the product ranks by [N], and which pairs pass the relevance gate [N].

    Scores of the pairs that pass, made without the others; a pair that is held back lies below all of them, by its own relevance.
    """
    passes_N = gate(damaged)
    relevance = damaged.frame["relevance_chosen"].fill_null(0.0).cast(pl.Float64)
    value_N = torch.from_numpy(relevance.to_numpy().copy()) - _HELD
    value_N[passes_N] = numbers(score(damaged.only(passes_N), setting, layout, seed)["score"])
    return value_N, passes_N


def numbers(column: pl.Series) -> torch.Tensor:
    """A score's column as float64; pairs that cannot be ranked come last, tied."""
    lowest = column.min()
    return torch.from_numpy(column.fill_null(0.0 if lowest is None else float(lowest) - 1.0).to_numpy().copy())  # type: ignore[arg-type]


def score(
    damaged: DamagedSet,
    setting: Setting,
    layout: SketchLayout | None = None,
    seed: int = 0,
    trusted_N: torch.Tensor | None = None,
) -> pl.DataFrame:
    """The scores table of the set, a row a pair. layout: needed for metric `layer` and scope `layer`; trusted_N: the pairs that make the
    directions, as the dev split does with `conflict.target: dev` (None: all)."""
    n_languages = len(damaged.languages)

    def chunks() -> list[torch.Tensor]:
        return [damaged.sketch_ND]

    if layout is None and "layer" in (setting.metric, setting.scope):
        raise ValueError(f"{setting} needs the sketches' layout")
    slots = [] if layout is None else [slot.columns for slot in layout.layers]
    kind = "none" if setting.metric == "raw" else setting.metric
    metric = fit_metric(chunks, kind, q=setting.q, layers=slots)  # type: ignore[arg-type]
    weight_N = torch.full((len(damaged.sketch_ND),), 0.5, dtype=torch.float64)  # round 0: Delta = 0 for every pair
    weighted = scaled(metric.stream(chunks), weight_N)
    in_n = (torch.ones(len(weight_N), dtype=torch.bool) if trusted_N is None else trusted_N).nonzero()[:, 0]
    omega_N = torch.zeros_like(weight_N)
    if setting.direction == "ema":
        omega_N[in_n] = ema_omegas(damaged.language_N[in_n], n_languages, gamma=0.9, batch_size=32)
    else:
        omega_N[in_n] = mean_omegas(damaged.language_N[in_n], n_languages)
    merged_LD, _ = signed_directions(weighted, damaged.language_N, omega_N, n_languages, scale_D=metric.scale_D)
    columns: list[Any] = [slice(None)]
    if setting.scope == "layer" and layout is not None:
        columns = [as_slice(c) for c in layout.group_columns("block").values()]
    found = score_sketches(
        weighted,
        damaged.language_N,
        omega_N,
        merged_LD,
        surgery(setting.surgery, n_languages, seed, repeats=64),
        columns=columns,
        scale_D=metric.scale_D,
        group_N=_groups(damaged, setting.leave_out if trusted_N is None else "pair"),
    )
    tables = score_rows(
        damaged.frame, damaged.languages, found, weight_N, others=setting.score == "others" and trusted_N is None
    )
    return pl.DataFrame(pa.concat_tables(tables))


def rank_all(scores: pl.DataFrame, names: tuple[str, ...] = ("conflict", *BASELINES), seed: int = 0) -> pl.DataFrame:
    """One column a filter: what it ranks the pairs by, larger is kept first."""
    return scores.select(ranking(scores, name, (seed,)) for name in names)


def _groups(damaged: DamagedSet, leave_out: str) -> torch.Tensor | None:
    if leave_out == "kind":
        kinds = {kind: n for n, kind in enumerate(dict.fromkeys(damaged.frame["kind"]))}
        return torch.tensor([kinds[kind] for kind in damaged.frame["kind"]])
    return leaving_together(damaged.frame, leave_out).label_N  # type: ignore[arg-type]
