"""The conflict stage against recomputation from scratch, and what it says when there is little to go on."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch

from schemas.config import RunConfig
from schemas.config.loss import LossConfig
from schemas.errors import UserError
from schemas.sketches import sketch_array
from schemas.tables import TABLES, gradients_schema
from stages.conflict.directions import signed_directions
from stages.conflict.null import Sample
from stages.conflict.stage import Conflict
from stages.gradients.cuts import COLUMNS
from stages.gradients.omegas import mean_omegas
from stages.gradients.projections import LayerShape, SketchLayout
from stages.gradients.store import LAYOUT_KEY, SEED_KEY, pack_sketches, sketch_columns
from tests.stages.stage_context import collect, context

LAYOUT = SketchLayout.plan([LayerShape(f"model.layers.{n}.proj", 16, 16) for n in range(4)], 4 * 16)


def config(**conflict) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "languages": {"seen": ["en", "de", "zh"], "unseen": ["it"]},
            "model": {"policy": "m"},
            "prompts": {"sources": [{"path": "x"}]},
            "conflict": conflict,
        }
    )


def tables(
    g_ND: torch.Tensor,
    languages: list[str],
    groups=None,
    texts=None,
    seed=b"0",
    margin=None,
    relevance=None,
    splits=None,
):
    n = len(languages)
    stored, norm = pack_sketches(g_ND)
    zeros = [0.0] * n
    gradients = pa.table(
        {
            "pair_id": [f"p{i}" for i in range(n)],
            "group_id": groups or [f"g{i}" for i in range(n)],
            "language": languages,
            "split": splits or ["train"] * n,
            "sketch": sketch_array(stored.numpy()),
            "norm": norm.numpy(),
            "logp_chosen": margin or zeros, "logp_rejected": zeros, "ref_logp_chosen": zeros, "ref_logp_rejected": zeros,
            "n_prompt": [3] * n, "n_chosen": list(range(2, n + 2)), "n_rejected": [4] * n, "ids_hash": ["h"] * n,
            **(relevance or dict.fromkeys(COLUMNS, pa.nulls(n, pa.float32()))),
        },
        schema=gradients_schema(stored.shape[1]).with_metadata({LAYOUT_KEY: LAYOUT.to_json().encode(), SEED_KEY: seed}),
    )  # fmt: skip
    texts = texts or [(f"c{i}", f"r{i}") for i in range(n)]
    rows = [
        {
            "pair_id": f"p{i}", "round": 0, "prompt_id": f"q{i}", "group_id": "g", "language": languages[i],
            "split": "train", "prompt": [{"role": "user", "content": "q"}], "source": "x",
            "chosen": [{"role": "assistant", "content": c}], "rejected": [{"role": "assistant", "content": r}],
        }
        for i, (c, r) in enumerate(texts)
    ]  # fmt: skip
    return gradients, pa.Table.from_pylist(rows, schema=TABLES["pairs"].schema)


def run(tmp_path, config_, gradients, pairs):
    ctx = context(tmp_path, config_, {}, gradients=gradients, pairs=pairs)
    got, account = collect(Conflict(), ctx)
    for name, table in got.items():
        assert table.schema.equals(TABLES[name].schema)
    return got, account, ctx.progress.notes


def draw(n: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(64, generator=generator)
    return torch.randn(n, 64, generator=generator) + 0.5 * common, [["en", "de", "zh"][i % 3] for i in range(n)]


def literal_score(g_ND: np.ndarray, languages: list[str], i: int, leave: set[int], weights: np.ndarray, codes) -> float:
    """The definition, from scratch: means without the left-out pairs, merged with the full-data weights."""
    kept = [j for j in range(len(languages)) if j not in leave]
    means = np.stack([np.mean([g_ND[j] for j in kept if languages[j] == code], axis=0) for code in codes])
    merged = weights @ means
    return float(g_ND[i] @ merged / (np.linalg.norm(g_ND[i]) * np.linalg.norm(merged)))


@pytest.mark.parametrize("leave_out", ["pair", "answers", "group"])
@pytest.mark.parametrize("metric", ["raw", "unit"])
def test_scores_are_the_definition_recomputed_from_scratch(tmp_path, metric, leave_out):
    """Pairs 0, 4 and 8 share a translation group; 1 and 2 share an answer as chosen of one and rejected of the other."""
    g_ND, languages = draw(15, np.random.SeedSequence().entropy % 10**6)
    groups = [f"g{i}" for i in range(15)]
    groups[4] = groups[8] = groups[0]
    texts = [(f"c{i}", f"r{i}") for i in range(15)]
    texts[2] = ("c2", "c1")
    settings = config(metric=metric, leave_out=leave_out, score="all")
    got, _, _ = run(tmp_path, settings, *tables(g_ND, languages, groups, texts))
    wide = g_ND.double().numpy() * 0.5  # c = sigmoid(0)
    if metric == "unit":
        wide = 0.5 * wide / np.linalg.norm(wide, axis=1, keepdims=True)
    weights = np.array(got["directions"].column("weight").to_pylist())
    assert got["directions"].column("scope").to_pylist() == ["model"] * 3
    answers = {1: {1, 2}, 2: {1, 2}} if leave_out != "pair" else {}
    together = answers | ({i: {0, 4, 8} for i in (0, 4, 8)} if leave_out == "group" else {})
    for i, score in enumerate(got["scores"].column("score_all").to_pylist()):
        leave = together.get(i, {i})
        assert score == pytest.approx(literal_score(wide, languages, i, leave, weights, ["en", "de", "zh"]), abs=2e-3)


def test_a_language_against_the_others_is_found(tmp_path):
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(64, generator=generator)
    languages = ["en", "de", "zh"] * 20
    sign = torch.tensor([-1.0 if code == "zh" else 1.0 for code in languages])
    g_ND = sign[:, None] * common + 0.7 * torch.randn(60, 64, generator=generator)
    got, account, _ = run(tmp_path, config(), *tables(g_ND, languages))
    rows = got["scores"].to_pylist()
    assert all(set(r["conflicting_languages"]) >= {"en", "de"} for r in rows if r["language"] == "zh")
    assert np.mean([r["score_others"] < 0 for r in rows if r["language"] == "zh"]) > 0.95
    assert account.stats["conflicting_language_pairs"] == 2
    cosine = {(r["language"], r["other"]): r["cosine"] for r in got["gram"].to_pylist() if r["scope"] == "model"}
    assert cosine["en", "zh"] < -0.5 < 0.5 < cosine["en", "de"]
    assert {r["scope"] for r in got["gram"].to_pylist()} == {"model", "block.0", "block.1", "block.2", "block.3"}


def test_per_layer_surgery_has_weights_per_layer(tmp_path):
    g_ND, languages = draw(30, 5)
    got, _, _ = run(tmp_path, config(scope="layer"), *tables(g_ND, languages))
    assert set(got["directions"].column("scope").to_pylist()) == {f"block.{n}" for n in range(4)}


def test_equal_input_gives_equal_tables(tmp_path):
    first = run(tmp_path, config(), *tables(*draw(30, 6)))[0]
    second = run(tmp_path, config(), *tables(*draw(30, 6)))[0]
    assert first == second


def test_the_loss_weight_follows_the_margin(tmp_path):
    g_ND, languages = draw(12, 7)
    margin = [float(i) for i in range(12)]
    got, _, _ = run(tmp_path, config(), *tables(g_ND, languages, margin=margin))
    expected = 1 / (1 + np.exp(0.1 * np.array(margin)))
    assert np.allclose(got["scores"].column("weight").to_pylist(), expected, atol=1e-6)


def with_sides(gradients: pa.Table, w_ND: torch.Tensor, l_ND: torch.Tensor) -> pa.Table:
    for side, rows_ND in (("chosen", w_ND), ("rejected", l_ND)):
        for name, column in sketch_columns(f"_{side}", rows_ND).items():
            gradients = gradients.append_column(name, column)
    return gradients


@pytest.mark.parametrize("metric", ["raw", "unit"])
def test_a_loss_that_weighs_sides_apart_is_scored_by_its_own_gradient(tmp_path, metric):
    """IPO: g_i = 2 (1 / 2 beta - h) / beta * (grad s_w / |y_w| - grad s_l / |y_l|), h from token means."""
    (w_ND, languages), (l_ND, _) = draw(15, 21), draw(15, 22)
    margin = [0.4 * i for i in range(15)]
    gradients, pairs = tables(w_ND - l_ND, languages, margin=margin)
    settings = config(metric=metric).model_copy(update={"loss": LossConfig(type="ipo")})
    got, _, _ = run(tmp_path, settings, with_sides(gradients, w_ND, l_ND), pairs)
    n_w, n_l = np.arange(2.0, 17.0), np.full(15, 4.0)
    c = 2 * (5 - np.array(margin) / n_w) / 0.1
    own = w_ND.double().numpy() / n_w[:, None] - l_ND.double().numpy() / n_l[:, None]
    g_ND = c[:, None] * (own if metric == "raw" else own / np.linalg.norm(own, axis=1, keepdims=True))
    weights = np.array(got["directions"].column("weight").to_pylist())
    assert np.allclose(got["scores"].column("weight").to_pylist(), c, rtol=1e-5)
    assert np.allclose(got["scores"].column("gradient_norm").to_pylist(), np.linalg.norm(g_ND, axis=1), rtol=5e-3)
    for i, score in enumerate(got["scores"].column("score_all").to_pylist()):
        assert score == pytest.approx(literal_score(g_ND, languages, i, {i}, weights, ["en", "de", "zh"]), abs=2e-3)


def test_a_loss_that_weighs_sides_apart_is_refused_without_them(tmp_path):
    settings = config().model_copy(update={"loss": LossConfig(type="ipo")})
    with pytest.raises(UserError, match="only their difference is stored"):
        run(tmp_path, settings, *tables(*draw(12, 7)))


def test_a_loss_that_weighs_sides_alike_at_the_reference_needs_no_sides(tmp_path):
    """BCO pushes both sides by half there, whatever the pair: the scores are DPO's."""
    tables_ = tables(*draw(12, 7))
    got = run(tmp_path, config().model_copy(update={"loss": LossConfig(type="bco_pair")}), *tables_)[0]
    assert got["scores"] == run(tmp_path, config(), *tables_)[0]["scores"]


def test_a_zero_gradient_has_no_score_and_never_a_nan(tmp_path):
    g_ND, languages = draw(12, 8)
    g_ND[4] = 0
    got, _, notes = run(tmp_path, config(), *tables(g_ND, languages))
    row = got["scores"].to_pylist()[4]
    assert row["score"] is None and "zero_gradient" in row["flags"]
    for name in ("score", "score_all", "score_others", "cosine_own"):
        assert not any(v is not None and np.isnan(v) for v in got["scores"].column(name).to_pylist())
    assert any("fewer than 20 pairs" in note for note in notes)


@pytest.mark.parametrize("target", ["train", "dev"])
def test_a_language_whose_gradients_are_all_zero_takes_no_score_away(tmp_path, target):
    g_ND, languages = draw(40, 8)
    languages = ["de" if i % 2 else "en" for i in range(40)]
    g_ND[1::2] = 0
    splits = ["train"] * 40 if target == "train" else ["train"] * 20 + ["dev"] * 20
    rows = run(tmp_path, config(target=target), *tables(g_ND, languages, splits=splits))[0]["scores"].to_pylist()
    assert all((row["score"] is None) == (row["language"] == "de") for row in rows)


def test_one_language_is_scored_against_itself_and_says_so(tmp_path):
    g_ND, _ = draw(10, 9)
    got, _, notes = run(tmp_path, config(score="others"), *tables(g_ND, ["de"] * 10))
    rows = got["scores"].to_pylist()
    assert all(r["score_others"] is None and r["score"] == r["score_all"] is not None for r in rows)
    assert any("one language only (de)" in note for note in notes)


def test_sketches_of_different_projections_are_never_mixed(tmp_path):
    import pyarrow.parquet as pq

    g_ND, languages = draw(12, 10)
    one, pairs = tables(g_ND, languages)
    two, _ = tables(g_ND, languages, seed=b"1")
    pq.write_table(one, tmp_path / "a.parquet")
    pq.write_table(two, tmp_path / "b.parquet")
    ctx = context(tmp_path, config(), {}, gradients=[tmp_path / "a.parquet", tmp_path / "b.parquet"], pairs=pairs)
    with pytest.raises(UserError, match="different layers or projections"):
        collect(Conflict(), ctx)


def test_the_scores_table_is_the_same_in_shorter_batches_which_many_languages_get(tmp_path, monkeypatch):
    g_ND, languages = draw(20, 3)
    whole, _, _ = run(tmp_path, config(), *tables(g_ND, languages))
    monkeypatch.setattr("stages.conflict.table._COSINES", 7)
    cut, _, _ = run(tmp_path, config(), *tables(g_ND, languages))
    assert cut["scores"] == whole["scores"] and cut["scores"].num_rows == 20


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("codes", [["en"], ["en", "de"], ["en", "de", "zh"]])
@pytest.mark.parametrize("n", [6, 12, 30])
def test_data_whose_answers_are_shared_by_all_are_scored_as_if_each_pair_left_alone(tmp_path, n, codes, side):
    """One refusal as every rejected answer, or one gold answer as every chosen: it stays in the directions, and that is said."""
    g_ND, _ = draw(n, 11)
    languages = [codes[i % len(codes)] for i in range(n)]
    texts = [(f"c{i}", "I cannot help with that.")[:: 1 if side else -1] for i in range(n)]
    got, _, notes = run(tmp_path, config(), *tables(g_ND, languages, texts=texts))
    alone, _, _ = run(tmp_path, config(leave_out="pair"), *tables(g_ND, languages))
    assert got["scores"].column("score").null_count == 0
    assert got["scores"] == alone["scores"]
    assert sum("stays in the directions" in note or "so common" in note for note in notes) == 1


def test_a_pair_that_every_other_language_leaves_with_has_no_score_and_says_so(tmp_path):
    """Its score against its own language would be another quantity in the same column."""
    g_ND, _ = draw(12, 12)
    languages = ["en"] * 9 + ["de"] * 3
    groups = [f"g{i}" for i in range(12)]
    groups[8] = groups[9] = groups[10] = groups[11]  # one English pair and all of German are translations of each other
    for score in ("others", "all"):
        settings = config(leave_out="group", score=score)
        got, _, notes = run(tmp_path, settings, *tables(g_ND, languages, groups))
        rows = got["scores"].to_pylist()
        assert rows[8]["score"] is None and rows[8]["score_others"] is None and rows[8]["score_all"] is not None
        assert "no_other_direction" in rows[8]["flags"]
        assert all(row["score"] is not None for row in rows[:8])
        assert all(row["score"] is not None and "no_other_direction" not in row["flags"] for row in rows[9:])
        assert any(
            "1 of 12 pairs have no score: with 1 every pair of the other languages leaves" in note for note in notes
        )


def test_a_run_in_which_no_pair_can_have_a_score_is_refused_with_the_cause_and_the_key(tmp_path):
    g_ND, languages = draw(12, 13)
    with pytest.raises(UserError, match=r"every pair of the other languages leaves.*leave_out: pair"):
        run(tmp_path, config(leave_out="group"), *tables(g_ND, languages, ["one group"] * 12))
    with pytest.raises(UserError, match=r"gradient of every pair is zero"):
        run(tmp_path, config(), *tables(torch.zeros(12, 64), languages))


@pytest.mark.parametrize("languages", [2, 5])
def test_nulls_of_a_sample_are_those_of_all_pairs(languages, fresh_seed):
    """Noise with a weak signal: the length of half a language's noise, and the rates, agree within a few standard errors."""
    generator = torch.Generator().manual_seed(fresh_seed)
    n, dim = 6000, 40
    language_N, omega_N = torch.arange(n) % languages, None
    omega_N = mean_omegas(language_N, languages)
    g_ND = torch.randn(n, dim, generator=generator, dtype=torch.float64) + 0.02
    nulls = []
    for pairs in (n, 1500):
        sample = Sample.draw(language_N, torch.arange(n), omega_N, languages, dim, 5, pairs)
        assert sample.complete == (pairs == n) and (sample.error > 0) == (pairs < n)
        assert len(sample.rows_n) == pairs
        got_LD, sums_RLD = signed_directions(
            lambda: [g_ND], language_N, omega_N, languages, sample.sign_Rn, sample.rows_n
        )
        first_RLD = sample._first(sums_RLD[20:40], sums_RLD[-1], got_LD)
        nulls.append((first_RLD - got_LD / 2).square().sum(dim=2).mean())
    # a squared length of `dim` coordinates, averaged over 20 draws and the languages
    assert float(nulls[1] / nulls[0]) == pytest.approx(1.0, abs=6 * (2 / (dim * 20 * languages)) ** 0.5)


def _gated(languages: list[str], off: set[int]) -> dict[str, list[float | None]]:
    """Answers under other prompts are at -1 .. 1; those in `off` are worse than half of these under their own, the others at 3."""
    n = len(languages)
    own = [-0.5 if i in off else 3.0 for i in range(n)]
    null = [-1 + 2 * i / n for i in range(n)]
    return {"relevance_chosen": own, "relevance_rejected": [5.0] * n, "null_chosen": null, "null_rejected": null}


@pytest.mark.parametrize(
    "settings", [{}, {"metric": "coordinate"}, {"leave_out": "pair", "direction": "ema", "ema_batch": 4}]
)
def test_off_topic_pairs_leave_as_if_they_had_never_been_there(tmp_path, settings):
    g_ND, languages = draw(90, 3)
    off = {4, 5, 31, 60, 61, 62, 89}
    g_ND[list(off)] *= 50  # they would rule every direction
    got, account, notes = run(tmp_path, config(**settings), *tables(g_ND, languages, relevance=_gated(languages, off)))
    kept = [i for i in range(90) if i not in off]
    texts, groups = [(f"c{i}", f"r{i}") for i in kept], [f"g{i}" for i in kept]
    alone, _, _ = run(tmp_path, config(**settings), *tables(g_ND[kept], [languages[i] for i in kept], groups, texts))
    assert got["directions"].equals(alone["directions"]) and got["gram"]["dot"].equals(alone["gram"]["dot"])
    rows = got["scores"].to_pylist()
    assert [row["score"] for row in rows[: len(kept)]] == alone["scores"]["score"].to_pylist()
    assert [(row["pair_id"], row["score"], row["flags"], row["cosines"]) for row in rows[len(kept) :]] == [
        (f"p{i}", None, ["off_topic"], []) for i in sorted(off)
    ]
    assert sum(tally.kept for tally in account.tallies) == 90 and account.stats["off_topic_pairs"] == 7
    assert any(note.startswith("7 of 90 pairs are off-topic") for note in notes)


def test_sides_of_the_gate_are_the_configured_ones(tmp_path):
    g_ND, languages = draw(90, 3)
    for sides, held in (("none", 0), ("chosen", 2), ("rejected", 0), ("both", 2)):
        settings = config(relevance={"sides": sides})
        _, account, _ = run(tmp_path, settings, *tables(g_ND, languages, relevance=_gated(languages, {7, 8})))
        assert account.stats["off_topic_pairs"] == held


def test_with_two_sided_losses_the_sides_of_the_pairs_that_stay_are_combined(tmp_path):
    """Rows of the file and pairs of the frame are numbered apart once some are held back."""
    from stages.conflict.store import Store

    g_ND, languages = draw(90, 3)
    gradients, pairs = tables(g_ND, languages, relevance=_gated(languages, {0, 50}))
    ctx = context(tmp_path, config(), {}, gradients=gradients, pairs=pairs)
    store = Store.open(ctx)
    read = torch.cat(
        [x.x_ND.float() * x.factor_N[:, None].float() for x in store.chunks(windows=[range(0, 3), range(49, 52)])()]
    )
    torch.testing.assert_close(read, g_ND[[1, 2, 49, 51]].float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("metric", ["unit", "layer"])
def test_trusted_pairs_make_the_directions_and_training_pairs_are_scored_against_them(tmp_path, metric):
    """The definition, recomputed: no pair leaves, no training pair is in a direction, only training pairs have a row."""
    g_ND, languages = draw(60, 5)
    languages = [code if i < 40 or code != "zh" else "en" for i, code in enumerate(languages)]  # nobody trusts zh
    splits = ["train"] * 40 + ["dev"] * 20
    settings = config(target="dev", metric=metric, surgery="mean")
    got, account, notes = run(tmp_path, settings, *tables(g_ND, languages, splits=splits))
    unit_ND = g_ND / g_ND.norm(dim=1, keepdim=True)
    if metric == "layer":
        for slot in LAYOUT.layers:
            unit_ND[:, slot.columns] /= unit_ND[:, slot.columns].square().mean(dim=0).sum().sqrt()
    trusted = {code: [i for i in range(40, 60) if languages[i] == code] for code in ("en", "de")}
    u_D = sum(unit_ND[where].mean(dim=0) for where in trusted.values())
    rows = got["scores"].to_pylist()
    assert [row["pair_id"] for row in rows] == [f"p{i}" for i in range(40)]
    for i, row in enumerate(rows):
        want = float(torch.cosine_similarity(unit_ND[i], u_D, dim=0))
        assert row["score"] == row["score_all"] == pytest.approx(want, abs=3e-3)
        assert {entry["language"] for entry in row["cosines"]} == {"en", "de"}
    assert sum(tally.kept for tally in account.tallies) == 40
    assert "40 training pairs are scored against the directions of 20 pairs of the dev split" in notes
    assert {r["language"]: r["n_pairs"] for r in got["directions"].to_pylist() if r["n_pairs"]} == {
        code: len(where) for code, where in trusted.items()
    }


def test_one_trusted_language_is_enough(tmp_path):
    g_ND, languages = draw(50, 6)
    languages = [*languages[:40], *["de"] * 10]
    got, _, _ = run(tmp_path, config(target="dev"), *tables(g_ND, languages, splits=["train"] * 40 + ["dev"] * 10))
    assert all(row["score"] is not None for row in got["scores"].to_pylist())


def test_only_training_pairs_count_for_what_cannot_be_scored_or_is_off_topic(tmp_path):
    """Trusted pairs make directions; they are neither scored nor questioned."""
    g_ND, languages = draw(24, 6)
    splits = ["train"] * 12 + ["dev"] * 12
    unscored = g_ND.clone()
    unscored[:12] = 0
    with pytest.raises(UserError, match="No pair can have a conflict score: 12 have a gradient of zero"):
        run(tmp_path, config(target="dev"), *tables(unscored, languages, splits=splits))
    few = g_ND.clone()
    few[12:18] = 0
    _, _, notes = run(tmp_path, config(target="dev"), *tables(few, languages, splits=splits))
    assert not any("have no score" in note for note in notes)
    n = 40
    g_ND, languages = draw(n, 3)
    low, high = [1.5] * 15, [3.0] * 15
    null = [i / 15 for i in range(30)]
    relevance = {
        "relevance_chosen": low + high,
        "relevance_rejected": high + low,
        "null_chosen": null,
        "null_rejected": null,
    }
    relevance = {name: values + [None] * 10 for name, values in relevance.items()}  # the trusted ones have no null
    parts = tables(g_ND, ["en"] * n, splits=["train"] * 30 + ["dev"] * 10, relevance=relevance)
    with pytest.raises(UserError, match="Every pair is off-topic"):
        run(tmp_path, config(target="dev", relevance={"sides": "both", "off_topic_cost": 1000}), *parts)


def test_few_trusted_pairs_are_named_and_languages_without_any_are_not(tmp_path):
    g_ND, languages = draw(70, 6)
    languages = [*languages[:60], *["de"] * 3, *["en"] * 7]
    parts = tables(g_ND, languages, splits=["train"] * 60 + ["dev"] * 10)
    _, account, notes = run(tmp_path, config(target="dev"), *parts)
    assert "fewer than 8 trusted pairs (en 7, de 3): these languages' directions are mostly noise" in notes
    assert account.stats["language_pairs"] == 1


def test_without_trusted_pairs_the_target_is_refused(tmp_path):
    with pytest.raises(UserError, match="No pair of the dev split"):
        run(tmp_path, config(target="dev"), *tables(*draw(12, 1)))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"conflict": {"language_weights": {"xx": 2}}}, "names xx"),
        ({"conflict": {"language_weights": {"en": 0, "de": 0, "zh": 0}}}, "every language 0"),
        ({"conflict": {"language_weights": {"en": -1}}}, "greater than or equal to 0"),
        ({"conflict": {"language_weights": {"en": 2}, "surgery": "mgda"}}, "no use with conflict.surgery: mgda"),
        ({"conflict": {"target": "dev", "score": "others"}}, "no use with conflict.target: dev"),
        ({"conflict": {"target": "dev"}, "rounds": 2}, "needs rounds: 1"),
        (
            {"conflict": {"target": "dev"}, "prompts": {"sources": [{"path": "p"}], "dev_fraction": 0}},
            "no source says which of its rows are trusted",
        ),
        ({"conflict": {"target": "dev"}, "gradients": {"sketch": {"method": "one_sided"}}}, "two_sided"),
        (
            {
                "conflict": {"target": "dev"},
                "prompts": {"sources": [{"path": "checked", "split": "dev"}, {"path": "rest"}]},
            },
            r"dev_fraction 0.05 would put rows of rest among the trusted pairs, unchecked: set prompts.dev_fraction: 0",
        ),
    ],
)
def test_what_weights_and_target_cannot_be_is_refused_before_the_run(changes, why):
    with pytest.raises(ValueError, match=why):
        RunConfig.model_validate(config().model_dump(mode="json", exclude_unset=True) | changes)


def test_it_starts_without_loading_what_loads_models():
    """Scores of stored sketches in seconds: transformers alone takes five."""
    code = "import sys, stages.conflict.stage, stages.compare.rescore; assert not {'transformers', 'trl', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
