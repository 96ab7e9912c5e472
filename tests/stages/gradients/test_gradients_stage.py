"""The gradients stage stores what autograd says, whatever the shards, batches and workers."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.sketches import sketch_dim, sketch_rows
from schemas.tables import TABLES
from stages.contract import ModelRef
from stages.gradients.layers import select_layers
from stages.gradients.projections import SketchLayout
from stages.gradients.rows import Pair, RowBatch
from stages.gradients.sketcher import Sketcher, Unsketchable
from stages.gradients.stage import Gradients
from stages.gradients.store import LAYOUT_KEY, unpack_sketches
from stages.text.render import load_renderer
from tests.stages.gradients.oracles import exact_pair_gradient, project_gradients
from tests.stages.stage_context import WORDS, context, shards


def config(**changes) -> RunConfig:
    gradients = {"sketch": {"dim": 512, "seed": 5}, "token_budget": changes.pop("token_budget", 512)}
    gradients |= {name: changes.pop(name) for name in ("prefix_sharing", "of") if name in changes}
    return RunConfig.model_validate(
        {
            "name": "t",
            "languages": {"seen": ["en", "de"]},
            "model": {"policy": "m", "dtype": changes.pop("dtype", "float32")},
            "text": {"max_length": changes.pop("max_length", 200)},
            "prompts": {"sources": [{"path": "x"}]},
            "gradients": gradients,
            **changes,
        }
    )


def pairs(n: int, seed: int) -> pa.Table:
    rng = random.Random(seed)

    def text(k: int) -> str:
        return " ".join(rng.choices(WORDS, k=k))

    rows = [
        {
            "pair_id": f"p{i}", "round": 0, "prompt_id": f"q{i}", "group_id": f"g{i % 3}",
            "language": ["en", "de"][i % 2], "split": "test" if i % 5 == 4 else "train",
            "prompt": [{"role": "user", "content": text(rng.randint(2, 9))}],
            "chosen": [{"role": "assistant", "content": text(rng.randint(1, 12))}],
            "rejected": [{"role": "assistant", "content": text(rng.randint(1, 12))}],
            "source": "x",
        }
        for i in range(n)
    ]  # fmt: skip
    for row in rows:
        while row["rejected"] == row["chosen"]:
            row["rejected"] = [{"role": "assistant", "content": text(3)}]
    return pa.Table.from_pylist(rows, schema=TABLES["pairs"].schema)


def test_answers_that_are_the_same_tokens_are_dropped(tmp_path, models):
    """Shared or not, their gradient is rounding, which unit norm would blow up."""
    rows = pairs(4, 11).to_pylist()
    rows[1]["rejected"] = rows[1]["chosen"]
    table = pa.Table.from_pylist(rows, schema=TABLES["pairs"].schema)
    got, parts, _ = run(tmp_path, models, table, config())
    assert [(d.row_id, d.reason, d.failed) for p in parts for d in p.drops] == [("p1", "identical", False)]
    assert got.column("pair_id").to_pylist() == ["p0", "p2", "p3"]


def test_a_pair_without_a_gradient_is_dropped_with_that_reason(tmp_path, models, monkeypatch):
    """Answers the model is certain of, or numbers too small for the dtype: a zero is no direction."""
    compute = Sketcher.run

    def silent(self, *args, **kwargs):
        got = compute(self, *args, **kwargs)
        got.sketch_ND[1] = 0.0
        return got

    monkeypatch.setattr(Sketcher, "run", silent)
    got, parts, _ = run(tmp_path, models, pairs(4, 11), config())
    assert [(d.row_id, d.reason, d.failed) for p in parts for d in p.drops] == [("p1", "zero_gradient", False)]
    assert got.column("pair_id").to_pylist() == ["p0", "p2", "p3"]


@pytest.fixture
def models(tiny_model):
    same = ModelRef("tiny", tiny_model, "d")
    return {"policy": same, "reference": same}


def run(tmp_path, models, table, config_, size=4):
    ctx = context(tmp_path, config_, models, pairs=table)
    parts = sorted(Gradients().run(ctx, shards(table, size)), key=lambda p: p.index)
    return pa.concat_tables([p.tables["gradients"] for p in parts]), parts, ctx


def sketches(table: pa.Table) -> torch.Tensor:
    stored = torch.from_numpy(sketch_rows(table.column("sketch").combine_chunks()).astype(np.float32))
    return unpack_sketches(stored, torch.from_numpy(table.column("norm").to_numpy().copy()))


def test_stored_sketches_are_projected_autograd_gradients(tmp_path, models, tiny_model):
    """Tolerance: float16 storage, 2^-11 of the norm per entry."""
    table, config_ = pairs(7, random.SystemRandom().randrange(10**6)), config()
    got, _, _ = run(tmp_path, models, table, config_)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    layout = SketchLayout.from_json(got.schema.metadata[LAYOUT_KEY].decode())
    layers = select_layers(model).layers
    renderer = load_renderer(models["policy"], config_.text)
    train = [row for row in table.to_pylist() if row["split"] == "train"]
    assert got.column("pair_id").to_pylist() == [row["pair_id"] for row in train]
    for row, sketch_D, logp in zip(train, sketches(got), got.column("logp_chosen").to_pylist(), strict=True):
        ids = renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"])
        pair = Pair(tuple(ids.prompt), tuple(ids.chosen), tuple(ids.rejected))
        exact = project_gradients(layout, 5, exact_pair_gradient(model, pair, layers).items())
        assert torch.linalg.vector_norm(sketch_D - exact) <= 1e-3 * torch.linalg.vector_norm(exact)
        inputs = torch.tensor([ids.prompt + ids.chosen])
        logits = model(inputs).logits[0].log_softmax(-1)
        places = range(len(ids.prompt), inputs.shape[1])
        assert logp == pytest.approx(sum(float(logits[t - 1, inputs[0, t]]) for t in places), abs=1e-3)


def test_batches_shards_and_other_pairs_do_not_change_a_sketch(tmp_path, models):
    table = pairs(12, 1)
    one, _, _ = run(tmp_path, models, table, config(token_budget=64), size=3)
    other, _, _ = run(tmp_path, models, table, config(token_budget=4096), size=12)
    cosine = torch.nn.functional.cosine_similarity(sketches(one), sketches(other))
    assert float(cosine.min()) >= 0.9999
    assert one.drop_columns(["sketch", "norm"]).column_names == other.drop_columns(["sketch", "norm"]).column_names
    assert one.column("ids_hash") == other.column("ids_hash")


@pytest.mark.parametrize("sharing", ["auto", "off"])
def test_workers_and_batch_sizes_do_not_change_what_is_stored(tmp_path, models, sharing):
    """1, 2 and 5 workers, any batch size: cosine >= 0.9999, and every entry within float16 storage of the others."""
    table = pairs(20, random.SystemRandom().randrange(10**6))
    stores = []
    for workers, budget in ((1, 64), (1, 8192), (2, 300), (5, 700)):
        config_ = config(token_budget=budget, prefix_sharing=sharing)
        parts = []
        for worker in range(workers):  # each loads its own model and takes its own shards
            ctx = context(tmp_path, config_, models, pairs=table)
            mine = [shard for shard in shards(table, 3) if shard.index % workers == worker]
            parts += list(Gradients().run(ctx, iter(mine)))
        parts.sort(key=lambda part: part.index)
        stores.append(pa.concat_tables([part.tables["gradients"] for part in parts]))
    first, *others = (sketches(table) for table in stores)
    for other, table in zip(others, stores[1:], strict=True):
        assert table.column("ids_hash") == stores[0].column("ids_hash")
        assert float(torch.nn.functional.cosine_similarity(first, other).min()) >= 0.9999
        assert float(((first - other).norm(dim=1) / first.norm(dim=1)).max()) <= 2**-10
        for name in ("logp_chosen", "logp_rejected"):
            ours, theirs = (np.array(t.column(name)) for t in (stores[0], table))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_reference_mode_is_bit_for_bit_whatever_the_token_budget(tmp_path, models):
    table = pairs(8, 2)
    mode = {"execution": {"deterministic": True}, "engine": {"kind": "transformers"}}
    one, _, _ = run(tmp_path, models, table, config(token_budget=64, **mode), size=4)
    other, _, _ = run(tmp_path, models, table, config(token_budget=4096, **mode), size=4)
    torch.use_deterministic_algorithms(False)
    assert one.equals(other)


def test_a_reference_that_is_not_the_policy_gives_its_own_log_probabilities(tmp_path, models, tiny_model):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    other = tmp_path / "other"
    model.save_pretrained(other)
    table = pairs(5, 3)
    own, _, _ = run(tmp_path, models, table, config())
    got, _, _ = run(tmp_path, models | {"reference": ModelRef("other", other, "e")}, table, config())
    assert own.column("ref_logp_chosen") == own.column("logp_chosen")
    swapped = {"policy": ModelRef("other", other, "e"), "reference": ModelRef("other", other, "e")}
    for file in tiny_model.glob("*token*"):
        (other / file.name).write_bytes(file.read_bytes())
    (other / "chat_template.jinja").write_text((tiny_model / "chat_template.jinja").read_text())
    theirs, _, _ = run(tmp_path, swapped, table, config())
    for side in ("chosen", "rejected"):
        got_side = torch.tensor(got.column(f"ref_logp_{side}").to_pylist())
        assert torch.allclose(got_side, torch.tensor(theirs.column(f"logp_{side}").to_pylist()), atol=1e-3)


def test_held_out_pairs_are_not_input_and_long_ones_are_dropped_with_their_length(tmp_path, models):
    table = pairs(10, 4)
    got, parts, _ = run(tmp_path, models, table, config(max_length=40))
    tallies = [t for p in parts for t in p.tallies]
    drops = [d for p in parts for d in p.drops]
    assert sum(t.rows_in for t in tallies) == 8
    assert got.num_rows + len(drops) == 8 and drops
    assert {d.reason for d in drops} == {"too_long"} and all("tokens > 40" in d.detail for d in drops)


def test_without_a_trusted_pair_nothing_is_loaded(tmp_path, models, monkeypatch):
    """They fell away before (duplicates of others): hours of gradients for the same refusal are not made first."""
    monkeypatch.setattr("stages.gradients.stage.sketch_shards", lambda *_: pytest.fail("refused before"))
    with pytest.raises(UserError, match="No pair is in the dev split, and these make the directions"):
        run(tmp_path, models, pairs(10, 3), config(conflict={"target": "dev"}))


def test_an_empty_shard_has_the_same_schema(tmp_path, models):
    table = pairs(10, 5)
    held_out = table.filter(pa.compute.equal(table.column("split"), "test"))
    _, parts, _ = run(tmp_path, models, pa.concat_tables([table.slice(0, 4), held_out]), config(), size=4)
    schemas = {str(p.tables["gradients"].schema) for p in parts}
    assert len(schemas) == 1


def test_float16_and_layers_that_are_not_there_are_refused(tmp_path, models):
    with pytest.raises(UserError, match="float16"):
        run(tmp_path, models, pairs(4, 6), config(dtype="float16"))
    bad = config()
    bad.gradients.sketch.include = ["nothing.*"]
    with pytest.raises(UserError, match=r"cannot be sketched.*gradients\.sketch"):
        run(tmp_path, models, pairs(4, 6), bad)


@pytest.mark.parametrize(("raised", "seen"), [(Unsketchable, UserError), (ValueError, ValueError)])
def test_only_what_a_batch_says_of_the_model_asks_for_other_layers(tmp_path, models, monkeypatch, raised, seen):
    def broken(self, *rest, **named):
        raise raised("2 results for a batch of 3")

    monkeypatch.setattr(Sketcher, "run", broken)
    with pytest.raises(seen) as got:
        run(tmp_path, models, pairs(4, 6), config())
    assert ("cannot be sketched" in str(got.value)) == (seen is UserError)


@pytest.fixture
def small_memory(monkeypatch):
    """Room for `limit` padded tokens a batch, as if the device were that small."""
    build, shared = RowBatch.build.__func__, RowBatch.build_shared.__func__

    def limit(tokens: int) -> None:
        def checked(cls, rows, *rest):
            if len(rows) * max(map(len, rows)) > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return build(cls, rows, *rest)

        def checked_shared(cls, pairs, *rest):
            if len(pairs) * max(pair.joined for pair in pairs) > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return shared(cls, pairs, *rest)

        monkeypatch.setattr(RowBatch, "build", classmethod(checked))
        monkeypatch.setattr(RowBatch, "build_shared", classmethod(checked_shared))

    return limit


def test_a_batch_that_does_not_fit_is_halved_and_a_pair_that_does_not_fit_is_dropped(tmp_path, models, small_memory):
    table, config_ = pairs(14, 7), config(token_budget=4096, prefix_sharing="off")
    whole, _, _ = run(tmp_path, models, table, config_)
    lengths = {r["pair_id"]: r["n_prompt"] + max(r["n_chosen"], r["n_rejected"]) for r in whole.to_pylist()}
    longest = max(lengths.values())
    misfits = {pair for pair, length in lengths.items() if length == longest}
    small_memory(2 * longest - 1)
    got, parts, ctx = run(tmp_path, models, table, config_, size=7)
    drops = [d for p in parts for d in p.drops]
    assert {d.row_id for d in drops} == misfits
    assert {(d.reason, d.failed) for d in drops} == {("out_of_memory", True)}
    assert "does not fit in memory, even alone" in drops[0].detail
    assert set(got.column("pair_id").to_pylist()) == set(lengths) - misfits
    assert sum(t.rows_in for p in parts for t in p.tallies) == len(lengths)
    said = [note for note in ctx.progress.notes if "gradients.token_budget" in note]
    assert ctx.limits["gradients.token_budget"] < 4096 and said
    assert sum(p.stats["memory_backoffs"] for p in parts) == len(said)
    assert ctx.progress.done == len(lengths), "held-out pairs are not counted"
    again = context(tmp_path, config_, models, pairs=table)
    again.limits = dict(ctx.limits)
    list(Gradients().run(again, shards(table, 14)))
    assert again.limits == ctx.limits, "what was learnt holds for the next worker"


def test_a_pair_that_only_the_reference_has_no_memory_for_is_dropped_too(tmp_path, models, tiny_model, monkeypatch):
    import stages.gradients.stage as stage

    def scored(model, rows, budget, misfits, memo, done):
        misfits += [3]
        return [torch.zeros(len(row.completion)) for n, row in enumerate(rows) if n != 3]

    monkeypatch.setattr(stage, "logprobs_of_rows", scored)
    two = models | {"reference": ModelRef("other", tiny_model, "e")}
    got, parts, _ = run(tmp_path, two, pairs(5, 3), config(), size=5)
    assert [d.row_id for d in parts[0].drops] == ["p1"]
    assert got.column("pair_id").to_pylist() == ["p0", "p2", "p3"]
    assert got.column("ref_logp_chosen").to_pylist() == [0.0] * 3


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_prompts_are_shared_by_default_and_the_store_is_the_same(tmp_path, models, monkeypatch, mode):
    made = []
    shared = RowBatch.build_shared.__func__
    monkeypatch.setattr(RowBatch, "build_shared", classmethod(lambda cls, *rest: made.append(1) or shared(cls, *rest)))
    table = pairs(9, 4)
    got, _, _ = run(tmp_path, models, table, config(prefix_sharing=mode), size=9)
    assert bool(made) == (mode == "auto")
    made.clear()
    slow = {"execution": {"deterministic": True}, "engine": {"kind": "transformers"}}
    reference, _, _ = run(tmp_path, models, table, config(**slow), size=9)
    torch.use_deterministic_algorithms(False)
    assert not made, "reference mode never shares"
    cosine = torch.nn.functional.cosine_similarity(sketches(got), sketches(reference))
    assert float(cosine.min()) >= 0.9999


def test_when_nothing_fits_every_pair_is_accounted_for(tmp_path, models, small_memory, monkeypatch):
    monkeypatch.setattr("stages.gradients.stage.check_head", lambda model: None)
    small_memory(1)
    got, parts, _ = run(tmp_path, models, pairs(5, 3), config(), size=5)
    assert got.num_rows == 0 and [d.reason for d in parts[0].drops] == ["out_of_memory"] * 4


def test_gradients_of_an_adapter_are_stored_and_refused_without_one(tmp_path, models, tiny_model):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    policy = ModelRef("adapted", tiny_model, "d", (tmp_path / "adapter", tiny_model))
    table = pairs(5, 4)
    got, parts, _ = run(tmp_path, {"policy": policy, "reference": policy}, table, config(of="adapter"))
    layout = SketchLayout.from_json(got.schema.metadata[LAYOUT_KEY].decode())
    assert {slot.kind.split(".")[-2] for slot in layout.layers} == {"lora_A", "lora_B"}
    assert got.num_rows == 4 and not [drop for part in parts for drop in part.drops]
    assert float(np.min(got.column("norm"))) > 0
    with pytest.raises(UserError, match="no LoRA adapter"):
        run(tmp_path, models, table, config(of="adapter"))


def test_both_sides_are_stored_beside_their_difference(tmp_path, models, tiny_model):
    sketch = {"sketch": {"dim": 512, "seed": 5, "both_sides": True}}
    got, _, _ = run(tmp_path, models, pairs(6, 8), config(gradients=sketch))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    layout = SketchLayout.from_json(got.schema.metadata[LAYOUT_KEY].decode())
    renderer = load_renderer(models["policy"], config().text)
    rows = {row["pair_id"]: row for row in pairs(6, 8).to_pylist()}
    for row in got.to_pylist():
        ids = renderer.pair_ids(*(rows[row["pair_id"]][name] for name in ("prompt", "chosen", "rejected")))
        for side in ("chosen", "rejected"):
            inputs = torch.tensor([ids.prompt + getattr(ids, side)])
            logits = model(inputs).logits[0].log_softmax(-1)
            total = sum(logits[t - 1, inputs[0, t]] for t in range(len(ids.prompt), inputs.shape[1]))
            gradients = torch.autograd.grad(total, [model.get_submodule(s.name).weight for s in layout.layers])
            named = zip([s.name for s in layout.layers], gradients, strict=True)
            exact = project_gradients(layout, 5, named)
            stored = torch.from_numpy(np.frombuffer(row[f"sketch_{side}"], "<f2").copy())
            stored = unpack_sketches(stored[None], torch.tensor([row[f"norm_{side}"]]))[0]
            assert torch.linalg.vector_norm(stored - exact) <= 1e-3 * torch.linalg.vector_norm(exact)


def test_exact_gradients_are_stored_for_small_models_and_refused_for_others(tmp_path, models, monkeypatch):
    exact = config(gradients={"sketch": {"method": "exact"}})
    got, parts, _ = run(tmp_path, models, pairs(5, 9), exact)
    assert sketch_dim(got.schema.field("sketch").type) == 73_728
    assert not any("sketch_cosine_error" in part.stats for part in parts), "there is nothing to measure"
    two_sided, parts, _ = run(tmp_path, models, pairs(5, 9), config())
    assert sum("sketch_cosine_error" in part.stats for part in parts) == 1
    cosine = torch.nn.functional.cosine_similarity
    ours, truth = sketches(two_sided), sketches(got)
    assert abs(float(cosine(ours[0], ours[1], dim=0)) - float(cosine(truth[0], truth[1], dim=0))) < 0.5
    monkeypatch.setattr("stages.gradients.projections.MAX_EXACT_PARAMETERS", 1000)
    with pytest.raises(UserError, match=r"73,728 parameters are too large to store.*two_sided"):
        run(tmp_path, models, pairs(5, 9), exact)
