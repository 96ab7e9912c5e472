"""Shared fixtures: a tiny random chat model on disk, for fast tests of everything that needs one."""

from __future__ import annotations

import gc
import json
import os
import signal
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a core a worker, before torch reads it: threads of two would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of tests started in the background, and then of what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """What is loaded by now stays: the full garbage collections that TRL and vLLM ask for pass it over (2/3 of the
    time of a training test otherwise)."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def crew() -> str:
    """Where workers live; tests over both say so (`tests.crews`)."""
    return "local"


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """See `make_tokenizer`."""
    pytest.importorskip("transformers")
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_tokenizer) -> Path:
    """See `make_model`."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama", tiny_tokenizer)


def make_tokenizer():
    """A byte-level BPE tokenizer of 1,024 tokens with a ChatML template, trained on our own prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = [
        json.loads(line)["prompt"]
        for path in sorted(files("data").joinpath("prompts").iterdir(), key=lambda p: p.name)
        if path.name.endswith(".jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=2048,
    )
    fast.chat_template = CHATML
    return fast


def make_model(folder: Path, tokenizer) -> Path:
    """A folder with a random two-layer Llama (float32) and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: at the end no process of pytest-xdist is left alone with one of them."""
    long = ("tests/end_to_end/", "tests/stages/train/", "tests/stages/engines/", "tests/pipeline/")
    items.sort(key=lambda item: not item.nodeid.startswith(long))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest-xdist a file's tests share a worker, and so do the end-to-end tests, whose one whole run is dear.

    (The real model's are apart. `--dist loadgroup` does nothing with pytest 9.2 and pytest-xdist 3.8.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if "end_to_end" not in file or "e2e_real" in file else "end_to_end"

    return ByFile(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist ended: count what its fuzz tests ran."""
    from fuzzing import OUTCOMES

    OUTCOMES.update(getattr(node, "workeroutput", {}).get("fuzz", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist: hand over what its fuzz tests ran."""
    from fuzzing import OUTCOMES

    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fuzz"] = dict(OUTCOMES)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the fuzz tests of this session ran."""
    from fuzzing import OUTCOMES

    for outcome, count in sorted(OUTCOMES.items()):
        terminalreporter.write_line(f"fuzz, {outcome}: {count:,}")
