"""docs/python.md and docs/curate.ipynb: every example runs, on a run of imported pairs with the tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pipeline
from pipeline import Run, load_config
from schemas.errors import UserError
from tests.end_to_end.conftest import imported_config

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, inline_stages: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the examples, with mine.yaml and data whose errors are known."""
    monkeypatch.chdir(tmp_path)
    config = imported_config(tmp_path, tiny_model) | {"run_dir": "runs"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return tmp_path


def test_the_examples_of_the_page_run(folder: Path) -> None:
    pipeline.run("mine.yaml", until="select", quiet=True)
    examples = re.findall(r"^```python\n(.*?)^```", (DOCS / "python.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(examples) >= 9
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), names)  # noqa: S102
    assert {"mine", "found", "curated", "why", "less"} <= set(names)
    mine = names["mine"]
    assert isinstance(mine, Run)
    assert (
        mine.curated().column_names[:2] == ["pair_id", "prompt_id"]
        and len(mine.curated()) == names["found"].arms[0].kept
    )  # type: ignore[attr-defined]
    assert [(one.kind, one.total) for one in mine.known_errors()] and mine.states["select"] == "done"
    with pytest.raises(ValueError, match="settings go with the path"):
        pipeline.run(load_config(Path("mine.yaml")), settings=["select.keep=0.1"])


def test_before_pairs_are_selected_there_is_nothing_to_say_of_known_errors(folder: Path) -> None:
    pipeline.run("mine.yaml", until="pairs", quiet=True)
    assert Run("runs/mine").known_errors() == []


def test_a_run_that_was_made_and_then_moved_or_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons count known errors; the run's own config goes on where the run lies now; a damaged file is named by all that read it."""
    pipeline.run("mine.yaml", until="select", quiet=True)
    mine = Run("runs/mine")
    found = mine.compare("random", "all")
    (known,) = mine.known_errors()
    assert found.errors == {known.kind: known.total - known.before}
    assert {arm.name: arm.errors[known.kind] for arm in found.arms} | {"random": 0} == {
        "this run": known.kept,
        "all": found.errors[known.kind],
        "random": 0,
    }
    with pytest.raises(UserError, match=r"run\(…, force=\['gradients'\]\)"):
        pipeline.run("mine.yaml", settings=["gradients.sketch.seed=7"], until="select", quiet=True)

    (folder / "elsewhere").mkdir()
    (folder / "runs/mine").rename(folder / "elsewhere/moved")
    again = pipeline.run("elsewhere/moved/run.yaml", until="select", quiet=True)
    assert again.folder.resolve() == (folder / "elsewhere/moved").resolve() and not (folder / "runs/mine").exists()
    assert again.states["select"] == "done"

    scores = folder / "elsewhere/moved/round-0/scores/part-00000.parquet"
    scores.write_bytes(bytes(scores.stat().st_size))
    pair_id = again.curated()[0]["pair_id"]
    for read in (lambda: again.compare("random"), lambda: again.explain(pair_id), lambda: again.report("random")):
        with pytest.raises(UserError, match="part of scores is no longer what was written") as error:
            read()
        assert Path(error.value.where).resolve() == scores.resolve()


def test_the_example_of_own_pairs_runs(folder: Path) -> None:
    pipeline.run("mine.yaml", until="select", quiet=True)
    text = (DOCS / "own-pairs.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(from pipeline import.*?)^```", text, re.M | re.S)
    names: dict[str, object] = {}
    exec(compile(example, "docs/own-pairs.md", "exec"), names)  # noqa: S102
    assert 0 < len(names["curated"]) < names["scores"].height  # type: ignore[arg-type, attr-defined]


def test_the_notebook_runs_from_its_first_cell_to_its_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIRS", "pairs.jsonl")
    monkeypatch.setenv("MODEL", str(load_config(folder / "mine.yaml").model.policy))
    notebook = json.loads((DOCS / "curate.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), "docs/curate.ipynb", "exec"), names)  # noqa: S102
    assert len(names["strict"].curated()) < len(names["mine"].curated())  # type: ignore[attr-defined]
    assert (folder / "runs" / "notebook" / "report.html").exists()
    assert names["lowest"]["score"].null_count() == 0  # type: ignore[attr-defined]


def test_a_run_in_another_folder_under_any_name_is_that_run(
    folder: Path, inline_command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renamed to what is no run's name, copied, and opened before the working folder changed."""
    mine = pipeline.run("mine.yaml", until="select", quiet=True)
    for name in ("my run", "Köln", "a$b/copy"):
        there = folder / "elsewhere" / name
        shutil.copytree(mine.folder, there)
        monkeypatch.chdir(there.parent)
        pipeline.run(load_config(f"{there.name}/run.yaml", ["select.keep=0.25"]), until="select", quiet=True)
        copied = Run(there.name)
        assert copied.config.select.keep == 0.25 and copied.states["select"] == "done"
        assert len(copied.curated()) < len(mine.curated()) and mine.config.select.keep == 0.5
        inline_command("status", there.name)
    assert mine.states["select"] == "done"


def test_what_is_no_number_or_text_of_the_kind_is_refused(folder: Path) -> None:
    mine = pipeline.run("mine.yaml", until="select", quiet=True)
    with pytest.raises(ValueError, match="neighbours is a number of 0 or more, and -3 was given"):
        mine.explain("1", neighbours=-3)
    with pytest.raises(ValueError, match="examples"):
        mine.compare("random", examples=-1)
    with pytest.raises(TypeError, match="an arm is a text"):
        mine.compare(["random"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"force=\['select'\]"):
        pipeline.run("mine.yaml", force="select", quiet=True)


def test_a_script_that_guards_nothing_runs_once(tmp_path: Path, tiny_model: Path) -> None:
    """Workers are processes of their own, and would run the script again."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(imported_config(tmp_path, tiny_model)), encoding="utf-8")
    script = "from pipeline import run\nprint('begins', flush=True)\nprint(run('mine.yaml', until='pairs', quiet=True).states['pairs'])\n"
    (tmp_path / "plain.py").write_text(script, encoding="utf-8")
    root = str(Path(pipeline.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "plain.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.stdout.split() == ["begins", "done"], done.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, pipeline; from pipeline import load_config; print([n for n in ('torch', 'polars', 'datasets', 'rich') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = pipeline.runn  # type: ignore[attr-defined]
