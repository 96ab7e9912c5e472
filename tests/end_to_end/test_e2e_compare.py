"""compare on a run of imported pairs: the stages' own answer, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from pipeline import Run
from schemas.errors import UserError
from tests.faults.inline import InlineExecutor


@pytest.fixture
def run(imported_run: Path) -> Path:
    return imported_run


def _state(run) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*") if path.is_file()}


def test_an_arm_of_other_conflict_settings_selects_what_a_run_with_them_selects(run, inline_command, tmp_path) -> None:
    before = _state(run)
    done = inline_command(
        "compare", str(run), "--arm", "other: conflict.surgery=mean select.keep=0.4", "--arm", "random", "--json",
        "--examples", "1000",
    )  # fmt: skip
    assert _state(run) == before
    own, other, random = json.loads(done.stdout)["arms"]
    assert own["kept"] == random["kept"] != other["kept"]
    changed = ("--set", "conflict.surgery=mean", "--set", "select.keep=0.4", "--set", "name=copy")
    inline_command("fork", str(run), str(tmp_path / "copy"), *changed[:4])
    inline_command("run", str(tmp_path / "copy" / "run.yaml"), "--until", "select", "--run-dir", str(tmp_path))
    kept = {
        name: set(pl.read_parquet(folder / "round-0" / "curated" / "*.parquet")["pair_id"])
        for name, folder in {"own": run, "other": tmp_path / "copy"}.items()
    }
    assert (own["kept"], other["kept"]) == (len(kept["own"]), len(kept["other"]))
    assert other["overlap"]["this run"] == len(kept["own"] & kept["other"]) / len(kept["other"])
    assert {pair["pair_id"] for pair in other["examples"]} <= kept["other"] - kept["own"]


def test_what_the_run_has_not_stored_is_refused_by_name(run, inline_command) -> None:
    for arm, said in {
        "gradients.sketch.dim=128": "gradients.sketch.dim is no setting of select or conflict",
        "conflict": "selects as the run itself does",
        "random train.learning_rate=0.1": "train.learning_rate is no setting of select or conflict",
        "select.kep=0.1": "did you mean 'keep'",
        "margn": "There is no filter 'margn'",
        "smallest_gap": "The arm 'smallest_gap' cannot be compared: select.by: smallest_gap goes by implicit rewards",
        "conflict.target=dev": "conflict.target is the same in all arms",
    }.items():
        done = inline_command("compare", str(run), "--arm", arm, check=False)
        assert done.exit_code == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_scores_that_are_gone_are_made_once_for_all_arms_and_the_cause_is_named(run, inline_command, tmp_path) -> None:
    """`margin` is left out on the way, since these pairs have no judge scores."""
    inline_command("fork", str(run), str(tmp_path / "copy"))
    (part,) = (tmp_path / "copy" / "round-0" / "scores").glob("*.parquet")
    part.unlink()
    done = inline_command("compare", str(tmp_path / "copy"), "--examples", "0")
    said = " ".join(done.output.split())
    assert said.count("scored anew") == 1 and "margin is left out" in said and "kept by no other" in said
    lost = f"waits for conflict, since round-0/scores/{part.name} is gone or cut short"
    assert lost in " ".join(inline_command("inspect", str(tmp_path / "copy"), "curated").stdout.split())
    refused = inline_command("export", str(tmp_path / "copy"), check=False)
    assert lost in refused.stderr and "other settings" not in refused.stderr


def test_what_is_trained_on_is_read_with_its_hash(run, inline_command, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("os.link", lambda *_, **__: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    inline_command("fork", str(run), str(tmp_path / "copy"))
    assert Run(tmp_path / "copy").curated().num_rows
    (part,) = (tmp_path / "copy" / "round-0" / "curated").glob("*.parquet")
    whole = bytearray(part.read_bytes())
    whole[len(whole) // 2] ^= 255
    part.write_bytes(whole)
    with pytest.raises(UserError, match="no longer what was written"):
        Run(tmp_path / "copy").curated()


def test_what_all_arms_are_scored_without_is_said_once(run, inline_command) -> None:
    arms = ("conflict.relevance.off_topic_cost=2", "conflict.relevance.off_topic_cost=4")
    done = inline_command("compare", str(run), "--examples", "0", *(w for arm in arms for w in ("--arm", arm)))
    said = " ".join(done.output.split())
    assert said.count("scored anew") == 2 and said.count("en: no gate against off-topic chosen answers") == 1


def test_the_table_and_the_report_show_the_arms(run, inline_command) -> None:
    done = inline_command(
        "compare",
        str(run),
        "--examples",
        "0",
        *(w for n in range(7) for w in ("--arm", f"{n}: random select.keep=0.{n + 1}")),
    )
    table = done.stdout.split("\n\n", 1)[1]
    assert "kept by no other" in table
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Other selections" in page and "kept by no other" in page


def test_trained_arms_are_runs_at_equal_steps_and_a_second_call_repeats_nothing(run, inline_command, tmp_path) -> None:
    command = ("compare", str(run), "--train", "random", "--seeds", "2", "--out", str(tmp_path / "trained"), "--json")
    done = json.loads(inline_command(*command).stdout)
    assert (done["steps"], done["forgetting_steps"], done["objectives"]) == (2, 0, 0)
    assert [one["seed"] for one in done["runs"]] == [0, 1]
    kept = [set(pl.read_parquet(Path(one["run"]) / "round-0/curated/*.parquet")["pair_id"]) for one in done["runs"]]
    assert len(kept[0]) == len(kept[1]) and kept[0] != kept[1]  # drawn anew with every seed
    accuracy = [one for one in done["figures"] if one["metric"] == "accuracy" and one["language"] == "all"]
    assert {one["arm"] for one in accuracy} == {"random", "untrained"} and all(one["n"] > 0 for one in accuracy)
    assert all(one["seeds"] == 2 for one in accuracy)
    computed = len(InlineExecutor.computed)
    assert {title for title, _ in InlineExecutor.computed} == {"select", "train", "evaluate"}  # no gradient again
    again = inline_command(*command)
    assert json.loads(again.stdout)["figures"] == done["figures"] and len(InlineExecutor.computed) == computed
    for name in ("table.md", "table.tex", "evaluation.csv", "comparison.html", "evaluation.parquet"):
        assert (tmp_path / "trained" / name).stat().st_size
