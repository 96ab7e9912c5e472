"""Real gradients of a small model trained for seconds: flipped labels are found by the other pairs, in both languages."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from benchmarks.planted.damage import Damage, plant
from benchmarks.planted.figures import by_language
from benchmarks.planted.scoring import Setting, rank_all, score
from benchmarks.planted.sketches import Sketches, messages
from benchmarks.planted.texts import make_pairs
from stages.gradients.batching import TokenBudget
from stages.gradients.cuts import COLUMNS
from stages.gradients.layers import select_layers
from stages.gradients.projections import SketchLayout
from stages.gradients.rows import Pair
from stages.gradients.sketcher import Sketcher

LANGUAGES = ["en", "de"]


def token_pairs(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    found = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(messages(row["prompt"]), add_generation_prompt=True, tokenize=False)
        ids = [
            tokenizer(text)["input_ids"]
            for text in (prompt, row["chosen"] + "<|im_end|>", row["rejected"] + "<|im_end|>")
        ]
        found.append(Pair(*(tuple(i) for i in ids)))
    return found


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The tiny model after some steps of language modelling on questions (of another seed) with their true answers."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    pairs = token_pairs(make_pairs(LANGUAGES, 100, "easy", seed=77), tiny_tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        rows = [
            pairs[i].prompt + pairs[i].chosen for i in torch.randint(0, len(pairs), (16,), generator=generator).tolist()
        ]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([row + (0,) * (longest - len(row)) for row in rows])
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def sketch(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, contrast: str) -> Sketches:
    rows = make_pairs(LANGUAGES, 40, contrast)
    pairs = token_pairs(rows, tokenizer)
    layout = SketchLayout.plan(select_layers(model).layers, 1024)
    with Sketcher(model, layout, seed=0) as sketcher:
        got = sketcher.run(pairs, TokenBudget(4096))
    frame = pl.DataFrame(rows).with_columns(
        pair_id=pl.int_range(pl.len()).cast(pl.String),
        norm=got.sketch_ND.norm(dim=1).numpy(),
        n_chosen=pl.Series([len(pair.chosen) for pair in pairs]),
        n_rejected=pl.Series([len(pair.rejected) for pair in pairs]),
        logp_chosen=got.logp_chosen_N.numpy(),
        logp_rejected=got.logp_rejected_N.numpy(),
        ref_logp_chosen=got.logp_chosen_N.numpy(),
        ref_logp_rejected=got.logp_rejected_N.numpy(),
        **dict.fromkeys(COLUMNS, pl.lit(None, pl.Float32)),  # relevance is not what is tried here
    )
    return Sketches(frame, got.sketch_ND, LANGUAGES)


def found(sketches: Sketches, kind: str, seeds: int) -> float:
    """Mean AUROC of the score over seeds."""
    figures = []
    for seed in range(seeds):
        damaged = plant({"easy": sketches}, Damage("easy", kind, 0.25, seed))
        value_N = torch.from_numpy(rank_all(score(damaged, Setting()), ("conflict",))["conflict"].to_numpy().copy())
        ones = torch.ones(1, sketches.frame.height // 2, dtype=torch.float64)
        figures.append(float(by_language(value_N, damaged.damaged_N, 2, ones).mean()))
    return sum(figures) / seeds


def test_flips_are_found_in_the_gradients_of_a_model_that_learned_something_and_only_there(
    tiny_model: Path, trained: torch.nn.Module, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Measurement: 0.89 after 200 steps, 0.74 after 60, 0.42 untrained; 0.50 where nothing is planted."""
    sketches = sketch(trained, tiny_tokenizer, "easy")
    assert found(sketches, "flip", seeds=4) > 0.8
    assert abs(found(sketches, "null", seeds=12) - 0.5) < 0.1
    untrained = sketch(AutoModelForCausalLM.from_pretrained(tiny_model), tiny_tokenizer, "easy")
    assert found(untrained, "flip", seeds=4) < 0.65
