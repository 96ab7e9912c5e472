"""Objectives in sequence: later ones stay out of the earlier ones' subspaces, everything is measured, resumed, refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.errors import UserError
from stages.contract import Account, Context, Rows, Stopped
from stages.train.optimizers import trust
from stages.train.optimizers.change import Change, spectral_norm
from stages.train.optimizers.subspace import Protected
from stages.train.orthalign import fell_within, fewest
from stages.train.stage import Train

EN, DE = {"name": "english", "where": "language = 'en'"}, {"name": "german", "where": "language = 'de'"}


def sequence(*objectives: dict[str, str], **settings: Any) -> dict[str, Any]:
    return {"objectives": list(objectives or (EN, DE)), "q_max": 4, **settings}


def train(ctx: Context) -> tuple[list[dict[str, Any]], Account]:
    rows, account = Train().run(ctx)
    assert isinstance(rows, Rows) and isinstance(account, Account)
    return rows.data.to_pylist(), account


def weights(ctx: Context, place: str = "model") -> dict[str, torch.Tensor]:
    assert ctx.folder is not None
    return load_file(ctx.folder / place / "model.safetensors")


def values(metrics: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row["value"]) for row in metrics if row["name"] == name]


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_second_objective_leaves_the_first_ones_directions_alone(workbench: Any, method: str, side: str) -> None:
    settings = {"method": method, "orthalign": sequence(side=side)}
    with pytest.raises(Stopped):
        train(workbench.context(**settings, stop_at=5))  # 4 steps an objective
    first = workbench.root / "train" / "checkpoints" / "objective-0"
    start = load_file(first / "model" / "model.safetensors")
    protected = Protected.load(first / "protected.safetensors")
    ctx = workbench.context(**settings)
    metrics, _ = train(ctx)
    end = weights(ctx)
    moved = 0.0
    for bases, axis in ((protected.left, 0), (protected.right, 1)):
        assert bool(bases) == (side in ("both", ("left", "right")[axis]))
        for name, q in bases.items():
            change = end[name].double() - start[name].double()
            moved = max(moved, float(change.norm()))
            inside = (q.double().T @ change) if axis == 0 else (change @ q.double())
            assert float(inside.norm()) <= 2e-6 * float(change.norm()) + 1e-9, name
    assert moved > 1e-2
    assert values(metrics, "objective/german/leak")[0][1] <= 2e-6


def test_without_protection_the_same_training_leaks(workbench: Any) -> None:
    """The check above can fail: sequential DPO without a subspace goes where the first objective went."""
    with pytest.raises(Stopped):
        train(workbench.context(method="full", orthalign=sequence(), stop_at=5))
    first = workbench.root / "train" / "checkpoints" / "objective-0"
    protected = Protected.load(first / "protected.safetensors")
    start = load_file(first / "model" / "model.safetensors")
    plain = workbench.context("plain", method="full")
    train(plain)
    end = weights(plain)
    leaks = [protected.leak(name, end[name].double() - start[name].double()) for name in protected.left]
    assert max(leaks) > 0.1


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("stop_at", [2, 4, 6])
def test_stopped_in_or_between_objectives_it_ends_with_the_same_weights(
    workbench: Any, method: str, stop_at: int
) -> None:
    settings = {"method": method, "save_steps": 1, "orthalign": sequence(energy=0.9)}
    whole = workbench.context("whole", **settings)
    metrics, account = train(whole)
    with pytest.raises(Stopped):
        train(workbench.context("halted", **settings, stop_at=stop_at))
    resumed = workbench.context("halted", **settings)
    again, _ = train(resumed)
    mine, theirs = weights(whole), weights(resumed)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert metrics == again
    assert ("objectives done before: english" in resumed.progress.notes) == (stop_at > 4)  # 4: before its basis
    assert account.stats["steps"] == 8


def test_when_the_weights_of_the_last_objective_are_damaged_it_begins_where_weights_are(workbench: Any) -> None:
    settings = {"method": "full", "epochs": 1, "orthalign": sequence(EN, DE, {"name": "all", "where": "true"})}
    with pytest.raises(Stopped):
        train(workbench.context("halted", **settings, stop_at=5))  # in the third
    assert not (workbench.root / "halted/checkpoints/objective-0/model").exists()
    damaged = workbench.root / "halted/checkpoints/objective-1/model/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    resumed, whole = workbench.context("halted", **settings), workbench.context("whole", **settings)
    assert train(resumed)[0] == train(whole)[0]
    assert not any(note.startswith("objectives done before") for note in resumed.progress.notes)
    mine, theirs = weights(whole), weights(resumed)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_every_objective_is_measured_after_each(workbench: Any) -> None:
    settings = {"method": "full", "epochs": 6, "merge": {"log_every": 5}}
    metrics, account = train(workbench.context(**settings, orthalign=sequence()))
    shares = values(metrics, "merge/projected")  # without merging: of the projection alone
    assert [step for step, _ in shares] == [17, 22] and all(0.1 < share < 1 for _, share in shares)
    assert [step for step, _ in values(metrics, "objective/english/reward_accuracy")] == [12, 24]
    assert [step for step, _ in values(metrics, "objective/german/reward_accuracy")] == [24]
    assert values(metrics, "objective/english/reward_accuracy")[0][1] == 1.0
    assert [step for step, _ in values(metrics, "loss")] == list(range(1, 25))
    assert values(metrics, "loss")[0][1] == pytest.approx(0.6931, abs=1e-3)
    # the reference is the model as the objective starts: log 2 again
    assert values(metrics, "loss")[12][1] == pytest.approx(0.6931, abs=1e-3)
    assert [(t.language, t.rows_in, t.kept) for t in account.tallies] == [("de", 3, 3), ("en", 3, 3)]


def test_the_reference_may_stay_the_rounds_start(workbench: Any) -> None:
    metrics, _ = train(workbench.context(method="full", epochs=6, orthalign=sequence(reference="round")))
    assert values(metrics, "loss")[12][1] != pytest.approx(0.6931, abs=1e-3)


def test_pairs_of_no_objective_are_dropped_with_a_reason(workbench: Any) -> None:
    some = {"name": "some", "where": "language = 'en' AND pair_id <> 'pair0'"}
    ctx = workbench.context(orthalign=sequence(some, DE))
    _, account = train(ctx)
    assert [(d.row_id, d.reason) for d in account.drops] == [("pair0", "no_objective")]
    english = next(t for t in account.tallies if t.language == "en")
    assert (english.rows_in, english.kept, english.dropped) == (3, 2, {"no_objective": 1})
    card = (ctx.folder / "model" / "README.md").read_text()
    assert "| en | 2 |" in card and "some, german" in card


@pytest.mark.parametrize("seen", [1.0, 0.5], ids=["", "estimates too low"])
def test_a_trust_region_bounds_every_objectives_change(
    workbench: Any, monkeypatch: pytest.MonkeyPatch, seen: float
) -> None:
    radius, estimate = 0.02, trust._largest
    monkeypatch.setattr(trust, "_largest", lambda *given: seen * estimate(*given))
    settings = {"method": "full", "orthalign": sequence(trust_radius=radius)}
    with pytest.raises(Stopped):
        train(workbench.context(**settings, stop_at=5))
    middle = load_file(workbench.root / "train/checkpoints/objective-0/model/model.safetensors")
    ctx = workbench.context(**settings)
    metrics, _ = train(ctx)
    found = [v for name in ("english", "german") for _, v in values(metrics, f"objective/{name}/spectral_norm")]
    assert len(found) == 2 and (min(found) > 1.2 * radius if seen < 1 else max(found) <= radius * (1 + 1e-5))
    assert any("changes scaled back to norm 0.02" in note for note in ctx.progress.notes) == (seen < 1)
    begin, end = load_file(workbench.policy / "model.safetensors"), weights(ctx)
    largest = 0.0
    for one, other in ((begin, middle), (middle, end)):
        for name in end:
            if end[name].ndim == 2:
                norm = float(torch.linalg.matrix_norm(other[name].double() - one[name].double(), 2))
                assert norm <= radius * (1 + 1e-4), name
                largest = max(largest, norm)
    assert largest > 0.5 * radius


def test_the_rank_search_keeps_what_the_objective_needs(workbench: Any) -> None:
    ctx = workbench.context(method="full", epochs=4, orthalign=sequence(rank="search", tolerance=0.0, q_max=8))
    metrics, _ = train(ctx)
    notes = [n for n in ctx.progress.notes if "directions a matrix protected" in n]
    assert len(notes) == 1  # what the last objective did, nobody stays out of
    assert not values(metrics, "objective/german/directions")
    directions = [v for _, v in values(metrics, "objective/english/directions")]
    assert directions and 1 <= directions[0] <= 8


def test_a_stop_while_bases_are_made_continues_there(workbench: Any) -> None:
    settings = {"method": "full", "save_steps": 1, "orthalign": sequence(side="both")}
    whole = workbench.context("whole", **settings)
    metrics, account = train(whole)
    assert {unit for _, unit in whole.progress.units} == {"step", "matrix", "dev answer", "reference answer"}
    halted = workbench.context("halted", **settings, stop_at=3)
    halted.progress.stop_unit = "matrix"
    with pytest.raises(Stopped):
        train(halted)
    assert halted.progress.done == 3 and not (halted.folder / "checkpoints/objective-0/complete.json").exists()
    resumed = workbench.context("halted", **settings)
    assert train(resumed)[0] == metrics
    assert "resuming from checkpoint-4" in resumed.progress.notes
    assert all(torch.equal(w, weights(resumed)[n]) for n, w in weights(whole).items())
    assert account.stats["train_runtime"] > 0 and not list(whole.folder.rglob("before.safetensors"))


def test_a_first_adapter_is_looked_at_without_a_copy_of_the_weights(workbench: Any) -> None:
    ctx = workbench.context(orthalign=sequence(), stop_at=14)  # 7 matrices a layer are adapted
    ctx.progress.stop_unit = "matrix"
    with pytest.raises(Stopped):
        train(ctx)
    assert ctx.progress.units[-1] == (14, "matrix")
    assert not list(ctx.folder.rglob("before.safetensors"))


def test_a_bfloat16_export_leaks_and_the_leak_is_said(workbench: Any) -> None:
    """Masters stay out of the subspace, their rounded copy does not: the figure equals what the files say."""
    sections = {"execution": {"device": "cpu"}, "model": {"policy": str(workbench.policy), "dtype": "bfloat16"}}
    settings: dict[str, Any] = {"method": "full", "orthalign": sequence(), "sections": sections}
    with pytest.raises(Stopped):
        train(workbench.context(**settings, stop_at=5))
    first = workbench.root / "train/checkpoints/objective-0"
    start, protected = load_file(first / "model/model.safetensors"), Protected.load(first / "protected.safetensors")
    ctx = workbench.context(**settings)
    metrics, _ = train(ctx)
    end = weights(ctx)
    assert {w.dtype for w in end.values()} == {torch.bfloat16}
    inside = whole = 0.0
    for name, q in protected.left.items():
        change = end[name].double() - start[name].double()
        inside, whole = inside + float((q.double().T @ change).square().sum()), whole + float(change.square().sum())
    share = (inside / whole) ** 0.5
    assert values(metrics, "objective/german/leak")[0][1] <= 2e-6
    assert values(metrics, "objective/german/leak_exported")[0][1] == pytest.approx(share, rel=1e-3)
    assert share > 1e-3


def test_dev_pairs_are_capped_round_zeros_and_part_of_the_identity(workbench: Any) -> None:
    settings = {"method": "full", "epochs": 1, "orthalign": sequence(dev_pairs=1)}
    metrics, _ = train(workbench.context("capped", **settings))
    assert {v for _, v in values(metrics, "objective/english/reward_accuracy")} <= {0.0, 0.5, 1.0}
    table = workbench.read("pairs")
    workbench.write("dev", table)
    workbench.write("pairs", table.filter([s == "train" for s in table["split"].to_pylist()]))  # as a later round's
    later = workbench.context("capped", **settings)
    later.inputs["pairs:0"] = [workbench.root / "dev/part-00000.parquet"]
    train(later)
    assert "objectives done before: english, german" in later.progress.notes
    workbench.write("dev", table.slice(0, 8))  # the hash order may pick another pair: without german's it has none
    fewer = workbench.context("capped", **settings)
    fewer.inputs["pairs:0"] = [workbench.root / "dev/part-00000.parquet"]
    train(fewer)
    assert not any(note.startswith("objectives done before: english, german") for note in fewer.progress.notes)


def test_narrow_matrices_keep_room_for_every_objective(workbench: Any, tmp_path: Path) -> None:
    """A matrix with fewer rows than there are objectives is not protected, and the run says so."""
    shutil.copytree(workbench.policy, folder := tmp_path / "narrow")
    config = LlamaConfig.from_pretrained(folder, head_dim=2, num_key_value_heads=1)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    bench = type(workbench)(tmp_path / "bench", folder)
    three = sequence(EN, DE, {"name": "all", "where": "true"}, energy=1.0, q_max=64)
    ctx = bench.context(method="full", epochs=1, orthalign=three)
    metrics, _ = train(ctx)
    protected = Protected.load(bench.root / "train/checkpoints/objective-2/protected.safetensors")
    narrow = {f"model.layers.{i}.self_attn.{m}_proj.weight" for i in range(2) for m in "kv"}  # [2, 32]
    assert not narrow & protected.left.keys() and "model.layers.0.self_attn.q_proj.weight" in protected.left
    said = [note for note in ctx.progress.notes if "fewer dimensions than there are objectives" in note]
    assert len(said) == 1 and said[0].startswith("4 matrices") and "self_attn.k_proj.weight [2, 32]" in said[0]
    for name, q in protected.left.items():
        assert q.shape[1] <= 2 * (q.shape[0] // 3) < q.shape[0], name
    held = [v for _, v in values(metrics, "objective/english/energy")]
    assert len(held) == 1 and 0.3 < held[0] < 1
    assert values(metrics, "objective/all/leak")[0][1] <= 2e-6


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_the_search_finds_a_rank_that_holds_below_which_none_does(truth: list[bool]) -> None:
    truth[-1] = True  # the whole change
    q, tries = fewest(lambda q: truth[q - 1], len(truth))
    assert truth[q - 1] and (q == 1 or not truth[q - 2])
    assert tries <= len(truth)


@pytest.mark.parametrize("pairs", [20, 50, 100, 200])
def test_exactly_the_tolerance_may_be_lost(pairs: int) -> None:
    for kept in range(1, pairs + 1):
        assert fell_within(kept / pairs, (kept - 1) / pairs, 1 / pairs)
        assert not fell_within(kept / pairs, (kept - 1) / pairs, 0.9 / pairs)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20)])
@pytest.mark.parametrize("spectrum", ["flat", "falling", "low rank"])
def test_a_change_is_the_svds(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], spectrum: str) -> None:
    monkeypatch.setattr("stages.train.optimizers.change._SLICE", 100)
    random = torch.Generator().manual_seed(5)
    u, _, vh = torch.linalg.svd(torch.randn(*shape, generator=random, dtype=torch.float64), full_matrices=False)
    size = min(shape)
    values = {
        "flat": torch.linspace(1, 0.9, size, dtype=torch.float64),
        "falling": 0.3 ** torch.arange(size, dtype=torch.float64),
        "low rank": torch.tensor([3.0, 2.0, 1.0] + [0.0] * (size - 3), dtype=torch.float64),
    }[spectrum]
    matrix = (u * values) @ vh
    for q in (1, 3, 7, 64):
        found = Change.of("w", matrix, q)
        exact = int((values[:q] > 1e-7 * values[0]).sum())
        assert len(found.values) == exact and found.energy == pytest.approx(float(matrix.square().sum()), rel=1e-12)
        torch.testing.assert_close(found.values, values[:exact], rtol=1e-9, atol=1e-15)
        for side in (found.left, found.right):
            torch.testing.assert_close(side.T @ side, torch.eye(exact, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.matrix(), (u[:, :exact] * values[:exact]) @ vh[:exact], rtol=0, atol=1e-7)
        assert spectral_norm(matrix) == pytest.approx(float(values[0]), rel=1e-9)
        assert found.count(0.9) == min(int((values.square().cumsum(0) / values.square().sum() < 0.9).sum()) + 1, exact)


@pytest.mark.parametrize("rank", [1, 5])
def test_a_change_of_factors_is_the_change_of_their_product(rank: int) -> None:
    b, a = torch.randn(20, rank, dtype=torch.float64), torch.randn(rank, 13, dtype=torch.float64)
    whole, factored = Change.of("w", b @ a, 64), Change.of_factors("w", b, a, 64)
    assert len(whole.values) == len(factored.values) == rank
    torch.testing.assert_close(whole.matrix(), factored.matrix(), rtol=0, atol=1e-10)
    torch.testing.assert_close(whole.values, factored.values, rtol=1e-10, atol=1e-10)
    assert factored.energy == pytest.approx(float((b @ a).square().sum()), rel=1e-10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"orthalign": sequence(EN)}, "needs two"),
        ({"orthalign": sequence(EN, EN | {"where": "language = 'de'"})}, "same name"),
        (
            {"orthalign": {"energy": 0.5}},
            r"train\.orthalign\.energy has no use with train\.orthalign\.objectives: \[\]",
        ),
        ({"orthalign": sequence(EN, {"name": "bad", "where": "conflict_score > 0"})}, "no column 'conflict_score'"),
        ({"orthalign": sequence(EN, {"name": "bad", "where": "language = "})}, "ends too early"),
        ({"orthalign": sequence(EN, {"name": "bad", "where": "language IN (SELECT 1)"})}, "IN needs a list"),
        ({"method": "full", "optimizer": "anchor", "merge": {"alpha": 0.01}, "orthalign": sequence()}, "anchor"),
        (
            {"method": "lora", "orthalign": sequence(trust_radius=1.0)},
            "trust_radius has no use with train.method: lora",
        ),
        ({"orthalign": sequence(tolerance=0.1)}, "belongs to train.orthalign.rank: search"),
        ({"orthalign": sequence(rank="search", energy=0.5)}, "belongs to train.orthalign.rank: energy"),
        ({"reference": "initial", "orthalign": sequence()}, "contradict"),
        ({"sections": {"rounds": 2, "gradients": {"of": "adapter"}}, "orthalign": sequence()}, "leave none"),
        ({"sections": {"rounds": 2, "gradients": {"of": "adapter"}}, "method": "full"}, "leave none"),
    ],
)
def test_combinations_without_sense_are_refused(workbench: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        workbench.context(**settings)


NONE_OF_PROMPTS = {"prompts": {"sources": [{"path": "p.jsonl"}], "dev_fraction": 0}}
NONE_OF_PAIRS = {"prompts": {}, "pairs": {"sources": [{"path": "p.jsonl"}], "dev_fraction": 0}}


@pytest.mark.parametrize("sections", [NONE_OF_PROMPTS, NONE_OF_PAIRS])
def test_a_rank_search_that_can_have_no_dev_pairs_is_refused_with_the_config(
    workbench: Any, sections: dict[str, Any]
) -> None:
    """Not after hours, when training begins."""
    key = "pairs" if "pairs" in sections else "prompts"
    with pytest.raises(ValidationError, match=rf"{key}\.dev_fraction is 0, and no source"):
        workbench.context(orthalign=sequence(rank="search"), sections=sections)
    workbench.context(orthalign=sequence(), sections=sections)
    for names in ({"split": "dev"}, {"splits": {"train": "dev"}}, {"fields": {"split": "split"}}):
        named = sections[key] | {"sources": [{"path": "p.jsonl"}, {"path": "d.jsonl"} | names]}
        workbench.context(orthalign=sequence(rank="search"), sections=sections | {key: named})


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("language = 'xx'", "no curated pair fits"),
        ("language > 1", "cannot be evaluated"),
        ("language", "neither true nor false"),
    ],
)
def test_a_condition_that_finds_nothing_is_refused(workbench: Any, where: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        train(workbench.context(orthalign=sequence(EN, {"name": "bad", "where": where})))
    assert error.value.where == "train.orthalign.objectives.1.where"


def test_a_rank_search_without_dev_pairs_is_refused(workbench: Any) -> None:
    table = workbench.read("pairs")
    workbench.write("pairs", table.filter([s == "train" for s in table["split"].to_pylist()]))
    ctx = workbench.context(orthalign=sequence(rank="search"))
    with pytest.raises(UserError, match="no dev pairs"):
        train(ctx)
    assert not ctx.progress.done  # before anything is trained
