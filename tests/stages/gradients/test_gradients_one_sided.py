"""One-sided compression in two passes equals recomputation from materialised per-pair gradients."""

from __future__ import annotations

import json
import random

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.errors import UserError
from schemas.tables import TABLES
from stages.contract import ModelRef
from stages.gradients.aggregate import Aggregate
from stages.gradients.items import Item, numbered
from stages.gradients.layers import select_layers
from stages.gradients.pair_sketches import PairSketches
from stages.gradients.projections import SketchLayout, projection
from stages.gradients.rows import Pair
from stages.gradients.sketcher import Sketcher
from stages.gradients.stage import Gradients
from stages.gradients.store import GROUPS_KEY, LANGUAGES_KEY
from stages.text.render import PairIds, load_renderer
from tests.stages.gradients.one_sided_bench import CODES, RANK, SEED, both_passes, config, first_pass, table
from tests.stages.gradients.oracles import exact_pair_gradient
from tests.stages.stage_context import context, shards


def materialised(model_folder, models, pairs, config_, reference=None):
    """(ids, languages, C [N, D] float64, c [N]) by autograd and Flora's formula: G A^T where I >= O, else A G."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    renderer = load_renderer(models["policy"], config_.text)
    layers = select_layers(model).layers
    ids, languages, sketches, weights = [], [], [], []
    for row in pairs.to_pylist():
        if row["split"] != "train":
            continue
        one = renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"])
        parts = []
        gradients = exact_pair_gradient(model, Pair(tuple(one.prompt), tuple(one.chosen), tuple(one.rejected)), layers)
        for layer in layers:
            gradient = gradients[layer.name]
            side = "in" if layer.in_width >= layer.out_width else "out"
            width = max(layer.in_width, layer.out_width)
            a_RW = projection(SEED, layer.name, side, RANK, width)
            parts.append((gradient @ a_RW.T if side == "in" else a_RW @ gradient).double().flatten())
        margin = 0.0
        if reference is not None:
            margin = value(model, one) - value(reference, one)
        loss = config_.loss
        logit = loss.beta * margin + loss.alpha * (len(one.chosen) - len(one.rejected))
        weights.append(1.0 if config_.conflict.weighting == "none" else 1 / (1 + np.exp(logit)))
        ids.append(row["pair_id"])
        languages.append(row["language"])
        sketches.append(torch.cat(parts).numpy())
    return ids, languages, np.stack(sketches), np.array(weights)


def value(model, one) -> float:
    """s(chosen) - s(rejected) from the model's own full logits."""
    with torch.no_grad():
        sums = []
        for side in (one.chosen, one.rejected):
            logits = model(torch.tensor([one.prompt + side])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(logits[len(one.prompt) - 1 + k, token]) for k, token in enumerate(side)))
    return sums[0] - sums[1]


def direct_directions(g_ND, languages, ids, pairs, config_, leave=None, size=4):
    """G [L, D] by a plain loop: the mean, or an EMA over minibatches that end at the end of a shard."""
    place = {row["pair_id"]: n // size for n, row in enumerate(pairs.to_pylist())}
    gamma, batch = config_.conflict.ema_gamma, config_.conflict.ema_batch
    found = []
    for code in CODES:
        mine = [n for n, language in enumerate(languages) if language == code]
        if config_.conflict.direction == "mean":
            mine = [n for n in mine if n != leave]
            found.append(np.mean(g_ND[mine], axis=0))
            continue
        running, steps = np.zeros(g_ND.shape[1]), 0
        for shard in sorted(set(place.values())):
            here = [n for n in mine if place[ids[n]] == shard]
            for start in range(0, len(here), batch):
                members = here[start : start + batch]
                running = gamma * running + (1 - gamma) * g_ND[members].mean(axis=0)
                steps += 1
        found.append(running / (1 - gamma**steps))
    return np.stack(found)


@pytest.mark.parametrize(
    "conflict",
    [{}, {"metric": "raw", "weighting": "none"}, {"scope": "layer", "surgery": "mean"}, {"direction": "ema"}],
    ids=["mean", "raw", "layer", "ema"],
)
def test_scores_are_those_of_materialised_one_sided_gradients(tmp_path, models, tiny_model, conflict):
    """Leave-one-out included; a reference that is not the policy, so that the loss weights differ. Tolerance 1e-4."""
    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for parameter in reference.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    reference.save_pretrained(tmp_path / "reference")
    models = models | {"reference": ModelRef("r", tmp_path / "reference", "e")}
    config_ = config(conflict, {"beta": 1.0, "alpha": 0.1})
    pairs = table(24, random.SystemRandom().randrange(10**6), [CODES[i % 3] for i in range(24)])
    got, account, first, second = both_passes(tmp_path, models, pairs, config_)
    ids, languages, c_ND, weights = materialised(tiny_model, models, pairs, config_, reference)
    rows = got["scores"].to_pylist()
    assert [row["pair_id"] for row in rows] == ids
    assert np.allclose([row["weight"] for row in rows], weights, atol=1e-5)
    assert np.ptp(weights) > 0.01 or config_.conflict.weighting == "none"
    norms = np.linalg.norm(c_ND, axis=1, keepdims=True)
    assert np.allclose([row["norm"] for row in rows], norms[:, 0], rtol=1e-4)
    g_ND = weights[:, None] * (c_ND if config_.conflict.metric == "raw" else c_ND / norms)

    whole_LD = direct_directions(g_ND, languages, ids, pairs, config_)
    cosine = {(r["language"], r["other"]): r["cosine"] for r in got["gram"].to_pylist() if r["scope"] == "model"}
    unit_LD = whole_LD / np.linalg.norm(whole_LD, axis=1, keepdims=True)
    for (one, other), found in cosine.items():
        assert found == pytest.approx(unit_LD[CODES.index(one)] @ unit_LD[CODES.index(other)], abs=1e-4)
    assert all(r["null_negative_rate"] is None for r in got["gram"].to_pylist())
    layer = config_.conflict.scope == "layer"
    for row in got["directions"].to_pylist() if not layer else []:
        assert np.allclose(row["direction"], whole_LD[CODES.index(row["language"])], atol=1e-4 * np.abs(whole_LD).max())
    weight_L = [r["weight"] for r in got["directions"].to_pylist()]
    weight_L = np.array([1 / 3] * 3 if layer else weight_L)
    for n, row in enumerate(rows):
        own = CODES.index(languages[n])
        if config_.conflict.direction == "mean":
            left_LD = direct_directions(g_ND, languages, ids, pairs, config_, leave=n)
        else:  # leaving out re-weights the rest: (G - omega g) / (1 - omega)
            alone = np.zeros_like(g_ND)
            alone[n] = g_ND[n]
            omega_g = direct_directions(alone, languages, ids, pairs, config_)[own]
            omega = omega_g @ g_ND[n] / (g_ND[n] @ g_ND[n])
            left_LD = whole_LD.copy()
            left_LD[own] = (whole_LD[own] - omega_g) / (1 - omega)
        merged = weight_L @ left_LD
        expected = g_ND[n] @ merged / (np.linalg.norm(g_ND[n]) * np.linalg.norm(merged))
        assert row["score_all"] == pytest.approx(expected, abs=1e-4)
        others = np.delete(weight_L, own) @ np.delete(left_LD, own, axis=0)
        expected = g_ND[n] @ others / (np.linalg.norm(g_ND[n]) * np.linalg.norm(others))
        assert row["score_others"] == pytest.approx(expected, abs=1e-4)
        cosines = {c["language"]: c["cosine"] for c in row["cosines"]}
        for k, code in enumerate(CODES):
            size = np.linalg.norm(g_ND[n]) * np.linalg.norm(left_LD[k])
            assert cosines[code] == pytest.approx(g_ND[n] @ left_LD[k] / size, abs=1e-4)
    train = sum(row["split"] == "train" for row in pairs.to_pylist())
    assert (
        sum(t.kept for part in first for t in part.tallies) == sum(t.kept for p in second for t in p.tallies) == train
    )
    assert sum(t.kept for t in account.tallies) == train


def test_shards_of_either_pass_and_batches_change_nothing_but_rounding(tmp_path, models):
    pairs = table(18, 3)
    one, _, _, _ = both_passes(tmp_path, models, pairs, config(), size=4, second_size=3)
    other, _, _, _ = both_passes(tmp_path, models, pairs, config(token_budget=64), size=18, second_size=18)
    for name in ("score_all", "score_others", "cosine_own"):
        assert np.allclose(one["scores"].column(name).to_numpy(), other["scores"].column(name).to_numpy(), atol=1e-4)


def test_nothing_of_the_size_of_a_one_sided_sketch_is_stored_per_pair(tmp_path, models):
    pairs = table(12, 4)
    _, _, first, second = both_passes(tmp_path, models, pairs, config())
    gradients = second[0].tables["gradients"]
    groups = json.loads(gradients.schema.metadata[GROUPS_KEY])
    assert groups == ["block.0", "block.1"] and json.loads(gradients.schema.metadata[LANGUAGES_KEY]) == CODES
    assert gradients.schema.field("products").type.list_size == 6
    assert sum(part.tables["sums"].num_rows for part in first) <= 14 * 3 * len(first)


def test_a_pair_that_fails_leaves_the_sums_and_is_accounted_for(tmp_path, models, monkeypatch):
    """p3's gradient is not finite: dropped in both passes; the directions are those of the other pairs."""
    pairs = table(12, 5, [CODES[i % 3] for i in range(12)])
    launch = Sketcher._launch
    renderer = load_renderer(models["policy"], config().text)
    row = pairs.to_pylist()[3]
    bad = renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"])

    def broken(self, batch, shared):
        got = launch(self, batch, shared)
        for n, pair in enumerate(batch):
            if pair.chosen == tuple(bad.chosen) and pair.prompt == tuple(bad.prompt):
                got.sketch_ND[n] = float("inf")
        return got

    monkeypatch.setattr(Sketcher, "_launch", broken)
    for direction in ("mean", "ema"):
        config_ = config({"direction": direction})
        got, _, first, second = both_passes(tmp_path, models, pairs, config_)
        assert [(d.row_id, d.reason, d.failed) for p in first for d in p.drops] == [("p3", "non_finite_gradient", True)]
        assert [(d.row_id, d.reason, d.failed) for p in second for d in p.drops] == [("p3", "not_aggregated", True)]
        without = pairs.filter(pa.compute.not_equal(pairs.column("pair_id"), "p3"))
        size = {"mean": 4, "ema": 12}[direction]  # shards of the same pairs: an EMA's minibatches end with them
        again, _, _, _ = both_passes(tmp_path, models, pairs, config_, size=size)
        clean, _, _, _ = both_passes(tmp_path, models, without, config_, size=size)
        assert "p3" not in got["scores"].column("pair_id").to_pylist()
        for name in ("score_all", "cosine_own"):
            assert np.allclose(
                again["scores"].column(name).to_numpy(), clean["scores"].column(name).to_numpy(), atol=1e-5
            )


def test_every_pair_is_one_step_of_progress_though_an_ema_is_summed_again(tmp_path, models, monkeypatch):
    """p3 is not finite, so the part is summed again; then p2, which fitted, does not fit in memory."""
    pairs, launch = table(8, 5, ["en"] * 8), Sketcher._launch
    renderer = load_renderer(models["policy"], config().text)
    p2, p3 = (renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"]) for row in pairs.to_pylist()[2:4])
    seen = []

    def broken(self, batch, shared):
        where = {tuple(pair.prompt + pair.chosen): n for n, pair in enumerate(batch)}
        if seen and tuple([*p2.prompt, *p2.chosen]) in where:
            raise RuntimeError("out of memory")
        got = launch(self, batch, shared)
        if (n := where.get(tuple([*p3.prompt, *p3.chosen]))) is not None:
            got.sketch_ND[n] = float("inf")
        seen.append(len(batch))
        return got

    monkeypatch.setattr(Sketcher, "_launch", broken)
    config_ = config({"direction": "ema"}, token_budget=4096, prefix_sharing="off")
    ctx = context(tmp_path, config_, models, pairs=pairs)
    (part,) = Aggregate().run(ctx, shards(pairs, 8))
    assert {(d.row_id, d.reason) for d in part.drops} == {("p3", "non_finite_gradient"), ("p2", "out_of_memory")}
    assert ctx.progress.done == pairs.column("split").to_pylist().count("train")  # held-out pairs are not work


def test_one_pair_in_a_language_one_language_and_identical_answers_give_no_nan(tmp_path, models):
    pairs = table(10, 6, ["en"] * 9 + ["de"]).to_pylist()
    pairs[2]["rejected"] = pairs[2]["chosen"]
    pairs = pa.Table.from_pylist(pairs, schema=TABLES["pairs"].schema)
    for rows in (pairs, pairs.filter(pa.compute.equal(pairs.column("language"), "en"))):
        got, _, *passes = both_passes(tmp_path, models, rows, config())
        for parts in passes:
            assert [(d.row_id, d.reason, d.failed) for p in parts for d in p.drops] == [("p2", "identical", False)]
        table_ = got["scores"].to_pylist()
        assert len(table_) == sum(row["split"] == "train" for row in rows.to_pylist()) - 1
        for name in ("score", "score_all", "score_others", "cosine_own", "weight"):
            assert not any(row[name] is not None and np.isnan(row[name]) for row in table_), name
        if alone := [row for row in table_ if row["language"] == "de"]:
            assert alone[0]["cosine_own"] is None and "no_own_direction" in alone[0]["flags"]
        else:
            assert all("single_language" in row["flags"] for row in table_)


def test_sums_of_another_seed_or_model_are_refused(tmp_path, models):
    pairs = table(8, 7)
    _, tables = first_pass(tmp_path, models, pairs, config())
    for other_config, other_models in (
        (config(sketch={"seed": SEED + 1}), models),
        (config(), models | {"policy": ModelRef("tiny", models["policy"].path, "another")}),
    ):
        ctx = context(tmp_path, other_config, other_models, pairs=pairs, **tables)
        with pytest.raises(UserError, match="other layers or projections, another model"):
            list(Gradients().run(ctx, shards(pairs, 4)))


@pytest.mark.parametrize(
    "change", [{"ema_gamma": 0.9}, {"direction": "mean", "ema_gamma": 0.9, "ema_batch": 32}, {"ema_batch": 16}]
)
def test_sums_of_another_direction_are_refused_where_their_values_are_the_same(tmp_path, models, change):
    """One minibatch a part: its sum is the mean, whatever gamma is. How parts are joined still depends on it."""
    pairs, given = table(8, 7, ["en"] * 8), {"direction": "ema", "ema_gamma": 0.7, "ema_batch": 8}
    second, _ = first_pass(tmp_path, models, pairs, config(given | change))
    first, tables = first_pass(tmp_path, models, pairs, config(given))
    for one, other in zip(first, second, strict=True):
        assert one.tables["sums"].drop(["key"]).equals(other.tables["sums"].drop(["key"]))
        assert not one.tables["sums"].equals(other.tables["sums"])
    ctx = context(tmp_path, config(given | change), models, pairs=pairs, **tables)
    with pytest.raises(UserError, match=r"conflict\.direction"):
        list(Gradients().run(ctx, shards(pairs, 4)))


def test_a_batch_that_ran_out_of_memory_half_way_is_not_added_twice(make_model, make_pairs):
    from stages.gradients.aggregate import PartSums

    pairs, settings = make_pairs(4, seed=1), config({"weighting": "none"})
    layout = SketchLayout.plan(select_layers(make_model("llama")).layers, method="one_sided", rank=2)
    items = [
        Item({"pair_id": f"p{n}", "language": "en"}, PairIds(list(pair.prompt), list(pair.chosen), list(pair.rejected)))
        for n, pair in enumerate(pairs)
    ]
    numbered(items)
    sums = PartSums(layout, settings.conflict, settings.loss, items, referred=False)
    g_ND = torch.randn(4, layout.dim)
    got = PairSketches(g_ND, torch.zeros(4), torch.zeros(4))
    sums.reduce([0, 1], got.rows([0, 1]))
    sums.reduce([0, 1, 2, 3], got)
    rows = sums.sums(0, items, "k")
    expected = (g_ND.double() / g_ND.double().norm(dim=1, keepdim=True)).mean(dim=0)
    assert np.allclose(np.concatenate(rows.column("values").to_pylist()), expected, atol=1e-6)
