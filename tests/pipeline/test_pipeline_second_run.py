"""The second run: changed settings, and back. What is planned is what happens, and nothing that was finished is lost."""

from __future__ import annotations

import itertools
import os
from functools import partial
from pathlib import Path

import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.agenda import intention
from pipeline.api import Run
from pipeline.cli import app
from pipeline.config_file import dump, load_config
from pipeline.console import Display
from pipeline.executor_errors import StageFailed
from pipeline.existing import config_given, config_of
from pipeline.export import export_dataset
from pipeline.fork import fork
from pipeline.fork_view import told
from pipeline.history import last_error
from pipeline.inspect import table_files, tables_not_current, tables_of
from pipeline.loop import preview, run
from pipeline.report import _left_out, _tables, report_now
from pipeline.rundir import RunDir
from pipeline.selection import Selection
from pipeline.status import recorded_planner, states_of
from schemas.errors import UserError
from stages.catalog import BY_NAME
from tests.faults.inline import FakeRun, InlineExecutor, fake_pipeline

CHANGES = {
    "nothing": [],
    "prompts": ["prompts.max_chars=6"],
    "generate": ["generate.candidates=5"],
    "select": ["select.keep=0.7"],
    "train": ["train.learning_rate=0.5"],
    "two": ["prompts.max_chars=6", "select.keep=0.7"],
    "failing": ["generate.candidates=13"],
    "defect": ["generate.candidates=14"],
}
SELECTIONS = {
    "all": {},
    "until select": {"last": "select"},
    "only select": {"stage": "select"},
    "from train": {"first": "train"},
    "forced": {"force": ("prompts",)},
    "forced generate": {"force": ("generate",)},
}


@pytest.fixture
def fake(tmp_path: Path):
    with fake_pipeline():
        fake = FakeRun(tmp_path, {})
        InlineExecutor.computed = fake.computed
        yield fake


class Said(Display):
    """Remembers what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, message: str, style: str = "") -> None:
        self.lines.append(message)


def planned(fake: FakeRun, changes: list[str], selection: Selection) -> tuple[dict[str, str], str]:
    """(stage -> words, error) of a dry run."""
    try:
        states, _ = preview(load_config(fake.path, changes), selection)
    except UserError as error:
        return {}, str(error)
    return {s.step.title: intention(s, selection) for s in states}, ""


@pytest.mark.parametrize("finished", [None, "generate", "train"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_dry_run_says_what_the_run_does_in_the_same_words(fake, finished, change):
    """Changes x stages: the same refusal, and of every stage whose inputs are there the same words."""
    fake("prompts.max_chars=8", last=finished) if finished else None
    start = ["prompts.max_chars=8"]
    for name, options in SELECTIONS.items():
        selection = Selection(**options)
        changes = [*start, *CHANGES[change]]
        words, refused = planned(fake, changes, selection)
        assert (words, refused) == planned(fake, changes, selection), "a dry run changes nothing"
        said = Said()
        try:
            outcome = run(load_config(fake.path, changes), selection, said)
        except UserError as error:
            if change == "failing" and not refused:
                assert "thirteen" in str(error)
                continue
            assert str(error) == refused, name
        except StageFailed:
            assert change == "defect"
        except RuntimeError as error:  # a defect, in the driver's process
            assert change == "defect" and "a defect" in str(error)
        else:
            assert not refused, name
            ran = {step.title for step in outcome.ran}
            certain = {title for title, text in words.items() if text and not text.startswith("after ")}
            open_ = {title for title, text in words.items() if text.startswith("after ")}
            assert certain <= ran <= certain | open_, (name, words, ran)
            for title, text in words.items():
                if text.startswith(("redone", "brought back")):
                    assert f"{title}: {text}" in said.lines, name


def test_every_stage_changed_in_turn_leaves_nothing_of_other_settings_among_what_is_shown(fake, tmp_path):
    """One rule for status, inspect, export, explain and the report: what is current."""
    fake()
    order = ["prompts", "generate", "select", "train"]
    tables = {"prompts": "prompts", "generate": "candidates", "select": "curated"}
    for stage in order:
        config = load_config(fake.path, CHANGES[stage])
        (fake.root / "run.yaml").write_text(dump(config))
        kinds = {s.step.spec.name: s.kind for s in states_of(fake.root)}
        at = order.index(stage)
        assert [kinds[name] for name in order] == ["done"] * at + ["changed"] + ["stale"] * (3 - at)
        current, others = tables_of(fake.root, 0), tables_not_current(fake.root, 0)
        for name, table in tables.items():
            assert (table in current) == (order.index(name) < at)
            assert (table in others) == (order.index(name) >= at)
            if name in order[at:]:
                assert CHANGES[stage][0].split("=")[0] in others[table][1]
                with pytest.raises(UserError):
                    table_files(fake.root, table, 0)
                looked = CliRunner().invoke(app, ["inspect", str(fake.root), table])
                assert looked.exit_code == 0 and "Not current: " in looked.stdout
            else:
                assert "Not current" not in CliRunner().invoke(app, ["inspect", str(fake.root), table]).stdout
        states = states_of(fake.root)
        shown, left_out = _tables(RunDir(fake.root), states), _left_out(states)
        assert {name.split(":")[0] for name in shown} == {t for n, t in tables.items() if order.index(n) < at}
        assert list(left_out) == order[at:] and all(left_out.values()), "the report names what it leaves out, and why"
        for what, maker in (("dataset", "select"), ("model", "train")):
            out = tmp_path / stage / what
            sent = CliRunner().invoke(app, ["export", str(fake.root), "--what", what, "--out", str(out)])
            if order.index(maker) >= at:
                assert sent.exit_code == 1 and not out.exists(), sent.output
                assert "that is there is not current: " in sent.stderr
            else:
                assert sent.exit_code == 0 and out.exists(), sent.output


def test_going_back_to_old_settings_finds_them_done(fake):
    fake()
    first = fake.tables()
    fake("select.keep=0.7", force=("select",))
    second = fake.tables()
    fake("select.keep=0.8", "train.learning_rate=0.5", force=("select",))
    fake.computed.clear()
    words, refused = planned(fake, [], Selection())
    assert not refused and set(words.values()) == {"", "brought back: it was finished with these settings before"}
    said = Said()
    run(load_config(fake.path), Selection(), said)
    assert fake.computed == [] and fake.tables() == first
    assert "select: brought back: it was finished with these settings before" in said.lines
    fake("select.keep=0.7")
    assert fake.computed == [] and fake.tables() == second


def test_what_lies_aside_is_not_taken_for_damaged_when_it_is_not_brought_back(fake):
    fake()
    fake("generate.candidates=3", force=("generate",))
    _, refused = planned(fake, ["select.keep=0.7"], Selection(stage="select"))
    with pytest.raises(UserError, match=r"generate.* lies aside, and must be brought back first"):
        fake("select.keep=0.7", stage="select")
    assert refused
    fake("select.keep=0.7", force=("select",))


def test_only_as_many_results_are_kept_as_asked_for(fake):
    fake()
    for keep in (0.6, 0.7, 0.8, 0.9):
        fake(f"select.keep={keep}", force=("select",))
    assert len(list((fake.root / "round-0/_kept/select").iterdir())) == 2
    fake("select.keep=0.65", "execution.keep_results=0", force=("select",))
    assert not list((fake.root / "round-0/_kept/select").iterdir())


@pytest.mark.parametrize("change", ["failing", "defect"])
def test_a_stage_that_fails_destroys_nothing(fake, change):
    fake()
    before = fake.tables()
    for _ in range(2):
        with pytest.raises((UserError, StageFailed, RuntimeError)):
            fake(*CHANGES[change], force=("generate",))
        assert fake.tables() == before
    assert fake().ran == [] and [s.kind for s in states_of(fake.root)] == ["done"] * 4


def test_work_that_was_half_done_with_other_settings_is_continued_when_they_return(fake, monkeypatch):
    fake(last="prompts")
    import fake_stages

    class Half(fake_stages.Squares):
        def run(self, ctx, shards):
            yield from itertools.islice(super().run(ctx, shards), 1)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fake_stages, "Squares", Half)
        with pytest.raises(KeyboardInterrupt):
            fake()
    with pytest.raises(UserError, match="made with other settings"):
        fake("generate.candidates=5")
    fake("generate.candidates=5", force=("generate",))
    fake.computed.clear()
    fake()
    assert [part for part in fake.computed if part[0] == "generate"] == [("generate", 1), ("generate", 2)]


def test_a_refusal_names_the_setting_the_stages_and_the_command(fake):
    fake()
    selection = Selection(command="congrad run my.yaml --set select.keep=0.7")
    with pytest.raises(UserError) as refusal:
        preview(load_config(fake.path, ["select.keep=0.7"]), selection)
    text = str(refusal.value)
    assert "select.keep: 0.5 -> 0.7" in text and "To redo select, train" in text
    assert "congrad run my.yaml --set select.keep=0.7 --force-stage select" in text


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"languages.seen": ["en", "de"]}, {"languages.seen": ["en", "it"]}, "languages.seen: +it, -de"),
        ({"languages.seen": ["en", "de"]}, {"languages.seen": ["de", "en"]}, "languages.seen: another order"),
        ({"p.sources": [{"path": "a", "limit": 1}]}, {"p.sources": [{"path": "a", "limit": 2}]}, "p.sources.0.limit: 1 -> 2"),
        ({"p.sources": [{"path": "a"}]}, {"p.sources": []}, "p.sources: 1 -> 0 entries"),
        ({"model.judge": None}, {"model.judge": "big"}, "model.judge: none -> big"),
        ({"file /a": "4f" * 32}, {}, "file /a is no longer used"),
        ({}, {"file /b": "4f" * 32}, "file /b is new"),
        ({"input scores": "4f" * 32}, {"input scores": "5e" * 32}, "input scores changed"),
        ({"train.x": 1e-05}, {"train.x": 2e-05}, "train.x: 1e-05 -> 2e-05"),
        ({"a.b": True}, {"a.b": False}, "a.b: true -> false"),
        ({"c.w": {}}, {"c.w.en": 2.0}, "c.w.en: none -> 2"),
        ({"c.w.en": 2.0}, {"c.w": {}}, "c.w.en: 2 -> none"),
        ({"c.w": {}}, {"c.w": None}, "c.w: {} -> none"),
    ],
)  # fmt: skip
def test_what_changed_is_said_without_hashes_and_whole_lists(before, now, words):
    from pipeline.fingerprint import differences

    assert differences(before, now) == [words]


def test_the_command_line_gives_a_dry_run_the_exit_code_of_the_run(fake):
    fake()
    config = yaml.safe_load(fake.path.read_text())
    fake.path.write_text(yaml.safe_dump(config | {"select": {"keep": 0.7}}))
    codes = []
    for more in (["--dry-run"], []):
        done = CliRunner().invoke(app, ["run", str(fake.path), *more])
        codes.append((done.exit_code, done.stderr.replace(" --dry-run", "")))
    assert codes[0] == codes[1] and codes[0][0] == 1 and "select.keep: 0.5 -> 0.7" in codes[0][1]


def test_an_error_is_the_last_ones_until_a_run_ends_well_also_one_without_work(fake):
    fake()
    with pytest.raises(UserError):
        fake("select.keep=0.7")
    assert fake().ran == [] and last_error(fake.root, running=False) is None
    events = (fake.root / "events.jsonl").read_bytes()
    assert fake().ran == [] and (fake.root / "events.jsonl").read_bytes() == events


def test_a_stage_that_is_forced_must_be_selected(fake):
    fake()
    with pytest.raises(UserError, match="Stage train is to be forced, and is not among the stages that are selected"):
        fake(last="select", force=("train",))


def test_a_finished_file_that_is_gone_is_named(fake):
    fake()
    part = next((fake.root / "round-0/curated").glob("*.parquet"))
    part.unlink()
    (state,) = (state for state in states_of(fake.root) if state.step.title == "select")
    assert state.kind == "resume"
    assert state.why[0] == f"it was finished, and {part.relative_to(fake.root)} is gone or cut short"


def test_a_link_in_the_run_is_refused_by_a_dry_run_too(fake, tmp_path):
    fake()
    (fake.root / "notes").symlink_to(tmp_path)
    assert planned(fake, [], Selection())[1].startswith("There is a link in the run directory")


@pytest.mark.parametrize("command", [["export", "--out", "x", "--round", "7"], ["inspect", "curated", "--round", "7"], ["explain", "p", "--round", "7"]])  # fmt: skip
def test_a_round_that_there_is_not_is_said(fake, command, tmp_path):
    fake()
    said = CliRunner().invoke(app, [command[0], str(fake.root), *command[1:]])
    assert said.exit_code == 1 and "This run has no round 7" in said.stderr


def test_what_a_fork_leaves_without_a_use_is_left_out_and_said(fake):
    """A finished run's file cannot be edited; a key that the settings name stays an error."""
    fake("select.by=random", "select.seed=5")
    forked = fork(fake.root, Path("other"), ["select.by=margin"])
    assert forked.config.select.seed is None and forked.config.select.by == "margin"
    assert "select.seed has no use with select.by: margin (it belongs to select.by: random): it is left out." in told(
        forked
    )
    assert config_of(fake.root, ["select.by=margin"]).select.seed is None
    with pytest.raises(UserError, match=r"select\.seed has no use with select\.by: margin"):
        fork(fake.root, Path("third"), ["select.by=margin", "select.seed=6"])
    for given in ("conflict.language_weights.en=2", "conflict.language_weights={en: 2}"):
        with pytest.raises(UserError, match=r"conflict\.language_weights has no use with conflict\.surgery: mgda"):
            fork(fake.root, Path("third"), ["conflict.surgery=mgda", given])


def test_a_fork_that_shares_nothing_is_where_it_was_moved_to(fake, tmp_path):
    fake()
    fork(fake.root, tmp_path / "other", ["seed=3"])
    (tmp_path / "other").rename(tmp_path / "moved")
    assert config_given(tmp_path / "moved" / "run.yaml").folder.resolve() == (tmp_path / "moved").resolve()


def test_scores_are_there_before_select_has_decided(fake, monkeypatch):
    fake()
    monkeypatch.setattr(Run, "tables", lambda self, round=0: ["scores"])
    monkeypatch.setattr(Run, "table", lambda self, name, round=0: {"scores": pl.LazyFrame({"score": [0.5]})}[name])
    assert Run(fake.root).scores().collect().rows() == [(0.5, None, None)]


@pytest.mark.parametrize(("options", "said"), [(["--seeds", "3"], "--seeds is how often"), (["--train", "all", "--examples", "3"], "--examples has no use with --train"), (["--train", "all", "--round", "1"], "--round has no use with --train")])  # fmt: skip
def test_options_of_compare_without_a_use_are_refused(fake, options, said):
    fake()
    told_ = CliRunner().invoke(app, ["compare", str(fake.root), *options])
    assert told_.exit_code != 0 and said in told_.stderr


def test_nothing_is_put_where_a_run_deletes_its_tables(fake):
    fake()
    config = config_of(fake.root)
    for out in ("round-0/curated/mine", "_kept", "round-1", "prompts/x"):
        with pytest.raises(UserError, match="This folder lies where a run keeps its tables"):
            export_dataset(config, fake.root / out, 0, None, False)
    inside = load_config(fake.path, [], fake.root / "round-0" / "curated")
    for begin in (preview, partial(run, display=Display(quiet=True))):
        with pytest.raises(UserError, match="The run would lie in the tables of another"):
            begin(inside, Selection())
    assert export_dataset(config, fake.root / "export", 0, None, False).is_dir()
    assert export_dataset(config, fake.root / "mine" / "deeper", 0, None, False).is_dir()


@pytest.mark.parametrize("place", ["round-0/pairs", "logs", "_state", "."])
def test_a_run_is_looked_at_from_anywhere_in_it(fake, place, monkeypatch):
    """Its own run.yaml says `run_dir: runs`, which is not there from there."""
    fake()
    record = fake.root / "run.yaml"
    values = yaml.safe_load(record.read_text(encoding="utf-8"))
    record.write_text(yaml.safe_dump(values | {"run_dir": "runs"}), encoding="utf-8")
    (fake.root / place).mkdir(exist_ok=True, parents=True)
    monkeypatch.chdir(fake.root / place)
    for given in (fake.root, Path(os.path.relpath(fake.root))):
        assert all(state.is_current for state in states_of(given)) and config_of(given).folder == fake.root.resolve()
        for command in (["status", str(given)], ["inspect", str(given), "curated"], ["report", str(given)]):
            done = CliRunner().invoke(app, command, catch_exceptions=False)
            assert done.exit_code == 0, done.output


def test_what_many_rounds_wait_for_is_found_at_once(write_config, tmp_path):
    """A step of a round goes back to the rounds before by more ways the more there are: some 30 times as many a round."""
    states = recorded_planner(load_config(write_config(rounds=40)), tmp_path / "none").states()
    assert len(states) > 250 and all(state.why for state in states)
    assert states[-1].cause is None and not states[-1].lost


def test_a_run_whose_path_is_no_text_is_refused_before_work(fake):
    fake()
    other = fake.root.parent / os.fsdecode(b"caf\xe9")
    fake.root.rename(other)
    for command in (
        ["run", str(other / "run.yaml"), "--dry-run"],
        ["inspect", str(other), "curated"],
        ["status", str(other)],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1 and r"is no UTF-8: '" in done.output and "Traceback" not in done.output


def test_one_stage_and_a_range_of_them_is_refused(fake):
    with pytest.raises(UserError, match="--stage runs one stage alone"):
        fake(stage="select", first="generate")


@pytest.mark.parametrize(
    ("new", "settings", "words"),
    [
        ("sp ace", [], "'sp ace' is no name for a run"),
        ("t/inner", [], "would lie inside another"),
        ("t/round-0/curated/inner", [], "would lie inside another"),
        ("other", ["name=x"], "said by NEW, not by name=x"),
        ("other", ["run_dir=/x"], "said by NEW"),
    ],
)
def test_where_a_fork_lies_is_said_by_its_name(fake, new, settings, words):
    fake()
    with pytest.raises(UserError, match=words):
        fork(fake.root, fake.root.parent / new, settings)
    assert [path.name for path in fake.root.parent.iterdir()] == ["t"]


def test_an_arm_in_a_report_needs_a_finished_selection(fake):
    fake(last="generate")
    with pytest.raises(UserError, match="There is no finished selection"):
        report_now(load_config(fake.path), ["random"])
    with pytest.raises(UserError, match="There is no filter 'margn'"):
        report_now(load_config(fake.path), ["margn"])


def test_quiet_says_nothing_and_version_is_said(fake):
    done = CliRunner().invoke(app, ["run", str(fake.path), "--quiet"])
    assert done.exit_code == 0 and done.output == ""
    exported = CliRunner().invoke(app, ["export", str(fake.root), "--what", "model", "--quiet"])
    assert "licence" not in exported.output
    said = CliRunner().invoke(app, ["--version"])
    assert said.exit_code == 0 and said.output.startswith("congrad-pipeline ")


def test_dropped_rows_of_a_stage_that_dropped_none_are_an_empty_table(fake):
    fake()
    done = CliRunner().invoke(app, ["inspect", str(fake.root), "dropped/prompts"])
    assert done.exit_code == 0 and "0 of 0 rows" in done.output


def test_a_stage_that_is_made_anew_and_stopped_goes_on_from_what_lay_in_its_folder(fake, monkeypatch):
    """What was finished with other settings lies aside meanwhile: brought back, it would take the place of the new work."""
    fake()
    import fake_stages

    class Stopped(fake_stages.Folder):
        def run(self, ctx):
            (ctx.folder / "checkpoint").write_text("half way")
            raise KeyboardInterrupt

    change = "train.learning_rate=0.5"
    with monkeypatch.context() as patch:
        patch.setattr(fake_stages, "Folder", Stopped)
        with pytest.raises(KeyboardInterrupt):
            fake(change, force=("train",))
    fake(change)
    assert (fake.root / "round-0/train/result.txt").read_text() == "resumed"
    fake()
    assert (fake.root / "round-0/train/result.txt").read_text() == "fresh", "what was finished before"


@pytest.mark.parametrize("file", ["loglik-before.parquet", "answers-after.parquet", "benchmarks/before-1.parquet"])
def test_finished_sub_steps_of_an_evaluation_are_work(tmp_path: Path, file: str) -> None:
    rundir, spec = RunDir(tmp_path), BY_NAME["evaluate"]
    assert not rundir.has_work(spec, 0)
    path = rundir.artifacts(spec, 0) / file
    path.parent.mkdir(parents=True)
    path.touch()
    assert rundir.has_work(spec, 0)


def test_what_a_worker_left_of_a_shard_is_work_and_goes_when_the_part_is_committed(fake, monkeypatch):
    import fake_stages

    found: list[bool] = []

    class Slow(fake_stages.Squares):
        def run(self, ctx, shards):
            for shard in shards:
                left = ctx.unfinished(shard.index)
                found.append(left.exists())
                left.write_bytes(b"half of it")
                if shard.index == 1 and not found[-1]:
                    raise KeyboardInterrupt
                yield from super().run(ctx, iter([shard]))

    def left() -> list[str]:
        return sorted(p.name.split("-")[1] for p in fake.root.rglob("unfinished-*"))

    monkeypatch.setattr(fake_stages, "Squares", Slow)
    with pytest.raises(KeyboardInterrupt):
        fake()
    assert left() == ["00001"], "the first part was committed"
    with pytest.raises(UserError, match="made with other settings"):
        fake("generate.candidates=5")
    with pytest.raises(KeyboardInterrupt):
        fake("generate.candidates=5", force=("generate",))
    found.clear()
    fake()
    assert found == [True, False], "the second part is gone on with, the third is new"
    assert left() == ["00001"] and not list((fake.root / "round-0/_state").rglob("unfinished-*")), "kept aside alone"


def test_after_a_failure_the_report_shows_what_there_is(fake):
    """What failed before it began anew is put back, but is of other settings than were asked for: it is not on the page."""
    fake()
    page = (fake.root / "report.html").read_text()
    with pytest.raises((StageFailed, RuntimeError)):
        fake("generate.candidates=14", force=("generate",))
    with pytest.raises(UserError):
        fake("generate.candidates=13", force=("generate",))
    failed = (fake.root / "report.html").read_text()
    assert failed != page and failed.count(",") == 0, "prompts alone are current"
    fake()
    assert (fake.root / "report.html").read_text() == page


def test_a_run_directory_that_is_given_relative_holds_its_tables_where_the_docs_say(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake("run_dir=here")
    assert {p.name for p in (tmp_path / "here/t").iterdir()} >= {"prompts", "round-0", "run.yaml", "events.jsonl"}
    assert not (tmp_path / "here/t/here").exists() and list((tmp_path / "here/t/round-0/curated").glob("*.parquet"))
    for place in ("here/t", str(tmp_path / "here/t")):
        assert {s.kind for s in states_of(Path(place))} == {"done"}
