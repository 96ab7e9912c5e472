"""`table`: runs and comparisons become one table, with a base that is the same model, and nothing better inside its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline import paper
from pipeline.paper import Papers, form_of, gathered, table_of, written
from pipeline.paper_table import PaperTable, is_above, latex, markdown
from schemas.errors import UserError

KEYS = ["model", "split", "language", "metric", "value", "low", "high", "n"]


def run_rows(after: float, half: float, n: int = 40, before: float = 0.5) -> pl.DataFrame:
    rows = []
    for split, language in (("test", "all"), ("test", "de"), ("unseen", "all"), ("unseen", "it")):
        rows.append(("before", split, language, "accuracy", before, before - half, before + half, n))
        rows.append(("after", split, language, "accuracy", after, after - half, after + half, n))
        rows.append(("after vs before", split, language, "win_rate", after, after - half, after + half, n))
    rows.append(("before", "benchmark", "all", "benchmarks", 0.4, 0.3, 0.5, 80))
    rows.append(("after", "benchmark", "all", "benchmarks", 0.38, 0.28, 0.48, 80))
    rows.append(("after vs before", "benchmark", "all", "benchmarks_change", -0.02, -0.05, 0.01, 80))
    rows.append(("after", "dev", "all", "accuracy", 0.9, 0.8, 1.0, 9))
    return pl.DataFrame(rows, schema=KEYS, orient="row")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes folders with an evaluation table."""

    class Config:
        rounds = 2

    def make(name: str, rows: pl.DataFrame) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.yaml").touch()
        rows.write_parquet(folder / "rows.parquet")
        return str(folder)

    def tables(folder: Path, round_: int) -> dict[str, list[Path]]:
        return {"evaluation": [folder / "rows.parquet"]} if round_ == 0 and (folder / "rows.parquet").is_file() else {}

    monkeypatch.setattr(paper, "config_of", lambda folder: Config)
    monkeypatch.setattr(paper, "tables_of", tables)
    return make


def cells(papers: Papers, by_language: str | None = None) -> dict[str, dict[tuple[str, str], tuple[str, bool]]]:
    table = table_of(papers, by_language)
    return {method: dict(zip(table.columns, found, strict=True)) for method, found in table.rows}


def test_methods_stand_below_their_common_base_and_bold_is_above_every_interval(runs: Any) -> None:
    papers = gathered([runs("all", run_rows(0.6, 0.05)), f"ours={runs('mine', run_rows(0.8, 0.05))}"])
    found = cells(papers)
    assert list(found) == ["base", "all", "ours"]
    assert list(found["ours"]) == [
        ("seen", "Preference accuracy"),
        ("seen", "Win rate"),
        ("unseen", "Preference accuracy"),
        ("unseen", "Win rate"),
        ("tax", "Benchmarks, mean"),
        ("tax", "Benchmarks, change"),
    ]
    assert found["ours"]["seen", "Preference accuracy"] == ("0.800 [0.750, 0.850]", True)
    assert found["base"]["seen", "Preference accuracy"] == ("0.500 [0.450, 0.550]", False)
    assert found["base"]["seen", "Win rate"] == ("–", False)
    assert found["ours"]["tax", "Benchmarks, change"] == ("-0.020 [-0.050, 0.010]", False), "both lost the same"
    assert len(papers.notes) == 1


def test_nothing_is_bold_inside_an_interval(runs: Any) -> None:
    found = cells(gathered([runs("a", run_rows(0.6, 0.15)), runs("b", run_rows(0.8, 0.15))]))
    assert not any(bold for row in found.values() for _, bold in row.values())


def test_what_cannot_be_compared_is_said(runs: Any) -> None:
    papers = gathered([runs("a", run_rows(0.6, 0.05)), runs("b", run_rows(0.8, 0.05, n=30, before=0.6))])
    assert list(cells(papers)) == ["base of a", "base of b", "a", "b"]
    assert any("do not start from the same figures" in note for note in papers.notes)
    text = written(papers, "md")
    assert "seen, Preference accuracy: methods were measured on different numbers of items (30, 40)" in text
    assert "seen, de: methods were measured on different numbers of items (30, 40)" in written(papers, "md", "win_rate")


@pytest.mark.parametrize("first", ["few", "more"])
def test_the_base_has_what_any_run_measured_of_it(runs: Any, first: str) -> None:
    """In any order; and where a run measured nothing, another's figure stands."""
    every = run_rows(0.6, 0.05)
    few = every.filter(pl.col("metric") == "accuracy").with_columns(
        value=pl.when(pl.col("split") == "test").then(pl.col("value")),
        n=pl.when(pl.col("split") == "test").then(pl.col("n")).otherwise(0),
    )
    folders = {"few": runs("few", few), "more": runs("more", every)}
    papers = gathered([folders.pop(first), *folders.values()])
    base = cells(papers)["base"]
    assert base["tax", "Benchmarks, mean"] == ("0.400 [0.300, 0.500]", False)
    assert (
        base["seen", "Preference accuracy"] == base["unseen", "Preference accuracy"] == ("0.500 [0.450, 0.550]", False)
    )
    assert not papers.figures.select("method", "split", "language", "metric").is_duplicated().any()


def test_a_metric_has_a_column_a_language(runs: Any) -> None:
    papers = gathered([runs("a", run_rows(0.6, 0.05))])
    assert list(cells(papers, "win_rate")["a"]) == [
        ("seen", "de"),
        ("seen", "all"),
        ("unseen", "it"),
        ("unseen", "all"),
    ]
    with pytest.raises(UserError, match=r"No run measured 'bleu'.*accuracy"):
        table_of(papers, "bleu")


def test_a_comparison_gives_its_arms_with_means_over_seeds(tmp_path: Path) -> None:
    rows = [
        {"arm": arm, "seed": seed, "split": "test", "language": "all", "metric": "accuracy", "value": value, "n": 40}
        for arm, values in (("untrained", (0.5, 0.5)), ("conflict", (0.81, 0.8)), ("a & b", (0.6, 0.601)))
        for seed, value in enumerate(values)
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "evaluation.parquet")
    papers = gathered([str(tmp_path)])
    assert list(cells(papers)) == ["base", "conflict", "a & b"]
    assert cells(papers)["conflict"]["seen", "Preference accuracy"] == ("0.805 [0.741, 0.869]", True)
    tex = written(papers, "tex")
    assert r"a \& b" in tex and r"\textbf{0.805 [0.741, 0.869]}" in tex and tex.count(r"\\") == 4
    assert written(papers, "md").count("| base |") == 1
    csv = pl.read_csv(written(papers, "csv").encode())
    assert csv.columns == ["method", "split", "language", "metric", "value", "low", "high", "n"] and csv.height == 3


def test_two_comparisons_stand_in_one_table_under_their_names(tmp_path: Path) -> None:
    folders = []
    for folder, arms in (
        ("one", ("untrained", "conflict", "all")),
        ("two", ("untrained", "conflict", "all")),
        ("three", ("untrained", "all")),
    ):
        rows = [
            {"arm": arm, "seed": seed, "split": "test", "language": "all", "metric": "accuracy", "value": 0.5, "n": 40}
            for arm in arms
            for seed in range(2)
        ]
        (tmp_path / folder).mkdir()
        pl.DataFrame(rows).write_parquet(tmp_path / folder / "evaluation.parquet")
        folders.append(str(tmp_path / folder))
    papers = gathered([folders[0], f"SimPO={folders[1]}", f"IPO={folders[2]}"])
    assert list(cells(papers)) == ["base", "conflict", "all", "SimPO: conflict", "SimPO: all", "IPO"]
    with pytest.raises(UserError, match="Two methods are called 'conflict'"):
        gathered(folders[:2])


@pytest.mark.parametrize("there", [None, "run.yaml", "evaluation.parquet"])
def test_a_comparison_is_found_by_its_name_under_runs(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str | None
) -> None:
    """But what is at the path itself goes first."""
    row = {"seed": 0, "split": "test", "language": "all", "metric": "accuracy", "value": 0.5, "n": 40}
    (tmp_path / "runs/h-trained").mkdir(parents=True)
    pl.DataFrame([{"arm": "conflict", **row}]).write_parquet(tmp_path / "runs/h-trained/evaluation.parquet")
    monkeypatch.chdir(tmp_path)
    if there == "run.yaml":
        runs("h-trained", run_rows(0.6, 0.05))
    elif there:
        (tmp_path / "h-trained").mkdir()
        pl.DataFrame([{"arm": "nearer", **row}]).write_parquet(tmp_path / "h-trained" / there)
    methods = {None: ["conflict"], "run.yaml": ["base", "h-trained"], "evaluation.parquet": ["nearer"]}
    assert list(cells(gathered(["h-trained"]))) == methods[there]


def test_names_do_not_change_the_table_that_they_stand_in() -> None:
    figure = [("0.5 [0.4, 0.6]", False)]
    table = PaperTable([("seen", "x|y")], [("[2pt] a", figure), ("*", figure), ("a\\|b\nc", figure), ("a_b", figure)])
    lines = markdown(table).splitlines()
    assert lines[0] == "|  | seen: x&#124;y |"
    assert lines[4:] == ["| a&#92;&#124;b c | 0.5 [0.4, 0.6] |", "| a_b | 0.5 [0.4, 0.6] |"]
    rows = latex(table).splitlines()[4:8]
    assert rows[0].startswith("{}[2pt] a &") and rows[1].startswith("{}* &") and rows[3].startswith(r"a\_b &")


def test_wrong_command_lines_are_refused(runs: Any, tmp_path: Path) -> None:
    one = runs("a", run_rows(0.6, 0.05))
    with pytest.raises(UserError, match="Two methods are called 'a'"):
        gathered([one, f"a={one}"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.yaml").touch()
    with pytest.raises(UserError, match="has no evaluation"):
        gathered([str(tmp_path / "empty")])
    with pytest.raises(UserError, match=r"There is no run here.*evaluation\.parquet.*by its path or name"):
        gathered([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="There is no form 'pdf'"):
        form_of("pdf")


@pytest.mark.parametrize(
    ("metric", "bold"),
    [
        ("accuracy", True),
        ("accuracy_change", True),
        ("win_rate_self_judged_length_controlled", True),
        ("benchmarks_change", True),
        ("belebele_deu_Latn/acc", True),
        ("gsm8k/exact_match (strict-match)_change", True),
        ("repetition", False),
        ("truncated", False),
        ("logp_rejected", False),
        ("logp_rejected_change", False),
        ("wikitext/word_perplexity", False),
        ("wikitext/acc_stderr", False),
        ("judge_kappa", False),
    ],
)
def test_bold_is_of_metrics_that_are_known_to_be_better_when_more(metric: str, bold: bool) -> None:
    mine = {"metric": metric, "low": 0.5, "high": 0.6}
    assert is_above(mine, [{**mine, "low": 0.1, "high": 0.2}]) == bold
