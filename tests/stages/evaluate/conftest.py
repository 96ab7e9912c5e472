"""An evaluate context on the tiny model: a policy, a trained copy of it, held-out and training rows on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.config import RunConfig
from schemas.ids import content_id
from schemas.tables import TABLES
from stages.contract import Account, Context, ModelRef

TEXTS = {"en": "Please tell me something about the number", "de": "Bitte erzähle mir etwas über die Zahl"}


@dataclass
class Recorder:
    notes: list[str] = field(default_factory=list)
    amount: int = 0
    done: int = 0

    def total(self, amount: int, unit: str) -> None:
        self.amount = amount

    def advance(self, amount: int = 1, **rates: float) -> None:
        self.done += amount

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with other weights."""
    folder = tmp_path_factory.mktemp("models") / "trained"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pair_row(language: str, split: str, number: int, **changes: Any) -> dict[str, Any]:
    prompt = turn("user", f"{TEXTS[language]} {number}.")
    row = {
        "pair_id": f"{language}-{split}-{number}",
        "round": 0,
        "prompt_id": content_id(language, prompt),
        "group_id": f"group-{split}-{number}",
        "language": language,
        "split": split,
        "prompt": prompt,
        "chosen": turn("assistant", f"It is {number} and it is fine."),
        "rejected": turn("assistant", f"No {number}"),
        "chosen_score": 4.0,
        "rejected_score": 1.0,
        "chosen_candidate_id": None,
        "rejected_candidate_id": None,
        "source": "self-rewarding",
    }
    return row | changes


def prompt_of(row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: row[name] for name in ("prompt_id", "group_id", "language", "split")}
    return {**kept, "messages": row["prompt"], "language_confidence": 1.0, "source": "s", "source_row": 0}


class Bench:
    """Writes tables and makes contexts; `pairs` may be changed before `context` is called."""

    def __init__(self, root: Path, initial: Path, trained: Path) -> None:
        self.root = root
        self.models = {
            "initial": ModelRef("policy", initial, "digest-initial"),
            "trained": ModelRef("run round 0", trained, "digest-trained"),
            "evaluation_judge": ModelRef("policy", initial, "digest-initial"),
        }
        self.pairs = [
            pair_row(language, split, number)
            for language in TEXTS
            for split, numbers in (("train", range(4)), ("dev", range(10, 12)), ("test", range(20, 23)))
            for number in numbers
        ]
        self.prompts: list[dict[str, Any]] | None = None
        self.authored = [
            {"group_id": f"a{i}", "language": language, "prompt": f"Is {i} even?", "chosen": "Yes.", "rejected": "No!"}
            for language in TEXTS
            for i in (2, 4)
        ]

    def add_pair(self, language: str, split: str, number: int, **changes: Any) -> None:
        self.pairs.append(pair_row(language, split, number, **changes))

    def context(self, folder: str = "evaluate", imported: bool = False, **sections: Any) -> Context:
        prompts = [prompt_of(row) for row in self.pairs] if self.prompts is None else self.prompts
        curated = [row for row in self.pairs if row["split"] == "train"]
        curated = [{**row, "conflict_score": 0.1} for row in curated]
        inputs = {"pairs:0": self._write("pairs", self.pairs), "curated": self._write("curated", curated)}
        if not imported:
            inputs["prompts"] = self._write("prompts", prompts)
        authored = self.root / "authored.jsonl"
        authored.write_text("".join(json.dumps(row) + "\n" for row in self.authored), encoding="utf-8")
        evaluate = {"authored": [{"path": str(authored)}], "sampling": {"temperature": 0, "max_tokens": 6}}
        config = {
            "name": "tiny-run",
            "languages": {"seen": list(TEXTS)},
            "model": {"policy": str(self.models["initial"].path), "dtype": "float32"},
            "text": {"max_length": 256},
            "engine": {"kind": "transformers"},
            "prompts": {"sources": [{"path": "unused.jsonl"}]},
            "execution": {"deterministic": True},
        }
        config |= {name: value for name, value in sections.items() if name != "evaluate"}
        config["evaluate"] = evaluate | sections.get("evaluate", {})
        path = self.root / folder
        path.mkdir(exist_ok=True)
        return Context(
            config=RunConfig.model_validate(config),
            round=0,
            inputs=inputs,
            models=self.models,
            progress=Recorder(),
            folder=path,
        )

    def _write(self, name: str, rows: list[dict[str, Any]]) -> list[Path]:
        schema = TABLES[name].schema
        path = self.root / f"{name}.parquet"
        pq.write_table(
            pa.Table.from_pylist([{k: row.get(k) for k in schema.names} for row in rows], schema=schema), path
        )
        return [path]


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path, trained_model: Path) -> Bench:
    return Bench(tmp_path, tiny_model, trained_model)


@dataclass
class Result:
    """What the stage yielded."""

    evaluation: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    account: Account

    def value(self, model: str, split: str, language: str, metric: str) -> dict[str, Any]:
        key = (model, split, language, metric)
        return next(r for r in self.evaluation if (r["model"], r["split"], r["language"], r["metric"]) == key)


def evaluate(ctx: Context) -> Result:
    from stages.evaluate.stage import Evaluate

    evaluation, answers, account = list(Evaluate().run(ctx))
    assert evaluation.data.schema.equals(TABLES["evaluation"].schema)
    assert answers.data.schema.equals(TABLES["answers"].schema)
    return Result(evaluation.data.to_pylist(), answers.data.to_pylist(), account)


@pytest.fixture
def run_evaluate() -> Any:
    return evaluate
