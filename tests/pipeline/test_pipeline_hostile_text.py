"""What data and models wrote cannot steer the terminal, forge lines, break the cards, or reach other files."""

from __future__ import annotations

import ast
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import typer
import yaml
from hostile import NASTY, STEERING
from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from pipeline import export, inspect
from pipeline.cli import app
from pipeline.config_file import load_config
from pipeline.console import Display, Terminal
from pipeline.dataset_card import Contents, dataset_card
from pipeline.events import Events
from pipeline.history import last_error
from pipeline.status import print_json
from pipeline.trials_view import as_csv
from pipeline.worker import _Harmless

STORABLE = {name: text.encode("utf-8", "replace").decode() for name, text in NASTY.items()}
ARGUMENTS = {name: text for name, text in STORABLE.items() if "\0" not in text} | {"not-utf-8": "\udcff"}
"""What a shell can pass: no NUL; bytes that are no UTF-8 arrive as surrogates."""


@pytest.mark.parametrize("name", NASTY)
def test_notes_are_one_harmless_line(name: str) -> None:
    display = Display()
    display.console = Console(file=io.StringIO(), width=100, highlight=False)
    with display.stage("judge") as bar:
        bar.say(NASTY[name])
    display.say("end")
    shown = display.console.file.getvalue()  # type: ignore[attr-defined]
    assert not STEERING & set(shown)
    assert len(shown.splitlines()) == 2, "a note cannot pass for another line"
    if name == "rich-markup":
        assert "[bold red]x[/bold red]" in shown


@pytest.mark.parametrize("name", NASTY)
def test_log_lines_are_harmless(name: str) -> None:
    record = logging.LogRecord("stages", logging.ERROR, "f.py", 1, "failed: %s", (NASTY[name],), None)
    assert not STEERING & set(_Harmless("%(levelname)s %(message)s").format(record))


@pytest.mark.parametrize("name", NASTY)
def test_inspect_shows_any_cell(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    text = STORABLE[name]
    path = tmp_path / "rows.parquet"
    turn = [{"role": text, "content": text}]
    pl.DataFrame({"language": [text], "reason": [text], "prompt": [turn], "many": [[text] * 20]}).write_parquet(path)
    monkeypatch.setattr(inspect, "table_files", lambda *_: [path])
    inspect.print_rows(tmp_path, "pairs", None, text, 5, 0)
    shown = capsys.readouterr().out
    assert not STEERING & set(shown) and len(shown) < 40_000
    assert "1 of 1 rows" in shown
    assert len(shown.splitlines()) == 6, "a cell is one line"


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("command", [["status"], ["inspect"], ["report"], ["export"], ["run"]], ids=lambda c: c[0])
def test_any_argument_gives_one_harmless_paragraph(command: list[str], name: str) -> None:
    rest = ["pairs"] if command == ["inspect"] else []
    result = CliRunner().invoke(app, [*command, "--", f"no/{ARGUMENTS[name]}", *rest])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert not STEERING & set(result.output) and len(result.output) < 15_000


@pytest.mark.parametrize("name", NASTY)
def test_events_and_their_last_error_survive_any_text(name: str, tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl")
    events.add("run_started", note=NASTY[name])
    events.add("run_ended", ok=False, error=NASTY[name])
    data = (tmp_path / "events.jsonl").read_bytes()
    assert data.isascii() and data.count(b"\n") == 2
    assert [json.loads(line)["event"] for line in data.splitlines()] == ["run_started", "run_ended"]
    found = last_error(tmp_path, running=False)
    assert found is not None and found["error"] == NASTY[name]


def test_status_json_is_ascii(capsys, tmp_path) -> None:
    print_json(tmp_path / "r\u202eun\u00e9", [], None)
    shown = capsys.readouterr().out
    assert shown.isascii() and json.loads(shown)["run"] == "r\u202eun\u00e9"


@pytest.mark.parametrize("name", NASTY)
def test_the_dataset_card_stays_a_card(name: str, write_config) -> None:
    text = STORABLE[name]
    config = load_config(write_config())
    model = config.model.model_copy(update={"policy": text})
    contents = Contents("data/train-*.parquet", {"en": 3, text or "x": 1}, 1, 1)
    hostile = config.model_copy(update={"name": text, "model": model, "banner": text})
    card = dataset_card(hostile, 0, contents, [])
    _, header, body = card.split("---\n", 2)
    assert set(yaml.safe_load(header)) == set(yaml.safe_load(dataset_card(config, 0, contents, []).split("---\n")[1]))
    assert not STEERING & set(body)
    assert sum(line.startswith("# ") for line in body.splitlines()) == 1
    assert sum(line.startswith("|") for line in body.splitlines()) == 6
    tokens = MarkdownIt("commonmark", {"html": True}).parse(body)
    kinds = {child.type for token in tokens for child in [token, *(token.children or [])]}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "fence", "hr", "em_open"}
    assert sum(child.type == "strong_open" for token in tokens for child in token.children or []) == 1  # our own


def test_nothing_is_written_as_a_spreadsheet() -> None:
    root = Path(export.__file__).parents[1]
    for package in ("schemas", "stages", "pipeline"):
        for path in (root / package).rglob("*.py"):
            code = path.read_text(encoding="utf-8")
            calls = ("write_csv", "csv.writer", "DictWriter", "to_csv", "write_excel")
            found = [call for call in calls if call in code and path.name != "paper_table.py"]
            assert not found, f"{path}: cells that begin with = + - @ must be quoted first, as `as_csv` does"


def test_no_cell_of_a_spreadsheet_is_a_formula() -> None:
    cells = ["=1+1", "+1", "-1", "@x", "\tx", "plain", "a=b", None]
    frame = pl.DataFrame({"arm": cells, "value": [-1.0] * len(cells)})
    back = pl.read_csv(io.StringIO(as_csv(frame)))
    assert back["arm"].to_list() == ["'=1+1", "'+1", "'-1", "'@x", "'\tx", "plain", "a=b", None]
    assert back["value"].to_list() == [-1.0] * len(cells)


def _command_lines() -> Iterator[tuple[str, str]]:
    """Every place of every command where a word can stand: an unknown command, option or argument, and the value of each option."""
    yield "", "{}"
    yield "", "--{}"
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        given = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        for word in ("--{}", "-{}", " ".join(["no/{}"] * (len(given) + 2))):
            yield name, word
        for option in command.params:
            if option.param_type_name == "option" and option.name not in ("help", "debug"):
                flag = "" if option.is_flag else "={}"
                yield name, " ".join([f"{option.opts[0]}{flag}", *["no/{}"] * len(given)])


@pytest.mark.parametrize(("command", "line"), list(_command_lines()))
def test_no_word_of_a_command_line_steers_the_terminal(
    command: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nasty = "".join(ARGUMENTS[name] for name in ("ansi-colour", "c1-csi", "bidi-override", "not-utf-8", "rich-markup"))
    words = [word.replace("{}", nasty) for word in line.split(" ")]
    result = CliRunner().invoke(app, [command, *words] if command else words)
    assert isinstance(result.exception, SystemExit) and result.exit_code in (1, 2), result.output
    assert not STEERING & set(result.output)
    assert "1;32" not in result.output, "markup is text"


def test_what_a_terminal_is_told_goes_one_way() -> None:
    """Whatever is handed to the one console comes out harmless, and there is no other console."""
    terminal = Terminal(file=io.StringIO(), width=2000, force_terminal=True, color_system=None)
    table = Table("a\x1b[2Jb")
    for text in (text for text in NASTY.values() if len(text) < 2_000):
        table.add_row(Text(text))
        terminal.print(text, markup=False)
    terminal.print(table)
    assert not STEERING & set(terminal.file.getvalue())  # type: ignore[attr-defined]
    root = Path(export.__file__).parents[1]
    for path in (file for package in ("schemas", "stages", "pipeline") for file in (root / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert "Console" not in calls, f"{path}: pipeline.console.Terminal is the one console"
        if path.name not in ("cli.py", "command.py"):
            assert not {"print", "typer.echo", "typer.secho", "traceback.print_exc"} & set(calls), path
