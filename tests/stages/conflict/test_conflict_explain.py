"""An explanation adds up to the score that the stage wrote, and its neighbours are those of a plain search."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch

from schemas.config.loss import LossConfig
from schemas.errors import UserError
from stages.conflict.explain import explain_pair
from stages.conflict.prepare import Prepared
from stages.conflict.stage import Conflict
from tests.stages.conflict.test_conflict_stage import config, draw, tables
from tests.stages.stage_context import collect, context


def finished(tmp_path, loss=None, **settings):
    g_ND, languages = draw(24, 7)
    groups = [f"g{i}" for i in range(24)]
    groups[4] = groups[8] = groups[0]
    gradients, pairs = tables(g_ND, languages, groups, margin=[0.1 * i for i in range(24)])
    run_config = config(**settings)
    if loss:
        run_config = run_config.model_copy(update={"loss": LossConfig.model_validate(loss)})
    ctx = context(tmp_path, run_config, {}, gradients=gradients, pairs=pairs)
    got, _ = collect(Conflict(), ctx)
    pq.write_table(got["directions"], tmp_path / "directions.parquet")
    ctx.inputs["directions"] = [tmp_path / "directions.parquet"]
    return ctx, {row["pair_id"]: row for row in got["scores"].to_pylist()}


def rows_of(ready: Prepared) -> torch.Tensor:
    chunks, scale_D = ready.chunks()
    rows = torch.cat([x.double() * f[:, None] for x, f in chunks()])
    return rows if scale_D is None else rows * scale_D


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"metric": "raw", "leave_out": "pair", "direction": "ema", "ema_batch": 2},
        {"metric": "coordinate", "scope": "layer", "leave_out": "group"},
        {"metric": "unit", "score": "all"},
        {"weighting": "none", "surgery": "unit_mean", "leave_out": "group"},
        {"refit": True, "orders": 8},
        {"refit": True, "scope": "layer", "leave_out": "group", "orders": 8},
    ],
)
def test_layer_groups_add_up_to_the_score(tmp_path, settings):
    ctx, scores = finished(tmp_path, **settings)
    for pair_id in ("p0", "p5", "p8"):
        found = explain_pair(ctx, pair_id)
        assert [group.name for group in found.layer_groups] == [f"block.{n}" for n in range(4)]
        total = sum(group.contribution for group in found.layer_groups)
        assert total == pytest.approx(scores[pair_id]["score"], abs=1e-5)
        assert sum(group.share for group in found.layer_groups) == pytest.approx(1.0)
        assert all(-1 <= value <= 1 for group in found.layer_groups for value in group.cosines.values())
    together = settings.get("leave_out") == "group"
    assert explain_pair(ctx, "p4").leaves_with == (["p0", "p8"] if together else [])


def test_one_layer_group_has_the_cosines_of_the_scores_table(tmp_path):
    """With every block but one silenced, the group's cosines are the whole pair's."""
    ctx, scores = finished(tmp_path)
    found = explain_pair(ctx, "p3")
    ready = Prepared.of(ctx)
    assert list(found.layer_groups[0].cosines) == ready.languages
    # shares and group cosines give the whole cosine with a language: sum of |g_s||G_s| cos_s over |g||G|
    chunks = rows_of(ready)
    stay = torch.tensor([i != 3 for i in range(24)])
    for n, entry in enumerate(scores["p3"]["cosines"]):
        mine = stay & (ready.language_N == n)
        rest_D = chunks[mine].mean(dim=0)
        for s, columns in enumerate(ready.blocks.values()):
            want = torch.cosine_similarity(chunks[3, columns], rest_D[columns], dim=0)
            assert found.layer_groups[s].cosines[entry["language"]] == pytest.approx(float(want), abs=1e-5)


def test_neighbours_are_those_of_a_plain_search(tmp_path):
    ctx, _ = finished(tmp_path)
    found = explain_pair(ctx, "p6", k=3)
    ready = Prepared.of(ctx)
    rows = rows_of(ready)
    cosine = torch.cosine_similarity(rows[6], rows, dim=1)
    cosine[6] = torch.nan
    order = [i for i in cosine.nan_to_num(2.0).argsort().tolist() if i != 6]
    assert [n.pair_id for n in found.opposed] == [f"p{i}" for i in order[:3]]
    assert [n.pair_id for n in found.nearest] == [f"p{i}" for i in order[::-1][:3]]
    assert [n.cosine for n in found.nearest] == pytest.approx(cosine[order[::-1][:3]].tolist(), abs=1e-5)
    assert [n.cosine for n in found.opposed] == pytest.approx(cosine[order[:3]].tolist(), abs=1e-5)
    assert len(explain_pair(ctx, "p6", k=100).nearest) == 23


@pytest.mark.parametrize(
    ("loss", "sign"),
    [({"type": "exo_pair", "beta": 3.0, "label_smoothing": 0.2}, -1), ({"type": "hinge", "beta": 1.0}, 0)],
)
def test_neighbours_of_a_loss_that_turns_gradients_round_or_ends_them(tmp_path, loss, sign):
    ctx, _ = finished(tmp_path, loss=loss)
    ready = Prepared.of(ctx)
    rows, weight = rows_of(ready), ready.weights.weight_N
    assert (weight.sign() == sign).any() and (weight > 0).any()
    at = int((weight > 0).nonzero()[0])
    cosine = torch.cosine_similarity(rows[at], rows, dim=1)
    near = [i for i in cosine.argsort(descending=True).tolist() if i != at and weight[i] != 0]
    found = explain_pair(ctx, f"p{at}", k=24)
    assert [n.pair_id for n in found.nearest] == [f"p{i}" for i in near]
    assert [n.pair_id for n in found.opposed] == [f"p{i}" for i in near[::-1]]


def test_a_pair_without_a_gradient_is_said(tmp_path):
    ctx, _ = finished(tmp_path)
    with pytest.raises(UserError, match="p99 has no gradient"):
        explain_pair(ctx, "p99")
