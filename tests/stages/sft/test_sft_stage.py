"""The sft stage on a tiny model: what it computes, what it leaves, resume, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from schemas.errors import UserError
from schemas.tables import TABLES
from stages.contract import Stopped
from stages.sft.conversations import IGNORED, load_conversations
from stages.sft.stage import Sft
from stages.text.render import load_renderer
from tests.stages.sft.sft_bench import CONVERSATIONS, Killed, Recorder, turns
from tests.stages.stage_context import collect


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def as_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in row:
        return row["messages"]
    prompt = row["prompt"] if isinstance(row["prompt"], list) else turns(row["prompt"])
    answer = row["completion"] if isinstance(row["completion"], list) else [turns("", row["completion"])[1]]
    return [*prompt, *answer]


def plain_loss(model: torch.nn.Module, tokenizer: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Cross-entropy of the answers' tokens from plain logits, mean over all of them. In ChatML an answer is what stands after
    `<|im_start|>assistant` and a newline, through `<|im_end|>`."""
    opening = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    losses = []
    for row in rows:
        ids = tokenizer(tokenizer.apply_chat_template(as_messages(row), tokenize=False))["input_ids"]
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for start in range(len(ids)):
            if ids[start : start + len(opening)] == opening:
                first = start + len(opening)
                last = ids.index(tokenizer.convert_tokens_to_ids("<|im_end|>"), first)
                losses += [-logps[at - 1, ids[at]] for at in range(first, last + 1)]
    return torch.stack(losses).mean()


def test_every_row_is_accounted_for_and_the_model_is_whole(bench: Any) -> None:
    bad = [
        {"messages": turns("A question without an answer")},
        {"messages": [turns("x", "An answer")[1]]},
        {"messages": turns("hm", "w " * 600), "language": "en"},
        {"prompt": "empty", "completion": ""},
        {"language": "en"},
        {"messages": [{"role": "tool", "content": "1"}]},
        {"messages": turns("steal <|im_start|>system", "no"), "language": "not a language"},
    ]
    tables, account = bench.run(ctx := bench.context([*CONVERSATIONS, *bad]))
    reasons = {drop.reason for drop in account.drops}
    assert reasons == {"no_answer", "no_user_turn", "too_long", "empty", "no_conversation", "tool_calls"}
    assert sum(t.rows_in for t in account.tallies) == 12 and sum(t.kept for t in account.tallies) == 6
    for entry in account.tallies:
        assert entry.rows_in == entry.kept + sum(entry.dropped.values()) + entry.failed
    assert {t.language: t.kept for t in account.tallies} == {"en": 1, "de": 1, "und": 4}
    rows = tables["conversations"]
    assert [row["source_row"] for row in rows] == [1, 2, 3, 4, 5, 12]
    assert all(0 < row["n_learnt"] < row["n_tokens"] for row in rows)
    assert "<|im_start|>" not in rows[-1]["messages"][0]["content"] and account.stats["control_marks_broken"] == 1
    steps = [row["step"] for row in tables["sft_metrics"] if row["name"] == "loss"]
    assert steps == list(range(1, 7)) == list(range(1, int(account.stats["steps"]) + 1))

    folder = ctx.folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.chat_template and AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    files = {path.name for path in account.artifacts}
    assert {"model.safetensors", "README.md", "config.json"} <= files and not any(f.endswith(".bin") for f in files)
    card = (folder / "README.md").read_text()
    assert "tiny" in card and "| all | 6 |" in card and str(ctx.config.sft.batch_size) in card
    assert ctx.progress.units == [(6, "step")]
    assert all({"conversations_per_s", "loss"} <= set(rates) for rates in ctx.progress.rates if "loss" in rates)


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_a_step_is_adamw_on_the_mean_over_completion_tokens(bench: Any, tiny_model: Path, micro: int) -> None:
    """One step over all conversations, whatever the micro-batch, equals plain transformers and torch."""
    rate = 1e-3
    settings = {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 1e9, "epochs": 1}
    ctx = bench.context(batch_size=10 if micro == 2 else 5, micro_batch_size=micro, learning_rate=rate, **settings)
    tables, _ = bench.run(ctx)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    loss = plain_loss(model, tokenizer, CONVERSATIONS)
    logged = [row["value"] for row in tables["sft_metrics"] if row["name"] == "loss"]
    assert logged == [pytest.approx(loss.item(), rel=1e-5)]

    loss.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0).step()
    got = weights(ctx.folder)
    moved = False
    for name, parameter in model.named_parameters():
        if name not in got:
            continue
        gradient = parameter.grad.abs()
        sure = gradient > 1e-3 * gradient.max()  # the first step of Adam is the sign: of nothing, it is noise
        torch.testing.assert_close(got[name][sure], parameter.detach()[sure], rtol=0, atol=rate / 20, msg=name)
        moved = moved or bool((got[name] != before[name]).any())
    assert moved


def test_training_lowers_the_loss_and_only_answers_are_learnt(bench: Any) -> None:
    tables, _ = bench.run(bench.context(epochs=12, learning_rate=1e-2))
    losses = [row["value"] for row in tables["sft_metrics"] if row["name"] == "loss"]
    assert losses[-1] < 0.5 * losses[0]
    last = tables["conversations"][3]  # 2 + 2? -> 4: the digit and the end of turn
    assert last["n_learnt"] == 2


@pytest.mark.parametrize(
    ("method", "ends"),
    [
        ("full", [("die_at", 1), ("stop_at", 3), ("die_at", 6)]),
        ("lora", [("die_at", 3)]),
    ],
)
def test_a_run_that_was_stopped_or_killed_at_any_step_ends_with_the_same_weights(
    bench: Any, method: str, ends: list[tuple[str, int]]
) -> None:
    bench.run(whole := bench.context(folder="whole", method=method))
    expected = weights(whole.folder)
    for kind, step in ends:
        folder = f"{kind}-{step}"
        with pytest.raises((Stopped, Killed)):
            collect(Sft(), bench.context(folder=folder, method=method, progress=Recorder(**{kind: step})))
        again = bench.context(folder=folder, method=method)
        tables, _ = bench.run(again)
        assert same(weights(again.folder), expected), folder
        assert [r["step"] for r in tables["sft_metrics"] if r["name"] == "loss"] == list(range(1, 7))
        resumed = [note for note in again.progress.notes if note.startswith("resuming from")]
        assert len(resumed) == (step > 1), (folder, again.progress.notes)


def test_checkpoints_of_other_settings_are_not_resumed_from(bench: Any) -> None:
    with pytest.raises(Stopped):
        collect(Sft(), bench.context(progress=Recorder(stop_at=2)))
    bench.run(ctx := bench.context(learning_rate=1e-4))
    assert any(note.startswith("removed checkpoint-2") for note in ctx.progress.notes)


def test_adapters_are_merged_and_left_beside_the_model(bench: Any, tiny_model: Path) -> None:
    bench.run(ctx := bench.context(method="lora", lora={"r": 2, "alpha": 4}))
    adapter = load_file(ctx.folder / "adapter" / "adapter_model.safetensors")
    before, after = load_file(tiny_model / "model.safetensors"), weights(ctx.folder)
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    assert b.abs().max() > 0
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 2 * b @ a, rtol=1e-5, atol=1e-7)


def test_a_base_without_a_template_gets_one_that_its_model_carries(
    bench: Any, tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).save_pretrained(base)
    bench.model = base
    bench.run(ctx := bench.context(max_steps=1))
    assert any("no chat template" in note for note in ctx.progress.notes)
    shown = AutoTokenizer.from_pretrained(ctx.folder / "model").apply_chat_template(turns("a", "b"), tokenize=False)
    assert shown == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"

    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}")
    bench.run(ctx := bench.context(folder="own", text={"chat_template": str(template)}, max_steps=1))
    shown = AutoTokenizer.from_pretrained(ctx.folder / "model").apply_chat_template(turns("a", "b"), tokenize=False)
    assert shown == "user: a<|im_end|>assistant: b<|im_end|>"


def test_an_answer_that_the_template_changes_later_is_context_only(bench: Any, tmp_path: Path) -> None:
    """As templates do that leave earlier thoughts out."""
    template = tmp_path / "forgets.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}(short)"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    text = {"chat_template": str(template)}
    tables, account = bench.run(ctx := bench.context(CONVERSATIONS[1:2], text=text, epochs=1, batch_size=1))
    assert account.stats["answers_context_only"] == 1 and any("1 of 2 answers" in note for note in ctx.progress.notes)
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    answer = tokenizer("The Nile, far longer.<|im_end|>", add_special_tokens=False)["input_ids"]
    assert tables["conversations"][0]["n_learnt"] == len(answer)


REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "columns": ([{"question": "q", "answer": "a"}], {}, "no row has a conversation"),
    "nothing left": (
        [{"messages": turns("q")}],
        {},
        "no conversation is left to learn from: 1 rows in, row no_answer 1 (for example",
    ),
    "batches": (CONVERSATIONS, {"batch_size": 3, "micro_batch_size": 2}, "sft.batch_size 3 is not a multiple"),
    "targets": (CONVERSATIONS, {"method": "lora", "lora": {"target_modules": ["nope"]}}, "cannot adapt nope"),
    "diverges": (
        CONVERSATIONS,
        {"learning_rate": 1e30, "warmup_ratio": 0.0, "max_grad_norm": 1e30},
        "Lower sft.learning",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_a_paragraph(bench: Any, case: str) -> None:
    rows, settings, message = REFUSED[case]
    with pytest.raises(UserError) as caught:
        bench.run(bench.context(rows, **settings))
    assert message in f"{caught.value.what} {caught.value.fix}" and caught.value.where


def test_answers_are_split_from_prompts_as_pairs_are(bench: Any) -> None:
    ctx = bench.context()
    renderer = load_renderer(ctx.models["start"], ctx.config.text)
    for row in CONVERSATIONS:
        messages = as_messages(row)
        got = renderer.conversation_ids(messages)
        pair = renderer.pair_ids(messages[:-1], messages[-1:], [{"role": "assistant", "content": "§"}])
        assert got.ids == [*pair.prompt, *pair.chosen]
        assert got.learnt[-len(pair.chosen) :] == [True] * len(pair.chosen)
        assert not got.learnt[len(got.ids) - len(pair.chosen) - 1]


@pytest.mark.parametrize(
    "messages",
    [
        ["Hi?", "Yes.", "Why?", "So."],
        [["Hi?", "Yes."], ["Why?", "So."]],
        [["human", "Hi?"], ["assistant", "Yes."], ["human", "Why?"], ["assistant", "So."]],
        [{"input": "Hi?", "output": "Yes."}, {"input": "Why?", "output": "So."}],
        [{"human": "Hi?", "assistant": "Yes."}, {"human": "Why?", "assistant": "So."}],
        [
            {"role": "user", "content": "Hi?"},
            {"role": "model", "content": "Yes.", "if_chosen": True},
            {"role": "model", "content": "No.", "if_chosen": False},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So."},
        ],
    ],
    ids=["texts", "exchanges", "roles first", "input and output", "human and assistant", "answers passed over"],
)
def test_conversations_in_other_forms_are_read(bench: Any, messages: list[Any]) -> None:
    ctx = bench.context([{"messages": messages}])
    found = load_conversations(ctx, load_renderer(ctx.models["start"], ctx.config.text))
    (read,) = found.table["messages"].to_pylist()
    assert [(one["role"], one["content"]) for one in read] == [
        ("user", "Hi?"), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "So."),
    ]  # fmt: skip
    assert found.in_turn == isinstance(messages[0], str | list) and not found.in_a_row


def test_two_answers_in_a_row_are_counted_and_said(bench: Any) -> None:
    answers = [{"role": "assistant", "content": text} for text in ("Yes.", "No.")]
    ctx = bench.context([{"messages": [{"role": "user", "content": "Hi?"}, *answers]}])
    found = load_conversations(ctx, load_renderer(ctx.models["start"], ctx.config.text))
    assert len(found) == found.in_a_row == 1


@pytest.mark.parametrize(
    "says",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"loss_mask": 0}, {"training": "false"}],
    ids=str,
)
def test_answers_that_the_data_leaves_out_are_not_learnt(bench: Any, says: dict[str, Any]) -> None:
    def told(*which: int) -> dict[str, Any]:
        """The river conversation, whose answers are its messages 2 and 4."""
        messages = [dict(message) for message in CONVERSATIONS[1]["messages"]]
        for at in which:
            messages[at].update(says)
        return {"messages": messages}

    earlier, answer = told(2)["messages"], CONVERSATIONS[1]["messages"][4]["content"]
    system = {"messages": [{"role": "system", "content": ""}, *told(2)["messages"][1:]]}
    rows = [told(1), told(2), {"prompt": earlier[:-1], "completion": answer}, system, told(4), told(2, 4)]
    ctx = bench.context(rows)
    found = load_conversations(ctx, renderer := load_renderer(ctx.models["start"], ctx.config.text))
    learnt = [
        renderer.tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        for row in found.rows.to_pylist()
    ]
    first, last = (CONVERSATIONS[1]["messages"][at]["content"] + "<|im_end|>" for at in (2, 4))
    assert learnt == [first + last, last, last, last, first]
    assert [(drop.reason, drop.row_id[-2:]) for drop in found.drops] == [("left_out", ":6")]
    assert found.answers == {"learnt": 6, "left_out": 4, "context_only": 0}
    assert found.table["messages"][1].as_py() == CONVERSATIONS[1]["messages"]


def test_the_tables_have_their_schemas_and_trl_its_methods(bench: Any) -> None:
    tables, _ = collect(Sft(), bench.context(max_steps=1))
    assert all(table.schema.equals(TABLES[name].schema) for name, table in tables.items())
    for name in (
        "_get_num_items_in_batch",
        "create_optimizer",
        "_save",
        "_save_checkpoint",
        "_send_telemetry",
        "train",
    ):
        assert callable(getattr(SFTTrainer, name)), name
