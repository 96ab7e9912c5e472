"""Trained selections: what is planned, and the tables that are printed."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
import pytest

from pipeline import trials as trials_module
from pipeline.arms import arm_of
from pipeline.config_file import load_config
from pipeline.console import Display
from pipeline.paper_table import latex, markdown
from pipeline.trials import UNTRAINED, Trials, _fewest, planned, trained
from pipeline.trials_view import paper_table, write_tables
from schemas.errors import UserError
from stages.compare.seeds import over_seeds
from stages.train.batches import plan_batches

HOSTILE = "a|b & 50% <script>_x</script>"


def test_every_seed_has_every_arm_with_equal_steps_and_folders_of_their_own(write_config, tmp_path: Path) -> None:
    arms = [arm_of(text) for text in ("conflict", "random", "a/b: select.keep=0.3", "a?b: select.keep=0.4")]
    own = [load_config(write_config(train={"batch_size": 8}), arm.settings) for arm in arms]
    trials = planned(tmp_path, arms, own, 3, 17 * 8)
    assert len({trial.folder for trial in trials}) == 12
    assert all({f"train.seed={t.seed}", "train.max_steps=17"} <= set(t.settings) for t in trials)
    drawn = {t.arm.name: [s for s in t.settings if s.startswith("select.seed")] for t in trials if t.seed == 2}
    assert drawn == {"conflict": [], "random": ["select.seed=2"], "a/b": [], "a?b": []}
    assert len(set(trials_module._folders([arm_of(f"{name}: all") for name in ("a-b-3", "a-b", "a b", "a/b")]))) == 4
    for trial in trials:  # every one is a config that can be run
        load_config(write_config(), [*trial.settings, f'name="{trial.folder.name}"'])


@pytest.mark.parametrize(
    ("allo", "parts"),
    [
        ({"mask": "none"}, {"train.max_steps": 5}),
        ({"mask": "warmup"}, {"train.max_steps": 5, "train.allo.forget_max_steps": 5}),
        ({"mask": "warmup", "forget_epochs": 2.0}, {"train.max_steps": 5, "train.allo.forget_max_steps": 10}),
        ({"mask": "gradient", "forget": False}, {"train.max_steps": 5}),
        ({"mask": "gradient", "learn": False}, {"train.allo.forget_max_steps": 5}),
    ],
)
def test_every_part_of_a_training_has_its_steps(
    allo: dict, parts: dict[str, int], write_config, tmp_path: Path
) -> None:
    """Forgetting goes over each selection's own pairs otherwise, and `learn: false` takes no train.max_steps."""
    path = write_config(train={"batch_size": 8, "method": "full", "allo": allo})
    arm = arm_of("random")
    (trial,) = planned(tmp_path, [arm], [load_config(path, arm.settings)], 1, 40)
    told = dict(setting.split("=") for setting in trial.settings)
    assert {key: int(value) for key, value in told.items() if key.endswith("max_steps")} == parts
    load_config(path, trial.settings)


def test_how_long_trainings_are_is_said_of_every_part(tmp_path: Path) -> None:
    assert Trials(tmp_path, 8, [], pl.DataFrame()).length == "8 steps"
    assert Trials(tmp_path, 8, [], pl.DataFrame(), 2, 5).length == (
        "5 steps of forgetting and 8 steps of learning for each of 2 objectives"
    )
    assert Trials(tmp_path, 0, [], pl.DataFrame(), forgetting=5).length == "5 steps of forgetting"


def figures_of(ours: tuple[float, float]) -> pl.DataFrame:
    values = {UNTRAINED: (0.95, 0.95), "ours": ours, HOSTILE: (0.6, 0.601)}
    keys = {"split": "test", "metric": "accuracy", "n": 40}
    return over_seeds(
        pl.DataFrame(
            {"arm": arm, "seed": seed, "language": language, "value": value} | keys
            for arm, seeds in values.items()
            for seed, value in enumerate(seeds)
            for language in ("all", "en")
        )
    )


@pytest.mark.parametrize(
    "arms", [["random", "random"], ["x: select.keep=0.3", "x: select.keep=0.5"], [f"{UNTRAINED}: random"]]
)
def test_no_two_selections_share_a_name_and_none_is_the_untrained_model(arms, write_config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(write_config(), tmp_path / "run" / "run.yaml")
    with pytest.raises(UserError, match=r"Two arms are called|before training"):
        trained(tmp_path / "run", arms, 1, None, Display(quiet=True))


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("long: conflict train.epochs=3", "train.epochs"),
        ("conflict train.max_steps=9", "train.max_steps"),
        ("conflict train.seed=9 train.batch_size=8", "train.seed, train.batch_size"),
        ("random select.seed=9", "select.seed"),
        ("conflict rounds=2", "rounds"),
        ("conflict train.method=full train.allo.mask=warmup train.allo.forget_epochs=3", "train.allo.forget_epochs"),
        ("long: conflict 'train={epochs: 3}'", "train.epochs"),
        (
            "two: conflict 'train.orthalign.objectives=[{name: a, where: round = 0}, {name: b, where: round = 1}]'",
            "the number of train.orthalign.objectives",
        ),
    ],
)
def test_what_is_the_same_for_all_is_refused_of_an_arm(arm, said, write_config, tmp_path, monkeypatch) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(write_config(), tmp_path / "run" / "run.yaml")
    monkeypatch.setattr(trials_module, "_fewest", lambda *_: pytest.fail("refused before anything is looked at"))
    with pytest.raises(UserError, match=f"sets what is the same for all that are trained: {said} [(]--arm"):
        trained(tmp_path / "run", ["margin", arm], 1, None, Display(quiet=True))


def test_an_arm_that_cannot_be_read_is_named(write_config, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(write_config(), tmp_path / "run" / "run.yaml")
    with pytest.raises(UserError, match=r"The arm 'half' cannot be compared: .*kep"):
        trained(tmp_path / "run", ["margin", "half: margin select.kep=0.5"], 1, None, Display(quiet=True))


@pytest.mark.parametrize(
    ("train", "counts", "pairs"),
    [
        ({"epochs": 1.0}, [{"": 500}, {"": 430}], 430),
        ({"epochs": 1.5}, [{"": 33}], 33),  # half an epoch of two steps, not of one and a bit
        ({"epochs": 2.0}, [{"a": 90, "b": 40}, {"a": 50, "b": 80}], 40),
        ({"max_steps": 7}, [{"a": 90, "b": 40}], 40),
    ],
)
def test_every_training_has_the_steps_of_the_one_with_the_fewest_pairs(
    train, counts, pairs, write_config, tmp_path, monkeypatch
) -> None:
    config = load_config(write_config(train={"batch_size": 32, **train}))
    monkeypatch.setattr(trials_module, "trained_alone", lambda *_: counts)
    fewest = _fewest(tmp_path, [], Display(quiet=True))
    (trial,) = planned(tmp_path, [arm_of("conflict")], [config], 1, fewest)
    assert f"train.max_steps={plan_batches(pairs, config.train).steps}" in trial.settings


def test_the_steps_of_a_sequence_are_of_each_objective(tmp_path: Path) -> None:
    rows = pl.DataFrame({"arm": ["a"], "seed": [0], "split": ["test"], "language": ["all"], "metric": ["accuracy"], "value": [0.5], "n": [4]})  # fmt: skip
    write_tables(Trials(tmp_path, 1200, [], rows, objectives=2))
    assert "Trainings of 1,200 steps for each of 2 objectives." in (tmp_path / "table.md").read_text(encoding="utf-8")


@pytest.fixture
def figures() -> pl.DataFrame:
    return figures_of((0.81, 0.8))


def test_the_table_has_a_row_an_arm_and_marks_the_one_that_is_above_all_trained_ones(figures: pl.DataFrame) -> None:
    table = paper_table(figures)
    assert table.columns == [("test", "Preference accuracy")]
    assert [(arm, cells[0][1]) for arm, cells in table.rows] == [(UNTRAINED, False), ("ours", True), (HOSTILE, False)]
    assert table.rows[1][1][0][0] == "0.805 ± 0.064"  # t = 12.706, standard error 0.005


def test_nothing_is_called_better_inside_its_interval() -> None:
    table = paper_table(figures_of((0.9, 0.7)))
    assert [(cells[0][1]) for _, cells in table.rows] == [False, False, False]
    assert table.rows[1][1][0][0].startswith("0.800 ± 1.27")


def test_an_arm_with_the_same_figure_at_every_seed_has_no_interval_and_is_not_beaten() -> None:
    table = paper_table(figures_of((0.8, 0.8)))
    assert [cells[0] for _, cells in table.rows][:2] == [("0.950", False), ("0.800", False)]


def test_no_name_breaks_out_of_a_table(figures: pl.DataFrame, tmp_path: Path) -> None:
    table = paper_table(figures)
    assert markdown(table).count("|") - markdown(table).count("\\|") == 3 * 5
    text = latex(table)
    assert (
        r"a|b \& 50\% <script>\_x</script>" in text and text.count(r"\\") == 4 and r"\textbf{0.805 $\pm$ 0.064}" in text
    )
    rows = pl.DataFrame({"arm": [HOSTILE], "seed": [0], "split": ["test"], "language": ["all"], "metric": ["accuracy"], "value": [0.5], "n": [4]})  # fmt: skip
    paths = write_tables(Trials(tmp_path, 3, [], rows))
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert all(path.exists() for path in paths) and "<script" not in page and "&lt;script" in page
