"""ALLO in the train stage: masks, forgetting, learning on key tokens; alone, in a sequence of objectives, resumed, refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForTokenClassification

from schemas.errors import UserError
from stages.contract import Account, Context, ModelRef, Rows, Stopped
from stages.gradients.rows import BatchRow
from stages.train.allo.forget import npo_loss
from stages.train.allo.masks import select_entries
from stages.train.allo.rewards import model_rewards
from stages.train.allo.tokens import RejectedTokens, implicit_rewards, key_tokens
from stages.train.confined import ConfinedTrainer
from stages.train.optimizers import ActiveEntries, Protected
from stages.train.session import Session
from stages.train.stage import Train

ALLO = {
    "mask": "warmup",
    "warmup_steps": 2,
    "forget_ratio": 0.1,
    "learn_ratio": 0.2,
    "key_fraction": 0.4,
    "allow_empty_layers": True,
}


DECAYED = {"weight_decay": 0.1, "save_steps": 1}


def allo(**settings: Any) -> dict[str, Any]:
    return {"method": "full", "epochs": 1, "allo": ALLO | settings}


def train(ctx: Context) -> tuple[list[dict[str, Any]], Account]:
    rows, account = Train().run(ctx)
    assert isinstance(rows, Rows) and isinstance(account, Account)
    return rows.data.to_pylist(), account


def weights(ctx: Context) -> dict[str, torch.Tensor]:
    assert ctx.folder is not None
    return load_file(ctx.folder / "model" / "model.safetensors")


def values(metrics: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row["value"]) for row in metrics if row["name"] == name]


@pytest.fixture(scope="module")
def start(tiny_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_folder / "model.safetensors")


@pytest.fixture(scope="module")
def whole(shared_workbench: Any) -> tuple[Any, Context, list[dict[str, Any]], Account]:
    """A run through all phases, and where it ran."""
    ctx = shared_workbench.context("whole", **allo(), **DECAYED)
    return shared_workbench, ctx, *train(ctx)


def gradients(folder: Path, renderer: Any, rows: list[dict[str, Any]], beta: float = 0.1) -> dict[str, torch.Tensor]:
    """Of the mean DPO loss at the reference, by autograd on plain float64 logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"])
        for completion, sign in ((ids.chosen, 1.0), (ids.rejected, -1.0)):
            total = total + sign * token_logps(model, ids.prompt, completion).sum()
    (-0.5 * beta * total / len(rows)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def token_logps(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return logps[torch.arange(len(completion)) + len(prompt) - 1, torch.tensor(completion)]


def largest(scores: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Masks by sorting everything."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    limit = flat.sort(descending=True).values[round(share * len(flat)) - 1]
    return {name: s >= limit for name, s in scores.items()}


def agreement(active: ActiveEntries, masks: dict[str, torch.Tensor]) -> float:
    """Of the selected entries; they may differ where scores are equal up to rounding."""
    both = sum(int((active.mask(n) & m).sum()) for n, m in masks.items())
    return both / sum(int(m.sum()) for m in masks.values())


def test_the_phases_of_a_run(whole: Any, start: dict[str, torch.Tensor]) -> None:
    _, ctx, metrics, account = whole
    assert [s for s, _ in values(metrics, "allo/warmup/loss")] == [1, 2]
    forget, learn = values(metrics, "allo/forget/loss"), values(metrics, "loss")
    assert [s for s, _ in forget] == [3, 4, 5] and [s for s, _ in learn] == [6, 7, 8]
    # the warm-up was undone; references are the models that forgetting and learning start from
    assert forget[0][1] == pytest.approx(math.log(2), abs=1e-6) == learn[0][1]
    assert forget[-1][1] < forget[0][1] and learn[-1][1] < learn[0][1]
    assert values(metrics, "allo/forget/log_ratio")[-1][1] < -0.1
    assert account.stats["steps"] == 8
    assert [(t.language, t.rows_in, t.kept) for t in account.tallies] == [("de", 3, 3), ("en", 3, 3)]
    assert [n for n, unit in ctx.progress.units if unit == "step"] == [8, 6, 3] and ctx.progress.done == 8
    prepared = ctx.folder / "checkpoints/allo/prepared"
    masks = [ActiveEntries.load(prepared / f"{phase}.safetensors") for phase in ("forget", "learn")]
    after, shares = weights(ctx), []
    for active, share in zip(masks, (0.1, 0.2), strict=True):
        on = sum(int(active.mask(name).sum()) for name in start)
        shares.append(on / sum(w.numel() for w in start.values()))
        assert shares[-1] == pytest.approx(share, abs=1e-4)
    assert values(metrics, "allo/forget/mask/active")[0][1] == pytest.approx(shares[0])
    assert values(metrics, "mask/active")[0][1] == pytest.approx(shares[1])
    moved = {name: after[name] != start[name] for name in start}
    for name, changed in moved.items():
        assert not bool(changed[~(masks[0].mask(name) | masks[1].mask(name))].any()), name
    on = sum(int(masks[1].mask(name).sum()) for name in start)
    assert sum(int(changed.sum()) for changed in moved.values()) > 0.9 * on
    card = (ctx.folder / "model" / "README.md").read_text()
    assert "2406.12606" in card and "forgetting" in card


def test_the_stored_tokens_are_those_of_the_rewards(whole: Any) -> None:
    workbench, ctx, _, _ = whole
    table = pl.read_parquet(ctx.folder / "checkpoints/allo/prepared/tokens.parquet")
    model = AutoModelForCausalLM.from_pretrained(workbench.policy, dtype=torch.float64)
    assert len(table) == 6
    for row, stored in zip(workbench.read("curated").to_pylist(), table.iter_rows(named=True), strict=True):
        ids = workbench.renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"])
        with torch.no_grad():
            reference = token_logps(model, ids.prompt, ids.rejected)
        assert stored["ref_token_logps"] == pytest.approx(reference.tolist(), abs=1e-4)
        assert stored["unlearned"] == [reward < 0.5 for reward in stored["reward"]]
        n, keys = len(ids.rejected), stored["key_tokens"]
        assert len(keys) == max(1, round(0.4 * n)) and keys == sorted(keys)
        others = [stored["reward"][t] for t in range(n) if t not in keys]
        assert max(stored["reward"][t] for t in keys) <= min(others)


def test_the_warm_up_selects_what_short_dpo_changes_most(workbench: Any, start: dict[str, torch.Tensor]) -> None:
    """Decay, which moves every weight by its size, has no part in it."""
    plain = workbench.context("plain", method="full", batch_size=6, max_steps=2)
    train(plain)
    after = weights(plain)
    ctx = workbench.context(**allo(forget=False, forget_ratio=0.05), batch_size=6, weight_decay=1.0)
    train(ctx)
    active = ActiveEntries.load(ctx.folder / "checkpoints/allo/prepared/learn.safetensors")
    assert agreement(active, largest({n: (after[n] - start[n]).abs() for n in start}, 0.2)) > 0.98


def test_summed_gradients_are_those_of_autograd(workbench: Any) -> None:
    settings = {"mask": "gradient", "warmup_steps": 1, "forget": False, "forget_ratio": 0.05, "key_fraction": 1.0}
    ctx = workbench.context(**allo(**settings), batch_size=6, micro_batch_size=2, max_grad_norm=1e-6)
    metrics, _ = train(ctx)
    assert [s for s, _ in values(metrics, "allo/gradient/loss")] == [1] and not values(metrics, "allo/warmup/loss")
    assert not (ctx.folder / "checkpoints/allo/prepared/tokens.parquet").exists()  # whole answers, nothing unlearned
    active = ActiveEntries.load(ctx.folder / "checkpoints/allo/prepared/learn.safetensors")
    found = gradients(workbench.policy, workbench.renderer, workbench.read("curated").to_pylist())
    assert agreement(active, largest({n: g.abs() for n, g in found.items()}, 0.2)) > 0.999


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, 6])
def test_stopped_in_any_phase_it_ends_with_the_same_weights(whole: Any, stop_at: int) -> None:
    workbench, ended, metrics, _ = whole
    with pytest.raises(Stopped):
        train(workbench.context(f"halted-{stop_at}", **allo(), **DECAYED, stop_at=stop_at))
    resumed = workbench.context(f"halted-{stop_at}", **allo(), **DECAYED)
    again, account = train(resumed)
    mine, theirs = weights(ended), weights(resumed)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert metrics == again and account.stats["steps"] == 8
    for name in ("forget.safetensors", "learn.safetensors", "tokens.parquet"):
        one, two = (ctx.folder / "checkpoints/allo/prepared" / name for ctx in (ended, resumed))
        assert one.read_bytes() == two.read_bytes()
    assert ("masks and token rewards: made before" in resumed.progress.notes) == (stop_at > 2)  # 2: before its rewards
    assert ("phase forget: done before" in resumed.progress.notes) == (stop_at > 4)


def test_stopped_while_gradients_are_summed(workbench: Any) -> None:
    settings = {
        **allo(mask="gradient", warmup_steps=3, learn=False, learn_ratio=0.1, key_fraction=0.5),
        "save_steps": 1,
    }
    whole, halted = workbench.context("whole", **settings), workbench.context("halted", **settings, stop_at=5)
    metrics, _ = train(whole)  # warm-up for the rewards, gradients for the masks, forgetting alone
    with pytest.raises(Stopped):
        train(halted)
    resumed = workbench.context("halted", **settings)
    assert train(resumed)[0] == metrics
    mine, theirs = weights(whole), weights(resumed)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert {row["step"] for row in metrics if row["name"] == "allo/forget/loss"} == {7, 8, 9}


def test_the_micro_batch_does_not_change_forgetting(workbench: Any) -> None:
    """Pairs with different counts of tokens to unlearn: n is of the whole step."""
    settings = allo(learn=False, learn_ratio=0.1, key_fraction=0.5, forget_epochs=2)
    ends, ratios = [], []
    for micro in (1, 3):
        ctx = workbench.context(f"micro-{micro}", **settings, batch_size=6, micro_batch_size=micro)
        metrics, _ = train(ctx)
        ends.append((weights(ctx), values(metrics, "allo/forget/loss")))
        ratios.append([value for _, value in values(metrics, "allo/forget/log_ratio")])
    for name, value in ends[0][0].items():
        torch.testing.assert_close(value, ends[1][0][name], rtol=1e-3, atol=1e-4)
    assert ends[0][1][0][1] == pytest.approx(math.log(2), abs=1e-6) == ends[1][1][0][1]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3, abs=1e-6) and ratios[0][1] < -1e-3


@pytest.mark.parametrize(("unit", "side"), [("weight", "left"), ("row", "both")])
def test_objectives_in_sequence_under_masks_leak_nothing(workbench: Any, unit: str, side: str) -> None:
    objectives = [{"name": code, "where": f"language = '{code}'"} for code in ("en", "de")]
    sequence = {"objectives": objectives, "q_max": 3, "side": side}
    settings = {**allo(unit=unit, learn_ratio=0.5), "orthalign": sequence, "weight_decay": 0.1, "save_steps": 1}
    with pytest.raises(Stopped):
        train(workbench.context(**settings, stop_at=9))  # learning of the second: 2 + 2 + 2, then 2 + 1
    place = workbench.root / "train" / "checkpoints"
    first = load_file(place / "objective-0" / "model" / "model.safetensors")
    protected = Protected.load(place / "objective-0" / "protected.safetensors")
    ctx = workbench.context(**settings)
    metrics, account = train(ctx)
    end, moved = weights(ctx), 0.0
    prepared = place / "objective-1" / "allo" / "prepared"
    masks = [ActiveEntries.load(prepared / f"{phase}.safetensors") for phase in ("forget", "learn")]
    for name, value in end.items():
        change = value.double() - first[name].double()
        moved += float(change.norm())
        off = ~(masks[0].mask(name) | masks[1].mask(name)).expand(change.shape)
        assert not bool(change[off].any()), name
        for bases, matrix in ((protected.left, change), (protected.right, change.t())):
            if (q := bases.get(name)) is not None:  # the weights are rounded to float32, the displacement is not
                assert float((q.double().T @ matrix).norm()) <= 3e-6 * max(1.0, float(change.norm())), name
    assert moved > 0.1 and account.stats["steps"] == 12
    assert [s for s, _ in values(metrics, "loss")] == [5, 6, 11, 12]
    assert [s for s, _ in values(metrics, "objective/en/reward_accuracy")] == [6, 12]
    assert [v for _, v in values(metrics, "mask/frozen_columns")] and values(metrics, "merge/projected")
    assert not (place / "objective-1" / "allo" / "forgotten").exists()  # the objective's model is what counts


def test_the_share_of_frozen_columns_is_said_as_a_phase_begins(workbench: Any) -> None:
    objectives = [{"name": code, "where": f"language = '{code}'"} for code in ("en", "de")]
    sequence = {"objectives": objectives, "energy": 1.0, "side": "right"}  # 16 of 32 inputs
    ctx = workbench.context("some", **allo(forget_ratio=0.5, learn_ratio=0.6), orthalign=sequence)
    metrics, _ = train(ctx)
    frozen = [v for _, v in values(metrics, "allo/forget/mask/frozen_columns")]
    said = [note for note in ctx.progress.notes if "cannot move" in note]
    assert 0 < frozen[-1] < 1 and len(said) == 2 and said[0].startswith(f"{frozen[-1]:.1%} of the columns")


def test_masks_that_leave_nothing_beside_the_subspaces_are_refused() -> None:
    trainer, said = ConfinedTrainer.__new__(ConfinedTrainer), list[str]()
    trainer._tell = said.append
    for frozen in (0.0, 0.999):
        trainer._after_first(SimpleNamespace(compile_seconds=0.0, frozen_columns=frozen))
    assert len(said) == 1 and said[0].startswith("99.9% of the columns")
    with pytest.raises(UserError, match="cannot move: no matrix is trained") as error:
        trainer._after_first(SimpleNamespace(compile_seconds=0.0, frozen_columns=1.0))
    assert error.value.where == "train.allo, train.orthalign" and "q_max" in error.value.fix


def make_classifier(folder: Path, tokenizer: Any, labels: int, good: float = 0.0) -> ModelRef:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config.num_labels = labels
    model = LlamaForTokenClassification(config)
    nn.init.normal_(model.score.weight)
    if good:
        nn.init.zeros_(model.score.weight)
        nn.init.constant_(model.score.bias, good)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelRef("judge-of-tokens", folder, f"digest-{labels}-{good}")


def rewarded(workbench: Any, ref: ModelRef, kind: str, **settings: Any) -> Any:
    ctx = workbench.context(**allo(token_reward=kind, reward_model=str(ref.path), **settings))
    ctx.models["token_reward"] = ref
    return ctx


def rejected(workbench: Any) -> list[BatchRow]:
    found = []
    for row in workbench.read("curated").to_pylist():
        ids = workbench.renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"])
        found.append(BatchRow(tuple(ids.prompt), tuple(ids.rejected)))
    return found


@pytest.mark.parametrize("labels", [1, 2])
def test_token_rewards_of_a_classifier(workbench: Any, tmp_path: Path, labels: int) -> None:
    tokenizer, rows = workbench.renderer.tokenizer, rejected(workbench)
    ref = make_classifier(tmp_path / "classifier", tokenizer, labels)
    ctx = rewarded(workbench, ref, "classifier")
    found = model_rewards(Session.of(ctx, ctx.config.train, workbench.model), rows, [])
    model = LlamaForTokenClassification.from_pretrained(str(ref.path), dtype=torch.float64)
    for row, reward in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row.prompt + row.completion])).logits[0, len(row.prompt) :]
        good = logits[:, 0] if labels == 1 else logits[:, 1] - logits[:, 0]
        assert reward.tolist() == pytest.approx(torch.sigmoid(good).tolist(), abs=1e-5)


def test_token_rewards_of_a_model_trained_by_dpo(workbench: Any, tmp_path: Path) -> None:
    tokenizer, rows = workbench.renderer.tokenizer, rejected(workbench)
    models = [AutoModelForCausalLM.from_pretrained(workbench.policy, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, dtype=torch.float64))
        logps = [[token_logps(m, list(r.prompt), list(r.completion)) for r in rows] for m in models]
    models[1].save_pretrained(tmp_path / "dpo")
    tokenizer.save_pretrained(tmp_path / "dpo")
    ctx = rewarded(workbench, ModelRef("dpo", tmp_path / "dpo", "digest-of-dpo"), "dpo_model", beta=0.5)
    found = model_rewards(Session.of(ctx, ctx.config.train, workbench.model), rows, logps[0])
    for reward, reference, trained in zip(found, *logps, strict=True):
        assert reward.tolist() == pytest.approx(torch.sigmoid(0.5 * (trained - reference)).tolist(), abs=1e-4)


def test_a_reward_model_needs_no_warm_up_of_its_own(workbench: Any, tmp_path: Path) -> None:
    ref = make_classifier(tmp_path / "classifier", workbench.renderer.tokenizer, 1)
    ctx = rewarded(workbench, ref, "classifier", mask="gradient", warmup_steps=1)
    metrics, account = train(ctx)
    assert not values(metrics, "allo/warmup/loss") and account.stats["steps"] == 1 + 3 + 3


@pytest.mark.parametrize(
    ("labels", "kind", "words"),
    [(3, "classifier", "3 labels"), (0, "classifier", "no token classifier"), (-1, "dpo_model", "another vocabulary")],
)
def test_reward_models_of_no_use_are_refused(
    workbench: Any, tmp_path: Path, labels: int, kind: str, words: str
) -> None:
    folder = tmp_path / "reward"
    tokenizer = workbench.renderer.tokenizer
    if labels > 0:
        ref = make_classifier(folder, tokenizer, labels)
    elif labels == 0:
        ref = workbench.model
    else:
        make_classifier(folder, tokenizer, 1)
        (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<|im_start|>", "<|begin|>"),
            encoding="utf-8",
        )
        ref = ModelRef("other", folder, "digest-of-other")
    ctx = rewarded(workbench, ref, kind)
    with pytest.raises(UserError, match=words) as error:
        train(ctx)
    assert error.value.where == "train.allo.reward_model" and not ctx.progress.done


def test_nothing_to_forget_is_refused(workbench: Any, tmp_path: Path) -> None:
    ref = make_classifier(tmp_path / "classifier", workbench.renderer.tokenizer, 1, good=5.0)
    with pytest.raises(UserError, match="nothing to forget"):
        train(rewarded(workbench, ref, "classifier"))


def test_a_matrix_without_a_selected_weight_is_refused_by_name(workbench: Any) -> None:
    settings = allo(forget_ratio=0.001, allow_empty_layers=False)
    with pytest.raises(UserError, match=r"for example [a-z_.0-9]*weight") as error:
        train(workbench.context(**settings))
    assert error.value.where == "train.allo.forget_ratio"


def test_rows_are_selected_whole_and_vectors_are_one_row() -> None:
    parameters = {"w": nn.Parameter(torch.zeros(6, 4)), "bias": nn.Parameter(torch.zeros(5))}
    scores = {"w": torch.ones(6, 4), "bias": torch.full((5,), 3.0)}
    scores["w"][2], scores["w"][5, 0] = 2.0, 100.0  # means 2 and 25.75
    active, line = select_entries(parameters, scores.__getitem__, 2 / 7, "row", "learn_ratio", False)
    assert active.mask("w").flatten().tolist() == [False] * 5 + [True] and active.mask("bias").tolist() == [True]
    assert line == "learn_ratio 0.285714: 9 of 29 weights are trained"
    with pytest.raises(UserError, match="for example w"):
        select_entries(parameters, {"w": torch.ones(6, 4), "bias": scores["bias"]}.__getitem__, 1e-9, "row", "x", False)


def test_a_row_of_a_stack_of_experts_is_a_row_of_one_expert() -> None:
    parameters = {"experts": nn.Parameter(torch.zeros(2, 3, 4)), "convolution": nn.Parameter(torch.zeros(3, 1, 4))}
    scores = {name: torch.ones_like(p) for name, p in parameters.items()}
    scores["experts"][1, 2], scores["convolution"][0] = 2.0, 3.0
    active, line = select_entries(parameters, scores.__getitem__, 2 / 9, "row", "learn_ratio", False)
    assert active.mask("experts").nonzero().tolist() == [[1, 2, 0]]
    assert active.mask("convolution").nonzero().tolist() == [[0, 0, 0]]
    assert line == "learn_ratio 0.222222: 8 of 36 weights are trained"
    for name, p in parameters.items():
        active.check(name, p)


def test_forgetting_starts_at_log_2_and_lowers_what_has_a_low_reward() -> None:
    """Polarity: descent lowers the probability of the tokens with w = 1, and of no other."""
    logits = nn.Parameter(torch.randn(2, 5, 7))
    targets, weights = torch.randint(7, (2, 5)), torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 1, 1, 0]])

    def logps() -> torch.Tensor:
        return logits.log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]

    reference = logps().detach()
    loss = npo_loss(logps(), reference, weights, 0.1, weights.sum())
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    with torch.no_grad():
        assert logits.grad is not None
        logits.sub_(logits.grad, alpha=0.1)
    change = logps().detach() - reference
    assert bool((change[weights == 1] < 0).all()) and not bool(change[weights == 0].any())
    assert float(npo_loss(reference, reference, torch.zeros(2, 5), 0.1, 0)) == 0.0


def test_a_token_the_warmed_model_likes_less_has_a_low_reward() -> None:
    rewards = implicit_rewards(torch.tensor([-3.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0, -3.0]), 0.5)
    assert rewards.tolist() == pytest.approx([1 / (1 + math.e), 0.5, math.e / (1 + math.e)])
    table = RejectedTokens.chosen_by([rewards], [torch.zeros(3)], 0.5)
    assert table.weights().to_pylist() == [[1.0, 0.0, 0.0]] and table.column("key_tokens").to_pylist() == [[0, 1]]


def test_tokens_of_answers_of_any_length_are_theirs(tmp_path: Path) -> None:
    rows = [[0.7, 0.2, 0.5, 0.2], [0.9], [0.1, 0.4]]
    logps = [torch.arange(len(row), dtype=torch.float32) - 3 for row in rows]
    made = RejectedTokens.chosen_by([torch.tensor(row, dtype=torch.float64) for row in rows], logps, 0.5)
    made.save(tmp_path / "tokens.parquet")
    loaded = RejectedTokens.load(tmp_path / "tokens.parquet")
    assert loaded.table.equals(made.table) and loaded.column("reward").to_pylist() == rows
    assert loaded.column("unlearned").to_pylist() == [[False, True, False, True], [False], [True, True]]
    assert loaded.column("key_tokens").to_pylist() == [[1, 3], [0], [0]]
    assert loaded.column("ref_token_logps").to_pylist() == [lp.tolist() for lp in logps]
    assert loaded.weights().to_pylist() == [[0.0, 1.0, 0.0, 1.0], [0.0], [1.0, 1.0]]
    assert loaded.counts() == (7, 4, 1)


@given(st.lists(st.sampled_from([0.1, 0.2, 0.5]), min_size=1, max_size=40), st.floats(1e-6, 1.0))
def test_key_tokens_are_the_lowest_with_ties_by_position(rewards: list[float], fraction: float) -> None:
    keys = key_tokens(torch.tensor(rewards, dtype=torch.float64), fraction).tolist()
    assert keys == sorted(set(keys)) and len(keys) == max(1, round(fraction * len(rewards)))
    for t, reward in enumerate(rewards):
        if t not in keys:
            assert all(rewards[k] < reward or (rewards[k] == reward and k < t) for k in keys)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (allo(key_fraction=0), "key_fraction"),
        (allo(forget_ratio=0), "forget_ratio"),
        (allo(mask="none", forget_ratio=0.2), "has no use with train.allo.mask: none"),
        (allo() | {"method": "lora"}, "LoRA factor"),
        (allo(forget=False, learn=False), "nothing would be trained"),
        (allo(forget=False, forget_ratio=0.2), "forget_ratio has no use"),
        (allo(learn=False, learn_ratio=0.2), "learn_ratio has no use"),
        (allo(learn=False) | {"epochs": 2}, "train.epochs is of learning.* set train.allo.forget_epochs"),
        (allo(learn=False) | {"max_steps": 5}, "train.max_steps is of learning.* set train.allo.forget_max_steps"),
        (allo(forget_max_steps=0), "forget_max_steps is 0"),
        (allo(token_reward="classifier"), "needs train.allo.reward_model"),
        (allo(reward_model="x"), "reward_model has no use with train.allo.token_reward: implicit"),
        (allo() | {"optimizer": "anchor", "merge": {"alpha": 0.1}}, "anchor"),
        (allo() | {"reference": "initial"}, "contradict"),
        (allo() | {"sections": {"loss": {"alpha": 0.1}}}, "loss.alpha"),
        (allo() | {"sections": {"loss": {"type": "hinge"}}}, "loss.type is hinge"),
        (
            allo() | {"orthalign": {"objectives": [{"name": n, "where": "true"} for n in "ab"], "side": "both"}},
            "no product of the two",
        ),
    ],
)
def test_settings_without_sense_are_refused(workbench: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        workbench.context(**settings)


def test_a_damaged_result_of_a_phase_is_made_again(whole: Any) -> None:
    workbench, _, metrics, _ = whole
    with pytest.raises(Stopped):
        train(workbench.context("damaged", **allo(), **DECAYED, stop_at=7))
    prepared = workbench.root / "damaged/checkpoints/allo/prepared"
    (prepared / "learn.safetensors").write_bytes(b"half")
    marker = json.loads((prepared / "complete.json").read_text())
    assert set(marker["files"]) == {"forget.safetensors", "learn.safetensors", "tokens.parquet", "history.json"}
    assert train(workbench.context("damaged", **allo(), **DECAYED))[0] == metrics
