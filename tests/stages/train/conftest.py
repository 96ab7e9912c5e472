"""A tiny random Llama with a byte-level ChatML tokenizer, on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from schemas.config import RunConfig
from schemas.config.model import TextConfig
from schemas.tables import TABLES, gradients_schema
from stages.contract import Context, ModelRef
from stages.text.render import load_renderer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    return fast


def make_model(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "policy"
    tokenizer = make_tokenizer()
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LANGUAGES = ["en", "de"]


@dataclass
class Recorder:
    """A Progress that remembers, and asks to stop once `stop_at` steps were done (or units of `stop_unit`)."""

    stop_at: int | None = None
    stop_unit: str = "step"
    done: int = 0
    units: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rates: list[dict[str, float]] = field(default_factory=list)

    def total(self, amount: int, unit: str) -> None:
        self.units.append((amount, unit))

    def advance(self, amount: int = 1, **rates: float) -> None:
        if not self.units or self.units[-1][1] == self.stop_unit:
            self.done += amount
        self.rates.append(rates)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def stop(self) -> bool:
        return self.stop_at is not None and self.done >= self.stop_at


def messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


class Workbench:
    """A train context on the tiny model: curated and gradients on disk, references from plain float64 logits."""

    def __init__(self, root: Path, policy: Path, n_pairs: int = 6) -> None:
        self.root, self.policy = root, policy
        self.model = ModelRef("tiny", policy, "digest-of-tiny")
        self.renderer = load_renderer(self.model, TextConfig())
        rows = [
            {
                "pair_id": f"pair{i}",
                "prompt_id": f"prompt{i}",
                "group_id": f"group{i}",
                "language": LANGUAGES[i % 2],
                "prompt": messages("user", f"Say {i} <b>*now*</b>"),
                "chosen": messages("assistant", f"{i}!" * (1 + i % 3)),
                "rejected": messages("assistant", f"no {i}"),
                "chosen_score": 4.0,
                "rejected_score": 1.0,
                "conflict_score": 0.5,
            }
            for i in range(n_pairs)
        ]
        self.write("curated", pa.Table.from_pylist(rows, schema=TABLES["curated"].schema))
        self.write("gradients", self.gradients(rows, policy))
        held_out = [{**row, "pair_id": f"dev-{row['pair_id']}", "split": "dev"} for row in rows[:4]]
        pairs = [{"split": "train", **row, "round": 0, "source": "generated"} for row in [*rows, *held_out]]
        self.write("pairs", pa.Table.from_pylist(pairs, schema=TABLES["pairs"].schema))

    def write(self, name: str, table: pa.Table) -> None:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / "part-00000.parquet")

    def read(self, name: str) -> pa.Table:
        return pq.read_table(self.root / name / "part-00000.parquet")

    def gradients(self, rows: list[dict[str, Any]], reference: Path) -> pa.Table:
        model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float64)

        def logprob(prompt: list[int], completion: list[int]) -> float:
            with torch.no_grad():
                logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            return sum(float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(completion))

        out = []
        for row in rows:
            ids = self.renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"])
            chosen, rejected = logprob(ids.prompt, ids.chosen), logprob(ids.prompt, ids.rejected)
            out.append(
                {
                    "pair_id": row["pair_id"],
                    "group_id": row["group_id"],
                    "language": row["language"],
                    "split": "train",
                    "sketch": bytes(8),
                    "norm": 1.0,
                    "logp_chosen": chosen,
                    "logp_rejected": rejected,
                    "ref_logp_chosen": chosen,
                    "ref_logp_rejected": rejected,
                    "n_prompt": len(ids.prompt),
                    "n_chosen": len(ids.chosen),
                    "n_rejected": len(ids.rejected),
                    "ids_hash": ids.hash(),
                }
            )
        return pa.Table.from_pylist(out, schema=gradients_schema(4))

    def context(self, folder: str = "train", stop_at: int | None = None, round_: int = 0, **train: Any) -> Context:
        """`train` overrides fields of the train section; `other` sections may be given as dicts."""
        sections = train.pop("sections", {})
        length = {} if "max_steps" in train else {"epochs": 2}
        config = RunConfig.model_validate(
            {
                "name": "tiny-run",
                "languages": {"seen": LANGUAGES},
                "model": {"policy": str(self.policy), "dtype": "float32"},
                "engine": {"kind": "transformers"},
                "prompts": {"sources": [{"path": "unused.jsonl"}]},
                "execution": {"deterministic": True},
                **sections,
                "train": {"batch_size": 2, "micro_batch_size": 1, "learning_rate": 1e-2, **length, **train},
            }
        )
        progress = Recorder(stop_at)
        path = self.root / folder
        path.mkdir(exist_ok=True)
        return Context(
            config=config,
            round=round_,
            inputs={
                name: [self.root / name.partition(":")[0] / "part-00000.parquet"]
                for name in ("curated", "gradients", "pairs", "pairs:0")
            },
            models={"policy": self.model, "reference": self.model},
            progress=progress,
            folder=path,
            stop=progress.stop,
        )


@pytest.fixture(scope="module")
def shared_workbench(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Workbench:
    """For a run that several tests of a file look at, each in folders of its own."""
    return Workbench(tmp_path_factory.mktemp("shared"), tiny_folder)


@pytest.fixture
def workbench(tmp_path: Path, tiny_folder: Path) -> Workbench:
    return Workbench(tmp_path, tiny_folder)
