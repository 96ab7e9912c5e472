"""status, inspect and export on a finished (fake) run directory."""

from __future__ import annotations

import errno
import io
import json
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import congrad
from pipeline.cli import app
from pipeline.commit import PartBuilder, commit, conform, withdraw
from pipeline.config_file import dump, load_config
from pipeline.console import printable
from pipeline.plan import Inputs, Planner
from pipeline.rundir import RunDir
from schemas.files import temporary_beside
from schemas.manifests import Tally
from schemas.sketches import sketch_array
from schemas.tables import TABLES
from stages.catalog import BY_NAME
from stages.contract import Drop

HOSTILE = "\x1b[2J\u202eevil\x07 <script>alert(1)</script>"


@pytest.fixture
def finished(tmp_path: Path, write_config) -> Path:
    """A run whose select stage is finished: two curated pairs, one rejected."""
    from pipeline.commit import write_manifest
    from pipeline.fingerprint import content_of
    from schemas.manifests import StageManifest

    config = load_config(write_config())
    rundir = RunDir(config.folder)
    rundir.config.parent.mkdir(parents=True)
    rundir.config.write_text(dump(config))
    spec = BY_NAME["select"]

    def pair(n: int, **more: object) -> dict:
        user, chosen, rejected = ({"role": r, "content": f"{HOSTILE} {n}"} for r in ("user", "assistant", "assistant"))
        return {
            "pair_id": f"p{n}", "prompt_id": f"q{n}", "group_id": f"g{n}", "language": "en" if n % 2 else "de",
            "prompt": [user], "chosen": [chosen], "rejected": [rejected],
            "chosen_score": 3.0, "rejected_score": 1.0, "conflict_score": n / 10, **more,
        }  # fmt: skip

    tables = {"curated": [pair(1), pair(2)], "rejected": [pair(3, reason="below_cut")]}
    drops = [Drop("pair", "p3", "en", "below_cut")]
    tallies = [
        Tally(unit="pair", language="de", rows_in=1, kept=1),
        Tally(unit="pair", language="en", rows_in=2, kept=1, dropped={"below_cut": 1}),
    ]
    planner = Planner(config, rundir, lambda s: {}, lambda s: {})
    step = next(s for s in planner.steps if s.spec.name == "select")
    plan = planner._cut(step, Inputs(), {"code": 1})
    write_manifest(rundir.state(spec, 0) / "plan.json", plan.model_dump())
    rundir.temporary.mkdir()
    builder = PartBuilder(rundir, spec, 0, 0, plan.fingerprint, rundir.temporary)
    for table, rows in tables.items():
        builder.write(table, pa.Table.from_pylist(rows, schema=TABLES[table].schema))
    prepared = builder.finish(tallies, drops, {}, 1.0)
    commit(rundir, spec, prepared)
    part = prepared.manifest
    manifest = StageManifest(
        stage="select",
        round=0,
        fingerprint=plan.fingerprint,
        content=content_of(part.files),
        files=part.files,
        tallies=tallies,
    )
    write_manifest(rundir.state(spec, 0) / "_stage.json", manifest.model_dump())
    return config.folder


def test_inspect_filters_and_neutralises_hostile_text(finished, monkeypatch):
    from pipeline import inspect

    manifest = RunDir(finished).stage(BY_NAME["select"], 0)
    monkeypatch.setattr(
        inspect, "table_files", lambda folder, table, round_: [finished / f.path for f in manifest.table_files(table)]
    )
    result = CliRunner().invoke(app, ["inspect", str(finished), "curated", "--lang", "en"])
    assert result.exit_code == 0, result.output
    assert "p1" in result.output and "p2" not in result.output and "1 of 1 rows" in result.output
    assert "\x1b" not in result.output and "\u202e" not in result.output and "\x07" not in result.output
    result = CliRunner().invoke(app, ["inspect", str(finished), "curated", "--where", "conflict_score > 0.15"])
    assert "p2" in result.output and "p1" not in result.output
    result = CliRunner().invoke(app, ["inspect", str(finished), "curated", "--where", "no_such > 1"])
    assert result.exit_code == 1 and "conflict_score" in result.output


def test_inspect_names_the_tables_there_are(finished):
    result = CliRunner().invoke(app, ["inspect", str(finished), "nonsense"])
    assert result.exit_code == 1 and "no finished table 'nonsense'" in result.output


def test_unknown_run_is_one_paragraph(tmp_path):
    result = CliRunner().invoke(app, ["status", str(tmp_path / "none")])
    assert result.exit_code == 1 and "no run here" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("command", "number", "advice"),
    [
        ("export", errno.EROFS, "Have it mounted writable, or name another folder with --out."),
        ("export", errno.ENOSPC, "Free some space, or name another folder with --out."),
        ("report", errno.EROFS, "Have it mounted writable."),
        ("table", errno.ENOSPC, "Free some space."),
        ("status", errno.EACCES, "Change its owner or permissions."),
        ("run", errno.ENOSPC, "Free some space. What is committed stays; the same command continues."),
        ("run", errno.EROFS, "Have it mounted writable, or use another --run-dir. What is committed stays; the same c"),
    ],
)
def test_advice_on_a_failing_disk_is_for_the_command_and_names_its_target(monkeypatch, command, number, advice):
    def fails(*_: object) -> None:
        raise OSError(number, "no", str(temporary_beside(Path("/mine/export")) / "data.parquet"))

    for call in ("existing.find_run", "existing.config_given", "paper.gathered"):
        monkeypatch.setattr(f"pipeline.{call}", fails)
    said = CliRunner().invoke(app, [command, "mine"]).output
    assert f"(/mine/export/data.parquet). {advice}" in said
    assert command == "run" or said.rstrip().endswith(advice)


def test_status_json_is_machine_readable(finished):
    result = CliRunner().invoke(app, ["status", str(finished), "--json"])
    states = {entry["stage"]: entry for entry in json.loads(result.output)["stages"]}
    assert states["prompts"]["state"] == "new"
    assert states["select"]["state"] == "changed", "the fixture's plan names other settings"


def test_tables_refuse_wrong_columns_and_nulls():
    schema = TABLES["metrics"].schema
    with pytest.raises(ValueError, match="columns"):
        conform(pa.table({"step": [1]}), schema, "metrics")
    with pytest.raises(ValueError, match=r"name.*null"):
        conform(pa.table({"step": [1], "name": pa.array([None], pa.string()), "value": [1.0]}), schema, "metrics")


def test_an_account_that_does_not_match_the_dropped_rows_is_refused(finished):
    rundir = RunDir(finished)
    tallies = [Tally(unit="pair", language="en", rows_in=1, kept=0, dropped={"x": 1})]
    with pytest.raises(ValueError, match=r"1 dropped or failed, but 0"):
        PartBuilder(rundir, BY_NAME["select"], 0, 1, "f", rundir.temporary).finish(tallies, [], {}, 0.0)


def test_unbalanced_accounts_cannot_be_made():
    with pytest.raises(ValueError, match="3 in but 2 accounted"):
        Tally(unit="pair", language="en", rows_in=3, kept=1, dropped={"tie": 1})


def test_an_account_below_zero_cannot_be_made():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Tally(unit="pair", language="en", rows_in=1, kept=-1, dropped={"tie": 2})


@pytest.mark.parametrize(
    ("stage", "unit"), [("prompts", "row"), ("pairs", "prompt"), ("pairs", "row"), ("select", "pair")]
)
def test_rows_that_the_account_does_not_know_are_refused(finished, stage, unit):
    spec, rundir = BY_NAME[stage], RunDir(finished)
    table = spec.kept_rows[1]
    builder = PartBuilder(rundir, spec, 0, 7, "f", rundir.temporary)
    builder.write(table, TABLES[table].schema.empty_table())
    kept = Tally(unit=unit, language="en", rows_in=1, kept=1)
    with pytest.raises(ValueError, match=rf"1 {spec.kept_rows[0][0]}s kept, but {table} has 0 rows"):
        builder.finish([kept], [], {}, 0.0)


def test_printable_removes_what_steers_a_terminal():
    assert printable("a\x1b[31mb\u202ec\u200bd\r\n") == "a[U+001B][31mb[U+202E]c[U+200B]d\n"


def test_a_terminal_without_the_characters_gets_their_escapes(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr("pipeline.cli.app", lambda: sys.stdout.write("norm² 中\n"))
    congrad.main()
    sys.stdout.flush()
    assert written.getvalue() == b"norm\\xb2 \\u4e2d\n"


@pytest.mark.parametrize(
    ("name", "said"), [("none/c.yaml", "There is no folder for the file"), ("-c.yaml", "run ./-c.yaml")]
)
def test_init_where_a_command_would_not_work_as_it_is(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    assert said in " ".join(CliRunner().invoke(app, ["init", "--", name]).output.split())


def test_init_writes_a_valid_config_and_never_overwrites(tmp_path):
    path = tmp_path / "mine.yaml"
    assert CliRunner().invoke(app, ["init", str(path)]).exit_code == 0
    assert load_config(path).name == "my-run"
    again = CliRunner().invoke(app, ["init", str(path)])
    assert again.exit_code == 1 and "exists already" in again.output


def test_init_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, *arguments, **given):
        path.touch()
        return Full()

    monkeypatch.setattr(Path, "open", opened)
    done = CliRunner().invoke(app, ["init", str(tmp_path / "mine.yaml")])
    assert done.exit_code == 1 and not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize(
    "name",
    sorted(
        path.name.removesuffix(".yaml")
        for path in files("data").joinpath("configs").iterdir()
        if path.name.endswith(".yaml")
    ),
)
def test_shipped_configs_are_valid(name):
    from importlib.resources import files

    load_config(Path(str(files("data").joinpath(f"configs/{name}.yaml"))))


def test_inspect_shows_sketches_as_numbers(finished, tmp_path, monkeypatch):
    from pipeline import inspect

    file = tmp_path / "part.parquet"
    pq.write_table(pa.table({"pair_id": ["p"], "sketch": sketch_array(np.arange(20.0)[None].astype(np.float16))}), file)
    monkeypatch.setattr(inspect, "table_files", lambda folder, table, round_: [file])
    result = CliRunner().invoke(app, ["inspect", str(finished), "gradients"])
    assert "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, ... 20 values]" in result.stdout


def test_a_late_writer_cannot_damage_a_committed_part(finished):
    """A worker that was given up prepares its part again: what is committed stays, whatever order they write in."""
    rundir, spec = RunDir(finished), BY_NAME["select"]
    (record,) = [r for r in rundir.stage(spec, 0).files if r.table == "curated"]
    before = (finished / record.path).read_bytes()
    late = PartBuilder(rundir, spec, 0, 0, "f", rundir.temporary)
    late.write("curated", TABLES["curated"].schema.empty_table())
    prepared = late.finish([], [], {}, 0.0)
    assert (finished / record.path).read_bytes() == before
    assert not rundir.verify(rundir.stage(spec, 0).files)
    withdraw(finished, prepared)
    assert list(rundir.temporary.iterdir()) == []
