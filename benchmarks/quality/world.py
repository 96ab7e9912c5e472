"""The models a table starts from: pretrained and fine-tuned here, from a seed, in under two minutes; or the user's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.corpus import KEPT, Questions, Turn, running_text, true_turns, tuning_turns
from schemas.config.model import TextConfig
from stages.contract import ModelRef
from stages.gradients.rows import BatchRow
from stages.models.resolve import resolve
from stages.text.render import Renderer, load_renderer

Say = Callable[[str], None]
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DONE = "done.json"


@dataclass(frozen=True)
class Size:
    """How much is trained: model width and layers, steps of pretraining and of fine-tuning, questions a kind, steps of a phase of
    preference training."""

    hidden: int = 128
    layers: int = 2
    vocabulary: int = 2048
    pretraining: int = 250
    tuning: int = 400
    questions: tuple[int, int, int] = (16, 12, 6)
    steps: int = 30
    learning_rate: float = 5e-4


@dataclass(frozen=True)
class World:
    """What every method of a table shares. text: held-out running text as ids; task: held-out turns of the kinds only fine-tuning
    saw. base is None for a real model without one: methods that need it cannot be run."""

    seed: int
    folder: Path
    size: Size
    base: ModelRef | None
    sft: ModelRef
    questions: Questions
    dtype: str = "float32"

    @property
    def renderer(self) -> Renderer:
        """Of the fine-tuned model; all models of a world share the tokenizer."""
        return load_renderer(self.sft, TextConfig())

    def rows(self, turns: Sequence[Turn]) -> list[BatchRow]:
        """Token ids of question and answer."""
        renderer = self.renderer
        return [_row(renderer, turn) for turn in turns]

    def task(self) -> list[BatchRow]:
        """True answers to held-out questions of kinds that no preference pair is about."""
        return self.rows(true_turns(self.questions.test, KEPT))

    def text(self) -> list[BatchRow]:
        """Held-out running text; the first token is the prompt."""
        tokenizer = self.renderer.tokenizer
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:256] for text in running_text(held_out=True)]
        return [BatchRow(tuple(row[:1]), tuple(row[1:])) for row in ids if len(row) > 1]


def own_world(work: Path, seed: int, size: Size, say: Say) -> World:
    """Pretrain and fine-tune a model of at most 5M parameters, or find the one a former call left."""
    folder = work / f"seed-{seed}"
    questions = Questions.draw(seed, *size.questions)
    if not (folder / _DONE).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _make(folder, seed, size, questions, say)
    base, sft = (resolve(str(folder / name), cache=work / "cache") for name in ("base", "sft"))
    return World(seed, folder, size, base, sft, questions)


def real_world(work: Path, seed: int, size: Size, model: str, base: str | None) -> World:
    """A user's own fine-tuned model, with the pretrained one it was made from if there is one."""
    folder = work / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    found = None if base is None else resolve(base)
    return World(seed, folder, size, found, resolve(model), Questions.draw(seed, *size.questions), "bfloat16")


def _make(folder: Path, seed: int, size: Size, questions: Questions, say: Say) -> None:
    texts = running_text(held_out=False)
    turns = tuning_turns(questions, seed)
    tokenizer = _tokenizer(texts + [line for turn in turns for line in (turn.prompt, turn.answer)], size.vocabulary)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    if count > 5_000_000:
        raise ValueError(f"the sanity check's model has {count} parameters, more than 5M")
    generator = torch.Generator().manual_seed(seed)
    stream = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"] + [0]]
    blocks = torch.tensor(stream[: len(stream) // 128 * 128]).view(-1, 128)
    all_N = torch.ones(len(blocks), dtype=torch.long)

    def text_batch(rows: int) -> Tensor:
        return blocks[torch.randint(0, len(all_N), (rows,), generator=generator)]

    say(f"seed {seed}: {count:,} parameters, {len(stream):,} tokens of running text, {len(turns)} conversations")
    losses = _learn(model, lambda: (blocks_ := text_batch(12), blocks_), size.pretraining, 4e-3)
    say(f"seed {seed}: pretrained, loss {losses:.3f}")
    _save(model, tokenizer, folder / "base")
    renderer = load_renderer(resolve(str(folder / "base"), cache=folder.parent / "cache"), TextConfig())
    rows = [_row(renderer, turn) for turn in turns]

    def mixed() -> tuple[Tensor, Tensor]:
        """Sixteen conversations (loss on the answers) and four half blocks of running text."""
        picked = [rows[i] for i in torch.randint(0, len(rows), (16,), generator=generator).tolist()]
        longest = max(64, *(len(row) for row in picked))
        ids, labels = torch.zeros(20, longest, dtype=torch.long), torch.full((20, longest), -100)
        for place, row in enumerate(picked):
            tokens = torch.tensor(row.prompt + row.completion)
            ids[place, : len(tokens)] = tokens
            labels[place, len(row.prompt) : len(tokens)] = tokens[len(row.prompt) :]
        ids[16:, :64] = labels[16:, :64] = text_batch(4)[:, :64]
        return ids, labels

    losses = _learn(model, mixed, size.tuning, 4e-3)
    say(f"seed {seed}: fine-tuned, loss {losses:.3f}")
    _save(model, tokenizer, folder / "sft")
    (folder / _DONE).write_text(json.dumps({"parameters": count, "tokens": len(stream)}), encoding="utf-8")


def _learn(model: LlamaForCausalLM, batch: Callable[[], tuple[Tensor, Tensor]], steps: int, lr: float) -> float:
    """Language modelling with plain AdamW, the rate falling linearly; the mean loss of the last tenth."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 20) * (1 - s / steps))
    losses = []
    for _ in range(steps):
        ids, labels = batch()
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _row(renderer: Renderer, turn: Turn) -> BatchRow:
    answer = [{"role": "assistant", "content": turn.answer}]
    ids = renderer.pair_ids([{"role": "user", "content": turn.prompt}], answer, answer)
    return BatchRow(tuple(ids.prompt), tuple(ids.chosen))


def _tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=1024,
    )
    fast.chat_template = _CHATML
    return fast


def _save(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
