"""The command line works from any folder, with odd users, paths, names and environments; errors are one paragraph."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import STEERING
from typer.testing import CliRunner

from pipeline import export
from pipeline.cli import app
from pipeline.config_file import load_config, shipped_configs
from schemas.errors import UserError
from schemas.paths import expanded

ROOT = Path(__file__).parents[2]
ROOT_USER = os.geteuid() == 0
SHADOWS = (
    "data.py",
    "schemas.py",
    "stages.py",
    "pipeline.py",
    "data/x.txt",
    "schemas/__init__.py",
    "stages/__init__.py",
)


def congrad(
    *arguments: str, cwd: Path, module: str = "congrad", **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


def invoke(*arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert not STEERING & set(result.output)
    return result


@pytest.mark.parametrize("pythonpath", ["", "."], ids=["", "PYTHONPATH=."])
@pytest.mark.parametrize("module", ["congrad", "pipeline"])
def test_it_runs_in_a_folder_full_of_its_own_names(tmp_path: Path, module: str, pythonpath: str) -> None:
    for name in SHADOWS if module == "congrad" else [name for name in SHADOWS if not name.startswith("pipeline")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('the wrong file was imported')\n")
    installed = {"PYTHONPATH": os.pathsep.join(filter(None, [pythonpath, str(ROOT)]))}
    done = congrad("init", "--from", "curate", "mine.yaml", cwd=tmp_path, module=module, **installed)
    assert (done.returncode, (tmp_path / "mine.yaml").is_file()) == (0, True), done.stderr
    assert (tmp_path / "mine.yaml").read_text() == (ROOT / "data/configs/curate.yaml").read_text()


def test_another_package_of_the_same_name_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "site/schemas").mkdir(parents=True)
    (tmp_path / "site/schemas/__init__.py").write_text("")
    (tmp_path / "work").mkdir()
    done = congrad("--help", cwd=tmp_path / "work", PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), str(ROOT)]))
    assert done.returncode == 1 and "Another package named 'schemas'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_are_found_by_name(name: str) -> None:
    assert load_config(Path(name)).name


def test_an_unknown_shipped_config_says_what_there_is() -> None:
    assert "demo.yaml" in invoke("run", "package:configs/none.yaml").output
    assert "demo.yaml" in invoke("init", "--from", "none", "x.yaml").output
    assert "not a file of the package" in invoke("run", "package:../../etc/passwd").output


def test_paths_take_home_and_variables(write_config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SCRATCH", "/scratch/a b")
    prompts = {"sources": [{"path": "$SCRATCH/{language}.jsonl"}]}
    config = load_config(write_config(run_dir="~/runs", prompts=prompts, model={"policy": "${SCRATCH}/model"}))
    assert config.run_dir == Path("/home/somebody/runs")
    assert config.prompts.sources[0].path == "/scratch/a b/{language}.jsonl"
    assert config.model.policy == "/scratch/a b/model"
    with pytest.raises(UserError, match=r"environment variable \$NO_SUCH is not set"):
        load_config(write_config(run_dir="$NO_SUCH/runs"))
    with pytest.raises(UserError, match="no home folder for '~no-such-user'"):
        load_config(write_config(run_dir="~no-such-user/runs"))
    assert expanded("org/model-1.5") == "org/model-1.5"


@pytest.mark.parametrize("place", ["1e3", "[a]", "null", "007", "a: b", "yes", "é ü", "{x: 1}", "#x"])
def test_a_run_dir_option_is_a_path_and_no_yaml(write_config, tmp_path: Path, place: str) -> None:
    assert load_config(write_config(), [], Path(place)).run_dir == Path(place)


def test_a_run_given_as_run_dir_says_what_would_happen_and_what_was_meant(write_config, tmp_path: Path) -> None:
    (tmp_path / "runs/old").mkdir(parents=True)
    (tmp_path / "runs/old/run.yaml").write_text("")
    with pytest.raises(UserError, match=r"old/t would be made in it.*--run-dir \S*/runs --set name=old"):
        load_config(write_config(), [], tmp_path / "runs/old")


def test_export_writes_only_into_folders_of_its_own(tmp_path: Path, write_config, curate) -> None:
    config = load_config(write_config())
    curate(config, range(1))

    def write(out: Path) -> Path:
        return export.export_dataset(config, out, 0, None, False)

    precious = tmp_path / "precious"
    precious.write_text("mine")
    standard = tmp_path / "standard"  # the layout of an export, made by somebody else
    (standard / "data").mkdir(parents=True)
    (standard / "data/train-00000-of-00001.parquet").write_text("mine")
    (standard / "README.md").write_text("mine")
    through = tmp_path / "through"
    write(through)
    (through / "README.md").unlink()
    (through / "README.md").symlink_to(precious)
    lying = tmp_path / "lying"  # a mark that names what no export writes
    lying.mkdir()
    (lying / "mine.txt").write_text("mine")
    (lying / ".congrad-export.json").write_text(json.dumps({"files": ["mine.txt", "../precious", "/etc/passwd"]}))
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "data").symlink_to(standard / "data")
    for out in (standard, through, lying, linked, precious):  # lying: a mark of names alone
        with pytest.raises(UserError, match=r"holds something else|no folder"):
            write(out)
    assert precious.read_text() == (standard / "README.md").read_text() == (lying / "mine.txt").read_text() == "mine"
    assert (standard / "data/train-00000-of-00001.parquet").read_text() == "mine"
    for _ in range(2):
        again = write(tmp_path / "new")
    *others, part = sorted(path.relative_to(again).as_posix() for path in again.rglob("*"))
    assert others == [".congrad-export.json", "README.md", "data"]
    assert re.fullmatch(r"data/train-00000-of-00001-[0-9a-f]{16}\.parquet", part)
    (again / "data/more.csv").write_text("mine")
    with pytest.raises(UserError, match=r"something else \(\S*more\.csv"):
        write(again)


@pytest.mark.parametrize("target", ["file/x.yaml", "none/x.yaml", "folder", "dangling", "a" * 300, "\x1b[31mx/y"])
def test_init_into_what_cannot_be_written_is_one_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    assert invoke("init", target).exit_code == 1
    assert not (tmp_path / "elsewhere").exists()


def test_a_path_that_steers_a_terminal_is_shown_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "[U+001B]" in invoke("init", "\x1b[31m\u202egnp.yaml").output


@pytest.mark.skipif(ROOT_USER, reason="root may read and write everything")
def test_permissions_are_called_that(tmp_path: Path, write_config) -> None:
    path = write_config()
    path.chmod(0)
    assert "may not be read" in invoke("run", str(path)).output
    (tmp_path / "shut").mkdir(mode=0)
    assert "may not be accessed" in invoke("init", str(tmp_path / "shut/x.yaml")).output


def test_yaml_without_end_is_refused_in_no_time(tmp_path: Path) -> None:
    for text in (
        "[" * 50_000,
        "{a: " * 50_000,
        "\n".join(" " * n + "a:" for n in range(3_000)),
        "- " * 50_000,
        "x" * 11_000_000,
    ):
        path = tmp_path / "deep.yaml"
        path.write_text(text)
        assert invoke("run", str(path)).exit_code == 1


def test_what_is_written_has_the_permissions_that_the_umask_says(tmp_path: Path, write_config, curate) -> None:
    config = load_config(write_config())
    curate(config, range(1))
    old = os.umask(0o027)
    try:
        out = export.export_dataset(config, tmp_path / "out", 0, None, False)
        assert invoke("init", str(tmp_path / "x.yaml")).exit_code == 0
    finally:
        os.umask(old)
    for path in (tmp_path / "x.yaml", *out.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_no_home_no_name_no_temporary_folder(tmp_path: Path) -> None:
    """As an arbitrary user of an image: a number that the password file does not know (image-check has a real one)."""
    program = (
        "import pwd, sys\n"
        "def nobody(*_): raise KeyError('uid not found')\n"
        "pwd.getpwuid = pwd.getpwnam = nobody\n"
        "from congrad import main\n"
        "sys.argv = ['congrad', 'run', 'package:configs/curate.yaml', '--dry-run']\n"
        "main()"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")}
    environment |= {
        "TMPDIR": "/nonexistent",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd="/", capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 1) and len(done.stderr.splitlines()) <= 3
