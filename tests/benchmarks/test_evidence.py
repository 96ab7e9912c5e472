"""The studies on real answers: pairs are what they are called, and what is not there is called missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from benchmarks.evidence import few, page
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.answers import CONTRASTS, Answers, Pool, cut
from benchmarks.evidence.arms import METHODS, SEEN, SEQUENCE, UNSEEN
from benchmarks.evidence.gain import held_out_gain, tax_gain
from benchmarks.evidence.methods import TAXED, TUNED, TUTOR, Study, methods
from benchmarks.evidence.predict import DECILE, RANDOM, drawn
from benchmarks.evidence.training import Setup
from benchmarks.evidence.trusted import with_trusted
from benchmarks.planted.damage import DamagedSet
from benchmarks.planted.sketches import Sketches
from benchmarks.quality.results import Cell, Results
from benchmarks.quality.world import Size, own_world

POOL = Pool(("de", "fr"), 4, strong="good", weak="poor", words=30)


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    rows = [
        {
            "id": id_,
            "language": code,
            "prompt": f"question {id_} {code}",
            "model": model,
            "answer": f"{model} {id_} {code} " + "word " * (20 + id_),
        }
        for id_ in range(20)
        for code in ("de", "fr", "en")
        for model in ("good", "poor")
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "answers.parquet")
    return Answers.read(tmp_path / "answers.parquet")


def test_damage_comes_from_prompts_that_no_pair_is_about(answers: Answers) -> None:
    made = POOL.pairs(answers)
    asked = {row["kind"] for row in made["real"]}
    for contrast in CONTRASTS:
        assert [row["prompt"] for row in made[contrast]] == [row["prompt"] for row in made["real"]]
    for real, easy, language in zip(*(made[contrast] for contrast in CONTRASTS), strict=True):
        good, poor = real["chosen"].split(), real["rejected"].split()
        assert good[:3] == ["good", real["kind"], real["language"]] and poor[:3] == [
            "poor",
            real["kind"],
            real["language"],
        ]
        assert len(good) == len(poor) <= POOL.words
        assert easy["rejected"].split()[1] not in asked and easy["rejected"].split()[2] == real["language"]
        assert (
            language["rejected"].split()[:2] == ["good", real["kind"]]
            and language["rejected"].split()[2] != real["language"]
        )
    held_out = POOL.held_out(answers, ("fr", "en"), 5)
    used = asked | {row["rejected"].split()[1] for row in made["easy"]}
    assert len(held_out) == 10 and not used & {row["group_id"] for row in held_out}


def test_many_held_out_pairs_are_of_short_prompts_first_and_rows_of_another_table(answers: Answers) -> None:
    long = {id_ for id_, _ in answers.prompts if int(id_) % 2}
    prompts = {key: text + " word" * POOL.words * (key[0] in long) for key, text in answers.prompts.items()}
    one, pool = replace(answers, prompts=prompts), replace(POOL, count=3)
    few, many = ([row["group_id"] for row in pool.held_out(one, ("fr", "en"), count)[::2]] for count in (4, 10))
    assert few == many[:4] and not set(few) & long and set(many) & long
    setup = Setup(Path(), Path(), "model", pool, 3, seen=("de", "fr", "es"), unseen=("en", "ru"))
    large = replace(setup, split=400)
    assert (setup.count(setup.seen), large.count(large.seen), large.count(large.unseen)) == (40, 134, 200)
    cells = (
        setup.cell("undamaged", "all", 0),
        large.cell("undamaged", "all", 0),
        replace(large, split=300).cell("undamaged", "all", 0),
    )
    assert [cell.table for cell in cells] == ["training", "training, 400 held out", "training, 300 held out"]
    assert len({cell.identity for cell in cells}) == 3


def test_methods_are_tuned_on_prompts_that_nothing_else_is_about() -> None:
    languages, pool = (*SEEN, *UNSEEN), Pool((*SEEN, "ru"), 4, strong="good", weak="poor", words=30)
    texts = {
        (f"{id_}", code, model): f"{model} {id_} {code} " + "word " * (20 + id_ % 7)
        for id_ in range(120)
        for code in languages
        for model in ("good", "poor", TUTOR)
    }
    answers = Answers({(id_, code): f"question {id_} {code}" for id_, code, _ in texts}, texts)
    study = Study(Path(), "model", pool, held_out=5)
    tuned, taxed = study.tuning(answers)
    held_out, made = study.held_out_rows(answers), pool.pairs(answers)
    assert {len(turns) for turns in tuned.values()} == {TUNED} and set(tuned) == set(languages)
    assert len(taxed) == TAXED * len(languages)
    learnt = {turn.prompt.split()[1] for turns in tuned.values() for turn in turns}
    assert not learnt & {turn.prompt.split()[1] for turn in taxed}
    elsewhere = {row["group_id"] for rows in held_out.values() for row in rows} | {row["kind"] for row in made["real"]}
    assert not (learnt | {turn.prompt.split()[1] for turn in taxed}) & elsewhere
    assert [len(held_out[name]) for name in ("real", "language", "unseen")] == [15, 15, 10]
    for real, language in zip(held_out["real"], held_out["language"], strict=True):
        assert real["prompt"] == language["prompt"] and language["chosen"].split()[:3] == [
            "good",
            real["group_id"],
            real["language"],
        ]
        model, id_, code = language["rejected"].split()[:3]
        assert (model, id_) == ("good", real["group_id"]) and code != real["language"]
    with pytest.raises(ValueError, match="are needed"):
        replace(study, held_out=100).tuning(answers)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = Size(hidden=16, layers=1, vocabulary=320, pretraining=2, tuning=2, questions=(2, 2, 1), steps=2)
    yield own_world(tmp_path_factory.mktemp("work"), 0, small, lambda line: None).folder / "base"
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_methods_are_trained_from_a_model_that_the_sft_stage_made(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    languages = (*SEEN, *UNSEEN)
    rows = [
        {
            "id": id_,
            "language": code,
            "prompt": f"question {id_} {code}",
            "model": model,
            "answer": f"{model} {id_} {code} " + "word " * 20,
        }
        for id_ in range(20)
        for code in languages
        for model in ("good", "poor", TUTOR)
    ]
    data, said = tmp_path / "answers.parquet", list[str]()
    pl.DataFrame(rows).write_parquet(data)
    for name, value in (("TUNED", 2), ("TAXED", 1), ("SIZE", Size(steps=2, learning_rate=1e-2))):
        monkeypatch.setattr(f"benchmarks.evidence.methods.{name}", value)
    pool = Pool((*SEEN, "ru"), 2, strong="good", weak="poor", words=24)
    study, results = Study(tmp_path / "work", str(pretrained), pool, held_out=2), Results(tmp_path / "rows")
    only = ["AdamW", "offline", "OnDARE", "sequential", "OrthAlign"]
    assert study.fill(results, data, [0], only, said.append) == 0 and len(said) == 5
    found = {name: results.read(study.cell(method, 0)) for name, method in methods().items()}
    assert {name for name, values in found.items() if values is None} == {
        n for n in found if not any(o in n for o in only)
    }
    trained, merged = found["AdamW"], found["offline linear, SFT share 0.5"]
    assert trained["margin/real"] > merged["margin/real"] > 0  # half the way back to the model that training began from
    assert set(trained) >= {"reward/real", "reward/unseen", "reward/language", "tax/text", "tax/tuned"}
    assert {"own/real", "own/language"} <= set(found["OrthAlign, left"]) & set(found["sequential DPO"])
    assert study.fill(results, data, [0], only, said.append) == 0 and len(said) == 5


def test_a_method_is_a_cell_of_its_own() -> None:
    found, study = methods(), Study(Path(), "model", POOL)
    assert tuple(found) == METHODS + SEQUENCE
    assert len({study.cell(method, 0).identity for method in found.values()}) == len(found)
    assert study.cell(found["AdamW"], 0).identity != replace(study, held_out=41).cell(found["AdamW"], 0).identity


def test_too_few_prompts_are_refused(answers: Answers) -> None:
    with pytest.raises(ValueError, match="are needed"):
        Pool(("de", "fr"), 11, strong="good", weak="poor").pairs(answers)


def test_cut_answers_have_as_many_words() -> None:
    assert cut("a b c d", "e f", 3) == ("a b", "e f") and cut("a b c d", "e f g h", 3) == ("a b c", "e f g")


def test_the_deciles_of_a_language_are_all_its_pairs_in_the_order_of_their_score() -> None:
    own = list(range(1, 80, 2))
    score_N = [(7 * n % 83) / 83 for n in range(80)]
    best = sorted(own, key=lambda n: -score_N[n])
    for step in (0, 3, 9, 13):
        assert sorted(drawn(DECILE, step, own, score_N)) == sorted(best[4 * (step % 10) :][:4])
    assert len(drawn(DECILE, 0, own[:25], score_N)) == 2
    assert len(set(drawn(RANDOM, 0, own, score_N))) == 4 and set(drawn(RANDOM, 0, own, score_N)) <= set(own)


def test_trusted_pairs_are_intact_and_of_no_question_of_the_pool() -> None:
    languages, questions = ["de", "fr"], 10
    frame = pl.DataFrame(
        {"group_id": [f"q{n // 2}" for n in range(20)], "language": languages * questions, "pair_id": range(20)}
    )
    sketch_ND = torch.arange(1.0, 21.0)[:, None]
    intact = Sketches(frame, sketch_ND, languages)
    damaged = DamagedSet(frame, -sketch_ND, torch.ones(20, dtype=torch.bool), languages)
    both, trusted_N = with_trusted(damaged, intact, 3, seed=1)
    assert both.frame.height == 10 + 6 and both.frame["language"].to_list() == languages * 8
    assert both.damaged_N.tolist() == [True] * 10 + [False] * 6 == (~trusted_N).tolist()
    assert (both.sketch_ND[trusted_N] > 0).all() and (both.sketch_ND[~trusted_N] < 0).all()
    asked = both.frame["group_id"].to_list()
    assert not set(asked[:10]) & set(asked[10:])


def test_a_smaller_pool_has_the_same_questions_in_every_language_and_contrast() -> None:
    frame = pl.DataFrame({"group_id": [f"q{n // 2}" for n in range(20)], "language": ["de", "fr"] * 10})
    real, easy = (Sketches(frame, sign * torch.arange(1.0, 21.0)[:, None], ["de", "fr"]) for sign in (1, -1))
    some, other = few.drawn(real, 4, seed=1), few.drawn(easy, 4, seed=1)
    assert some.frame["language"].to_list() == ["de", "fr"] * 4
    assert set(some.frame.group_by("group_id").len()["len"]) == {2}
    assert torch.equal(some.sketch_ND, -other.sketch_ND) and some.frame.equals(other.frame)
    assert not torch.equal(some.sketch_ND, few.drawn(real, 4, seed=2).sketch_ND)
    assert few.drawn(real, 10, seed=1).frame.equals(frame)


def test_rows_of_other_settings_are_not_mixed_and_what_is_not_there_is_missing(tmp_path: Path, monkeypatch) -> None:
    results = Results(tmp_path / "rows")
    monkeypatch.setattr(page, "PAGE", tmp_path / "evidence.md")
    (tmp_path / "evidence.md").write_text(
        "".join(
            f"<!-- {n} -->\nold\n<!-- end -->\n"
            for n in (
                "auroc",
                "left",
                "trusted",
                "few",
                "predict",
                "deciles",
                "training",
                "gain",
                "training-split",
                "gain-split",
                "methods",
                "sequence",
            )
        )
    )
    method = f"{page.MODELS[0].rpartition(':')[2]}, flip 10%"
    for seed, identity, value in ((0, "now", 0.9), (1, "now", 0.7), (2, "then", 0.1)):
        results.write(Cell("real", method, seed, identity), {"auroc/ours": value, "left/ours": 0.05}, 1.0)
    page.write(results)
    text = (tmp_path / "evidence.md").read_text()
    assert f"| {method} | 2 | 0.80 | missing |" in text and f"| {method} | 2 | 5.0% |" in text
    assert "| 40% flips, curated | 0 | missing |" in text and "old" not in text
    assert "| AdamW | 0 | missing |" in text and "| OrthAlign, left | 0 | missing |" in text


@pytest.mark.parametrize("figure", ["reward_accuracy", "margin"])
def test_a_gain_is_of_the_same_seeds_and_its_interval_over_seeds_and_prompts(figure: str) -> None:
    rng = np.random.default_rng(0)
    gain_SAQL = rng.normal(size=(5, 2, 30, 2))  # seeds, arms, prompts, languages
    value_SAQL = gain_SAQL if figure == "margin" else (gain_SAQL > 0).astype(float)
    rows = [
        tuple(
            {"tax": gain_QL[0, 0], f"{figure}/seen": value_QL.mean()}
            | {f"gain/seen/{n:03d}": gain for n, gain in enumerate(gain_QL.flatten())}
            for gain_QL, value_QL in zip(gain_AQL, value_AQL, strict=True)
        )
        for gain_AQL, value_AQL in zip(gain_SAQL, value_SAQL, strict=True)
    ]
    less_SQ = (value_SAQL[:, 0] - value_SAQL[:, 1]).mean(axis=2)
    seeds = stats.t.ppf(0.975, 4) * stats.sem(less_SQ.mean(axis=1))
    prompts = stats.norm.ppf(0.975) * stats.sem(less_SQ.mean(axis=0))
    found, half = held_out_gain(rows, figure, "seen", 2), (seeds**2 + prompts**2) ** 0.5
    assert found.mean == pytest.approx(less_SQ.mean())
    assert (found.mean - found.low, found.high - found.mean) == pytest.approx((half, half), rel=1e-3)
    assert tax_gain(rows).mean == pytest.approx((gain_SAQL[:, 0, 0, 0] - gain_SAQL[:, 1, 0, 0]).mean())
    assert held_out_gain(rows[:1], figure, "seen", 2).low is None


def test_options_without_a_use_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["methods", "--work", str(tmp_path), "--data", "a.parquet", "--words", "9", "--split", "400"])
    assert "leave --words, --split out" in capsys.readouterr().err
