"""A whole run on the tiny model, in reference mode: transformers engine, CPU, float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

import pipeline.local_crew
import pipeline.loop
from pipeline.cli import app
from pipeline.config_file import load_config
from pipeline.console import Display
from pipeline.selection import Selection
from tests.faults.inline import InlineExecutor

LANGUAGES = ("en", "de", "zh")


def tiny_config(tmp_path: Path, model: Path, **changes: object) -> dict:
    """The config of a run that takes seconds; `a__b=1` sets a.b."""
    prompts = model.parent / "prompts"  # one place for all runs of a session: the source column names it
    prompts.mkdir(exist_ok=True)
    for language in (*LANGUAGES, "it"):
        source = files("data").joinpath(f"prompts/{language}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [line for line in source if json.loads(line)["length"] == "sentence"]
        (prompts / f"{language}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    config: dict = {
        "name": "t",
        "run_dir": str(tmp_path / "runs"),
        "seed": 3,
        "languages": {"seen": list(LANGUAGES), "unseen": ["it"], "identify": False},
        "model": {"policy": str(model), "dtype": "float32"},
        "text": {"max_length": 1024},
        "engine": {"kind": "transformers", "batch_size": 4},
        "prompts": {
            "sources": [{"path": str(prompts / "{language}.jsonl")}],
            "test_fraction": 0.2,
            "dev_fraction": 0.1,
        },
        "generate": {"candidates": 3, "shard_size": 6, "sampling": {"max_tokens": 12}},
        "judge": {"shard_size": 24, "min_mass": 0.0},
        "pairs": {"min_margin": 0.0, "drop_truncated": False, "on_empty_language": "skip"},
        "gradients": {"shard_size": 5, "sketch": {"dim": 512}, "token_budget": 1024},
        "train": {
            "batch_size": 2,
            "micro_batch_size": 2,
            "max_steps": 3,
            "save_steps": 1,
            "lora": {"r": 2, "alpha": 4},
        },
        "evaluate": {
            "authored": [{"path": "package:authored_pairs/{language}.jsonl", "limit": 3}],
            "prompts_per_language": 1,
            "sampling": {"max_tokens": 8, "temperature": 0.0},
        },
        "execution": {"deterministic": True, "device": "cpu"},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        target = config
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    if config["pairs"].get("sources"):  # neither generated nor judged
        config = {name: section for name, section in config.items() if name not in ("generate", "judge")}
        config["pairs"] = {name: value for name, value in config["pairs"].items() if name != "drop_truncated"}
    return config


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, tiny_model):
    """One undisturbed run, shared by the tests that only look: (config file, run directory, the finished process)."""
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(folder, tiny_model)))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "250"},
    )
    logs = "\n".join(p.read_text()[-3000:] for p in sorted(folder.rglob("logs/*.log")))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    return path, folder / "runs" / "t", done


@pytest.fixture
def pipeline_command(tmp_path: Path):
    """Run `python -m pipeline ...`; returns the finished process."""

    def command(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"COLUMNS": "250"},
            timeout=900,
        )
        if check and done.returncode:
            logs = "\n".join(p.read_text()[-3000:] for p in sorted(tmp_path.rglob("logs/*.log")))
            raise AssertionError(f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}\n{logs}")
        return done

    return command


@pytest.fixture
def inline_stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real run loop and the real stages, in this process: no worker processes that import torch anew."""
    with inline(monkeypatch):
        yield


@contextmanager
def inline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stages run in this process; what they set is set back."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    monkeypatch.setattr(InlineExecutor, "computed", [], raising=False)
    monkeypatch.setattr(pipeline.local_crew, "local_executor", InlineExecutor)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


def imported_config(folder: Path, model: Path) -> dict:
    """The config of a run of 30 short imported pairs in three languages, a fifth of them with a known error, made in seconds."""
    rows = [
        {
            "prompt": f"[{language}] What is {n} + 1?",
            "chosen": f"[{language}] It is {n + 1}.",
            "rejected": f"{language}: {n + 2}, perhaps.",
        }
        | {"language": language, "label_error": "flip" if n % 5 == 0 else ""}
        for language in LANGUAGES
        for n in range(10)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"path": str(folder / "pairs.jsonl"), "fields": {"label_error": "label_error"}}
    return {
        "name": "mine",
        "run_dir": str(folder / "runs"),
        "languages": {"seen": list(LANGUAGES), "identify": False},
        "model": {"policy": str(model), "dtype": "float32"},
        "pairs": {"sources": [source], "test_fraction": 0.3},
        "gradients": {"sketch": {"dim": 256, "error_pairs": 0}},
        "train": {"batch_size": 2, "max_steps": 2, "lora": {"r": 2, "alpha": 4}},
        "evaluate": {"authored": [], "prompts_per_language": 0, "win_rate": False},
        "execution": {"device": "cpu"},
    }


@pytest.fixture(scope="session")
def imported_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run of imported pairs up to the trained model, for tests that only look; its config is `mine.yaml` two folders above."""
    folder = tmp_path_factory.mktemp("imported")
    (folder / "mine.yaml").write_text(yaml.safe_dump(imported_config(folder, tiny_model)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, inline(patch):
        config = load_config(folder / "mine.yaml")
        pipeline.loop.run(config, Selection(last="train"), Display(quiet=True))
    return folder / "runs" / "mine"


@pytest.fixture
def inline_command(inline_stages: None, monkeypatch: pytest.MonkeyPatch):
    """What `pipeline_command` does, in this process, stages included: for tests of what is computed and said."""
    monkeypatch.setenv("COLUMNS", "250")

    def command(*arguments: str, check: bool = True) -> Result:
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert not check or done.exit_code == 0, f"{arguments} ended with {done.exit_code}:\n{done.output}"
        return done

    return command


@pytest.fixture
def write_tiny(tmp_path: Path, tiny_model: Path):
    """Write the tiny config with changes; returns its path."""

    def write(**changes: object) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tiny_config(tmp_path, tiny_model, **changes)), encoding="utf-8")
        return path

    return write
