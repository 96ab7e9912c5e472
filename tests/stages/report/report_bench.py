"""A synthetic but realistic run: every table with its real schema, ten languages, our own texts."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.config import RunConfig
from schemas.ids import content_id
from schemas.manifests import StageManifest, Tally
from schemas.tables import TABLES, gradients_schema

SEEN = ["en", "de", "es", "fr", "ru", "zh", "ja", "ar", "hi", "sw"]
UNSEEN = ["it", "ko", "th"]


@dataclass
class FakeRun:
    """inputs, manifests and config as the report is made from."""

    config: RunConfig
    inputs: dict[str, list[Path]] = field(default_factory=dict)
    manifests: list[StageManifest] = field(default_factory=list)


def _lines(folder: str, language: str) -> list[dict[str, Any]]:
    text = files("data").joinpath(folder, f"{language}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


class Builder:
    """Writes the tables of one run into a folder."""

    def __init__(self, folder: Path, languages: list[str], per_language: int, rounds: int, **config: Any) -> None:
        self.folder, self.languages, self.per_language = folder, languages, per_language
        self.random = random.Random(1)
        settings = {
            "name": "demo-ten-languages",
            "seed": 7,
            "rounds": rounds,
            "languages": {"seen": languages, "unseen": UNSEEN},
            "model": {"policy": "embedded:qwen2.5-coder-0.5b-instruct"},
            "prompts": {"sources": [{"path": "package:prompts/{language}.jsonl"}]},
            "train": {"max_steps": 60},
        }
        self.run = FakeRun(RunConfig.model_validate(settings | config))
        for round_ in range(rounds):
            self.round(round_)

    def write(self, key: str, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> None:
        """One Parquet file for `key`."""
        table = key.split(":")[0]
        schema = schema or TABLES[table].schema
        path = self.folder / (key.replace(":", "-") + ".parquet")
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        self.run.inputs[key] = [path]

    def round(self, round_: int) -> None:
        """All tables of a round."""
        pairs = [pair for language in self.languages for pair in self._pairs(language, round_)]
        self.write(f"pairs:{round_}", pairs)
        train = [pair for pair in pairs if pair["split"] == "train"]
        scores = self._gradients(train, round_)
        self._select(train, scores, round_)
        self._gram(round_)
        self._metrics(round_)
        self._evaluation(round_)
        self._manifests(round_)

    def _pairs(self, language: str, round_: int) -> list[dict[str, Any]]:
        authored, rows = _lines("authored_pairs", language), []
        for i in range(self.per_language):
            one, more = authored[i % len(authored)], authored[(i * 5 + 3) % len(authored)]
            chosen = one["chosen"] + ("\n\n" + more["chosen"] if i % 3 == 0 else "")
            rejected = one["rejected"] + (" " + more["rejected"] if i % 4 == 0 else "")
            low = self.random.uniform(0.5, 3.5)
            prompt = [_message("user", one["prompt"] + (f" ({i})" if i >= len(authored) else ""))]
            if i % 17 == 5:
                prompt = [_message("system", one["prompt"]), *prompt]
            rows.append(
                {
                    "pair_id": content_id(language, i, round_),
                    "round": round_,
                    "prompt_id": content_id(language, i),
                    "group_id": one["group_id"],
                    "language": language,
                    "split": "train" if i % 6 else "test",
                    "prompt": prompt,
                    "chosen": [_message("assistant", chosen)],
                    "rejected": [_message("assistant", rejected)],
                    "chosen_score": min(5.0, low + self.random.uniform(0.1, 2.2)),
                    "rejected_score": low,
                    "chosen_candidate_id": None,
                    "rejected_candidate_id": None,
                    "source": "self-rewarding",
                }
            )
        return rows

    def _gradients(self, pairs: list[dict[str, Any]], round_: int) -> list[dict[str, Any]]:
        rows, scores = [], []
        for pair in pairs:
            n = [len(pair[side][0]["content"]) // 3 + 2 for side in ("chosen", "rejected")]
            rows.append(
                {
                    "pair_id": pair["pair_id"],
                    "group_id": pair["group_id"],
                    "language": pair["language"],
                    "split": "train",
                    "sketch": bytes(8),
                    "norm": self.random.lognormvariate(1, 0.4),
                    **dict.fromkeys(("logp_chosen", "ref_logp_chosen"), -20.0),
                    **dict.fromkeys(("logp_rejected", "ref_logp_rejected"), -22.0),
                    "n_prompt": 20,
                    "n_chosen": n[0],
                    "n_rejected": n[1],
                    "ids_hash": "0",
                    "relevance_chosen": 0.5 + n[0] / 1000,
                    "relevance_rejected": 0.4,
                    "null_chosen": -0.01 if len(rows) % 3 else None,
                }
            )
            score = self.random.gauss(0.08, 0.07)
            cosines = [{"language": k, "cosine": self.random.gauss(0.05, 0.06)} for k in self.languages]
            scores.append(
                {
                    "pair_id": pair["pair_id"],
                    "language": pair["language"],
                    "score": score,
                    "score_all": score,
                    "score_others": score - 0.03,
                    "cosine_own": score + self.random.gauss(0.05, 0.02),
                    "cosines": cosines,
                    "conflicting_languages": [c["language"] for c in cosines if c["cosine"] < 0],
                    "norm": rows[-1]["norm"],
                    "weight": 0.5,
                    "flags": [],
                    "implicit_margin": 0.0,
                    "logp_margin": 0.0,
                    "n_tokens": 4,
                }
            )
        self.write(f"gradients:{round_}", rows, gradients_schema(4))
        self.write(f"scores:{round_}", scores)
        return scores

    def _select(self, pairs: list[dict[str, Any]], scores: list[dict[str, Any]], round_: int) -> None:
        score = {row["pair_id"]: row["score"] for row in scores}
        curated, rejected = [], []
        for language in self.languages:
            mine = sorted((p for p in pairs if p["language"] == language), key=lambda p: -score[p["pair_id"]])
            for rank, pair in enumerate(mine):
                row = {name: pair.get(name) for name in TABLES["curated"].schema.names}
                row["conflict_score"] = score[pair["pair_id"]]
                if rank < len(mine) / 2:
                    curated.append(row)
                else:
                    rejected.append(row | {"reason": "below_cut"})
        self.write(f"curated:{round_}", curated)
        self.write(f"rejected:{round_}", rejected)

    def _gram(self, round_: int) -> None:
        gram, directions = [], []
        for scope in ("model", *(f"layers.{i}" for i in range(0, 24, 4))):
            spread = 0.06 if scope == "model" else 0.12
            cosine = {
                frozenset((a, b)): max(-1.0, min(1.0, self.random.gauss(0.07, spread)))
                for a in self.languages
                for b in self.languages
            }
            noise = {a: self.random.uniform(0.0, 0.3) for a in self.languages}
            for a in self.languages:
                for b in self.languages:
                    value = 1.0 if a == b else cosine[frozenset((a, b))]
                    null = (noise[a] + noise[b]) / 2
                    gram.append(
                        {"scope": scope, "language": a, "other": b, "dot": value * 0.3, "cosine": value}
                        | {"null_negative_rate": null}
                    )
                negative = sum(cosine[frozenset((a, b))] < 0 for b in self.languages if b != a)
                directions.append(
                    {
                        "scope": scope,
                        "language": a,
                        "n_pairs": 14 if a == "sw" else self.per_language,
                        "norm": self.random.uniform(0.2, 0.5),
                        "weight": 1.0 + 0.11 * negative,
                        "conflicts": negative,
                        "direction": [0.0] * 4,
                    }
                )
        self.write(f"gram:{round_}", gram)
        self.write(f"directions:{round_}", directions)

    def _metrics(self, round_: int) -> None:
        rows = []
        for step in range(1, 61):
            done = 1 - math.exp(-step / 25)
            values = {
                "loss": 0.693 - 0.35 * done + self.random.gauss(0, 0.02),
                "rewards/accuracies": min(1.0, 0.5 + 0.4 * done + self.random.gauss(0, 0.04)),
                "rewards/margins": 1.4 * done + self.random.gauss(0, 0.06),
                "learning_rate": 5e-6 * (step / 6 if step < 6 else 0.5 + 0.5 * math.cos(math.pi * step / 60)),
                "grad_norm": self.random.uniform(1, 3),
            }
            rows += [{"step": step, "name": name, "value": value} for name, value in values.items()]
        self.write(f"metrics:{round_}", rows)

    def _evaluation(self, round_: int) -> None:
        rows = []
        for split, languages in (("test", self.languages), ("authored", self.languages), ("unseen", UNSEEN)):
            for language in ["all", *languages]:
                n = 40 * (len(languages) if language == "all" else 1)
                start = self.random.uniform(0.5, 0.62)
                for model, value in (("before", start), ("after", start + self.random.gauss(0.06, 0.05))):
                    half = 1.96 * math.sqrt(value * (1 - value) / n)
                    rows.append(_measure(model, split, language, "accuracy", value, n, half))
                gain = value - start
                rows.append(_measure("after vs before", split, language, "accuracy_change", gain, n, half / 2, -1.0))
                if split != "authored":
                    win = ("after vs before", split, language, "win_rate_self_judged", value - 0.05, n, half)
                    rows.append(_measure(*win))
                    rows.append(_measure("after", split, language, "answer_language", 0.97, n, 0.02))
                    rows.append(_measure("before", split, language, "answer_language", 0.98, n, 0.02))
        self.write(f"evaluation:{round_}", rows)

    def _manifests(self, round_: int) -> None:
        n = max(self.per_language, 30)  # enough rows for every reason below
        steps: list[tuple[str, str, int, dict[str, int], float, dict[str, float]]] = [
            ("generate", "prompt", n + 2, {"prompt_too_long": 2}, 312.4, {"tokens": 91234.0, "tokens_per_s": 292.0}),
            ("judge", "candidate", 3 * n, {"low_mass": 5}, 181.0, {"mean_mass": 0.93}),
            ("pairs", "candidate", 3 * n - 5, {"truncated": 11, "wrong_language": 7, "empty": 1}, 0.8, {}),
            ("pairs", "prompt", n, {"tie": 9, "too_few_candidates": 3}, 0.0, {}),
            ("gradients", "pair", n - 12, {}, 402.0, {"pairs_per_s": 0.9}),
            ("conflict", "pair", n - 12, {}, 4.1, {"conflicts_p_value": 1.0}),
            ("select", "pair", n - 12, {"below_cut": (n - 12) // 2}, 0.3, {}),
            ("train", "pair", n - 12 - (n - 12) // 2, {}, 655.0, {"steps": 60.0}),
            ("evaluate", "prompt", 6, {}, 240.0, {}),
        ]
        if round_ == 0:
            steps.insert(0, ("prompts", "row", n + 9, {"duplicate": 4, "low_confidence": 3}, 2.2, {}))
        tallies: dict[str, list[Tally]] = {}
        extra: dict[str, tuple[float, dict[str, float]]] = {}
        for stage, unit, rows_in, dropped, time, stats in steps:
            old = extra.get(stage, (0.0, {}))
            extra[stage] = (old[0] + time, old[1] | stats)
            for i, language in enumerate(self.languages):
                lost = {reason: count + (i % 3 if count > 2 else 0) for reason, count in dropped.items()}
                failed = 1 if stage == "gradients" and language == "hi" else 0
                kept = rows_in - sum(lost.values()) - failed
                tallies.setdefault(stage, []).append(
                    Tally(unit=unit, language=language, rows_in=rows_in, kept=kept, dropped=lost, failed=failed)
                )
        for stage, mine in tallies.items():
            seconds, stats = extra[stage]
            self.run.manifests.append(
                StageManifest(
                    stage=stage,
                    round=round_,
                    fingerprint="f",
                    content="c",
                    files=[],
                    tallies=mine,
                    stats=stats,
                    seconds=seconds,
                    models={"evaluation_judge": "embedded:qwen2.5-coder-0.5b-instruct"} if stage == "evaluate" else {},
                )
            )


def _measure(
    model: str, split: str, language: str, metric: str, value: float, n: int, half: float, floor: float = 0.0
) -> dict[str, Any]:
    row = {"model": model, "split": split, "language": language, "metric": metric}
    return row | {"value": value, "n": n, "low": max(floor, value - half), "high": min(1.0, value + half)}
