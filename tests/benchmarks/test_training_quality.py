"""The training benchmark's machinery: cells are made once, by the train stage; what is missing says so; baselines are what they are called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.quality import congrad, merging, plot, tables
from benchmarks.quality.congrad import damage
from benchmarks.quality.corpus import LANGUAGES, OBJECTIVES, Questions, preference_rows, running_text
from benchmarks.quality.measure import Measure
from benchmarks.quality.methods import Bench
from benchmarks.quality.results import Cell, Results, markdown
from benchmarks.quality.training import Average, averaged, extend, projected_gradients, weights_of
from benchmarks.quality.world import Size, World, own_world
from stages.train.optimizers import Protected

SMALL = Size(hidden=16, layers=1, vocabulary=320, pretraining=2, tuning=2, questions=(2, 2, 1), steps=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield own_world(tmp_path_factory.mktemp("work"), 0, SMALL, lambda line: None)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def bench(world: World, tmp_path: Path) -> Bench:
    return Bench(world, Measure(world), tmp_path)


def test_a_cell_is_filled_once_and_a_missing_one_prints_as_missing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tables.TABLES["omo"]
    two = [method for method in table.methods if method.name in (tables.UNTOUCHED, "anchor, alpha 0.03")]
    monkeypatch.setitem(tables.TABLES, "omo", replace(table, methods=two))
    results, said = Results(tmp_path / "results"), list[str]()
    asked = [0]

    def here() -> World:
        asked[0] += 1
        return world

    tables.fill("omo", results, "key", here, 0, tables.UNTOUCHED, said.append)
    first = tables.printed("omo", results, "key", [0, 1])
    anchor = next(line for line in first.splitlines() if line.startswith("| anchor"))
    assert anchor.count("missing") == len(table.columns)
    assert "| 1 of 2 |" in first
    tables.fill("omo", results, "key", here, 0, "", said.append)
    assert "missing" not in tables.printed("omo", results, "key", [0])
    assert tables.printed("omo", results, "another key", [0]).count("missing") == 2 * len(table.columns)
    assert len(said) == 2 and asked[0] == 2
    tables.fill("omo", results, "key", here, 0, "", said.append)
    assert len(said) == 2 and asked[0] == 2  # nothing is left to do: not even the world is made
    svg = plot.frontier(tables.collected("omo", results, "key", [0]), table.columns)
    circles = [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("circle")]
    assert len([e for e in circles if len(e)]) == 2


def test_rows_are_whole_or_not_there(tmp_path: Path) -> None:
    results = Results(tmp_path)
    cell = Cell("omo", "AdamW", 3, "identity")
    assert results.read(cell) is None
    results.write(cell, {"b": 2.0, "a": 1.0}, 0.5)
    assert results.read(cell) == {"a": 1.0, "b": 2.0}
    assert results.read(replace(cell, identity="other")) is None
    assert [path.suffix for path in tmp_path.iterdir()] == [".parquet"]
    assert results.frame().select("table", "method", "seed").unique().rows() == [("omo", "AdamW", 3)]


def test_spread_is_shown() -> None:
    text = markdown({"m": [{"x": 1.0}, {"x": 2.0}, None], "none": [None] * 3}, {"x": lambda values: values["x"]})
    assert "| m | 2 of 3 | 1.500 (1.000..2.000) |" in text
    assert "| none | 0 of 3 | missing |" in text
    assert "| m | 1 of 1 | – |" in markdown({"m": [{}]}, {"x": lambda values: float("nan")})


def test_held_out_questions_and_texts_are_not_trained_on() -> None:
    questions = Questions.draw(0, 3, 3, 3)
    train, test = (preference_rows(questions, split, 0) for split in ("train", "test"))
    assert not {(row["prompt"], row["language"]) for row in train} & {(row["prompt"], row["language"]) for row in test}
    assert {row["objective"] for row in test} == set(OBJECTIVES) and {row["language"] for row in test} == set(LANGUAGES)
    assert not set(running_text(True)) & set(running_text(False))


def test_the_right_share_of_labels_is_flipped_in_every_language() -> None:
    rows = preference_rows(Questions.draw(0, 2, 5, 1), "train", 0)
    flipped, hit = damage(rows, 0.3, 0)
    for n, (row, other) in enumerate(zip(rows, flipped, strict=True)):
        sides = (row["rejected"], row["chosen"]) if n in hit else (row["chosen"], row["rejected"])
        assert (other["chosen"], other["rejected"]) == sides
    assert len(hit) / len(rows) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("name", ["_SKETCH", "_CONFLICT"])
def test_scores_of_an_interrupted_run_are_not_taken_up_with_other_settings(name, monkeypatch) -> None:
    before = congrad.scores_name(0.3)
    assert congrad.scores_name(0.3) == before != congrad.scores_name(0.2)
    monkeypatch.setattr(congrad, name, {**getattr(congrad, name), "seed": 1})
    assert congrad.scores_name(0.3) != before


def test_every_method_gives_every_column(bench: Bench) -> None:
    """One line of each kind; the cheap way to see that a table can be filled."""
    wanted = {
        "omo": ("offline TIES, SFT share 0.5",),
        "orthalign-two": ("OrthAlign, left",),
        "congrad": ("OnDARE, curated half",),
    }
    start = bench.measure(bench.world.sft)
    assert start["reward/helpful"] == 0.5
    for name, chosen in wanted.items():
        methods = {method.name: method for method in tables.TABLES[name].methods}
        for method in (methods[line] for line in chosen):
            settings = {**method.settings} | ({"q_max": 4} if "q_max" in method.settings else {})
            values = method.run(bench, settings)
            for title, column in tables.TABLES[name].columns.items():
                assert column(values, start) == column(values, start), (method.name, title)  # a number


def test_averages_and_projected_gradients_follow_the_train_stage(bench: Bench) -> None:
    averages: Average = {}
    trained = bench.train("average", ("helpful",), hooks=averaged(0.5, averages), max_steps=1)
    for name, weight in weights_of(trained.model).items():
        assert torch.allclose(averages[name], weight, atol=1e-6), name  # of one step: that step's weights
    protected = extend(Protected.none(), bench.world.sft, trained.model, q_max=2)
    hooked = bench.train("hooked", ("helpful",), hooks=projected_gradients(protected))
    free = bench.train("free", ("helpful",))
    start = weights_of(bench.world.sft)

    def leaks(after: dict[str, torch.Tensor]) -> float:
        return max(protected.leak(name, after[name] - start[name]) for name in protected.left)

    assert 1e-4 < leaks(weights_of(hooked.model)) < leaks(weights_of(free.model))  # Adam brings some of it back


def test_offline_merges_at_their_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    base, sft, trained = ({"w": torch.randn(8, 8, generator=generator)} for _ in range(3))
    assert torch.allclose(merging.linear(sft, trained, 1.0)["w"], sft["w"])
    assert torch.allclose(merging.dare(base, sft, trained, 0.0, 1.0, 0)["w"], trained["w"], atol=1e-6)
    assert torch.allclose(merging.ties(base, sft, trained, 0.0, 1.0)["w"], trained["w"], atol=1e-6)
    merged = merging.ties(base, sft, trained, 0.5, 1.0)["w"] - base["w"]
    s, t = sft["w"] - base["w"], trained["w"] - base["w"]
    agree = s.sign() == t.sign()
    assert torch.allclose(merged[agree], ((s + t) / 2)[agree], atol=1e-6)
    larger = torch.where(s.abs() > t.abs(), s, t)
    assert torch.allclose(merged[~agree], larger[~agree], atol=1e-6)
