"""What one-sided compression refuses, defaults to, says and accounts for."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.tables import TABLES
from stages.conflict.stage import Conflict
from stages.contract import ModelRef
from stages.gradients.aggregate import Aggregate
from stages.gradients.layers import select_layers
from stages.gradients.preconditioner import Precondition
from stages.gradients.projections import SketchLayout
from stages.gradients.sketcher import Sketcher
from stages.gradients.stage import Gradients
from stages.gradients.store import FACTORS_KEY
from tests.stages.gradients.one_sided_bench import both_passes, config, files, first_pass, table
from tests.stages.stage_context import collect, context, shards


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"conflict": {"leave_out": "group"}}, "conflict.leave_out"),
        ({"conflict": {"leave_out": "pair", "metric": "layer"}}, "conflict.metric"),
        ({"both_sides": True}, "both_sides"),
    ],
)
def test_what_this_mode_cannot_do_is_refused_by_its_key(changes, named):
    with pytest.raises(ValueError, match=named):
        config(changes.get("conflict"), sketch={"both_sides": changes.get("both_sides", False)})


def test_defaults_of_the_conflict_stage_that_this_mode_cannot_have_are_others():
    values = {
        "name": "t",
        "languages": {"seen": ["en"]},
        "model": {"policy": "m"},
        "prompts": {"sources": [{"path": "x"}]},
    }
    one_sided = RunConfig.model_validate(values | {"gradients": {"sketch": {"method": "one_sided"}}})
    assert (one_sided.conflict.leave_out, one_sided.conflict.metric) == ("pair", "unit")
    assert RunConfig.model_validate(one_sided.model_dump()) == one_sided
    two_sided = RunConfig.model_validate(values)
    assert (two_sided.conflict.leave_out, two_sided.conflict.metric) == ("answers", "layer")


def test_unless_it_is_set_only_the_pair_leaves_and_what_stays_with_it_is_said(tmp_path, models):
    given = config().model_dump(mode="json")
    del given["conflict"]["leave_out"]
    config_ = RunConfig.model_validate(given)
    assert config_.conflict.leave_out == "pair"
    given["gradients"]["sketch"] |= {"method": "two_sided", "rank": 16}
    assert RunConfig.model_validate(given).conflict.leave_out == "answers"
    pairs = table(6, 8, ["en"] * 6).to_pylist()
    pairs[2]["rejected"] = pairs[3]["chosen"]
    pairs = pa.Table.from_pylist(pairs, schema=TABLES["pairs"].schema)
    _, tables = first_pass(tmp_path, models, pairs, config_)
    ctx = context(tmp_path, config_, models, pairs=pairs, **tables)
    tables["gradients"] = files(
        tmp_path, "gradients", [p.tables["gradients"] for p in Gradients().run(ctx, shards(pairs, 9))]
    )
    ctx = context(tmp_path, config_, {}, pairs=pairs, **tables)
    collect(Conflict(), ctx)
    assert any(note.startswith("2 of 5 pairs share an answer") for note in ctx.progress.notes)


def test_when_no_pair_is_left_both_passes_say_so_in_their_accounts(tmp_path, models):
    config_ = config()
    config_.text.max_length = 4
    pairs = table(7, 8)
    first, tables = first_pass(tmp_path, models, pairs, config_)
    ctx = context(tmp_path, config_, models, pairs=pairs, **tables)
    second = list(Gradients().run(ctx, shards(pairs, 4)))
    for parts in (first, second):
        assert {d.reason for part in parts for d in part.drops} == {"too_long"}
        assert sum(len(part.drops) for part in parts) == sum(t.rows_in for p in parts for t in p.tallies) == 6
    gradients = files(tmp_path, "gradients", [part.tables["gradients"] for part in second])
    with pytest.raises(UserError, match="No pair has a gradient"):
        collect(Conflict(), context(tmp_path, config_, {}, pairs=pairs, gradients=gradients, **tables))


def test_where_the_reference_is_the_policy_margins_are_zero_whatever_the_batches(tmp_path, models):
    got, *_ = both_passes(tmp_path, models, table(24, 4), config(), size=7, second_size=3)
    assert set(got["scores"]["implicit_margin"].to_pylist()) == {0.0}


def test_the_second_pass_loads_no_reference(tmp_path, models, tiny_model):
    pairs, other = table(6, 4), models | {"reference": ModelRef("r", tiny_model, "e")}
    _, tables = first_pass(tmp_path, other, pairs, config())
    gone = models | {"reference": ModelRef("r", None, "e")}
    (part,) = Gradients().run(context(tmp_path, config(), gone, pairs=pairs, **tables), shards(pairs, 6))
    assert part.tables["gradients"].num_rows == 5


def test_the_preconditioner_is_not_estimated_on_pairs_that_have_no_gradient(tmp_path, models):
    """Half of the training pairs have twice the same answer: gradients drops them, and none is in the sample."""
    rows = table(12, 4).to_pylist()
    for row in rows[::2]:
        row["rejected"] = row["chosen"]
    pairs = pa.Table.from_pylist(rows, schema=TABLES["pairs"].schema)
    without = pairs.filter(pa.array([n % 2 == 1 for n in range(12)]))
    config_ = config(sketch={"precondition": "adam_factored", "precondition_pairs": 6})
    got = []
    for number, table_ in enumerate((pairs, without)):
        (tmp_path / str(number)).mkdir()
        got.append(collect(Precondition(), context(tmp_path / str(number), config_, models, pairs=table_)))
    assert [account.stats["pairs"] for _, account in got] == [4, 4]
    assert got[0][0]["preconditioner"].equals(got[1][0]["preconditioner"])


def test_the_error_of_the_sketch_is_measured_once_in_the_first_pass(tmp_path, models):
    pairs = table(10, 9)
    first, _ = first_pass(tmp_path, models, pairs, config(sketch={"error_pairs": 3}, aggregate_size=4))
    measured = [part.stats for part in first if "sketch_cosine_error" in part.stats]
    assert len(measured) == 1 and measured[0]["sketch_cosine_error_pairs"] == 3
    assert 0 < measured[0]["sketch_cosine_error"] < 1


def test_large_sketches_make_small_batches(make_model, make_pairs, monkeypatch):
    import stages.gradients.sketcher as module
    from stages.gradients.batching import TokenBudget

    model, pairs, sizes = make_model("llama"), make_pairs(6, seed=3), []
    layout = SketchLayout.plan(select_layers(model).layers, method="one_sided", rank=4)
    monkeypatch.setattr(module, "_SUMS_BYTES", 2 * 2 * 4 * layout.dim)
    with Sketcher(model, layout, seed=0) as sketcher:
        got = sketcher.run(pairs, TokenBudget(4096), lambda batch: sizes.append(len(batch)))
    assert sizes == [2, 2, 2] and got.sketch_ND.shape == (6, layout.dim)


def test_cells_of_sketches_are_refused_where_no_sketch_is_stored():
    with pytest.raises(ValueError, match=r"select\.diversity\.cells"):
        RunConfig.model_validate(config().model_dump() | {"select": {"diversity": {"cells": 100}}})


@pytest.mark.parametrize("method", ["two_sided", "one_sided"])
def test_an_adapter_is_preconditioned_sketched_and_measured_like_weights(tmp_path, tiny_model, method):
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    policy = ModelRef("a", tiny_model, "d", (tmp_path / "adapter", tiny_model))
    models = {"policy": policy, "reference": policy}
    sketch = {"method": method, "error_pairs": 3, "precondition": "adam_factored", "precondition_pairs": 5}
    sketch |= {"dim": 512} if method == "two_sided" else {}
    config_, pairs = config(sketch=sketch, of="adapter"), table(8, 10)
    rows, account = collect(Precondition(), context(tmp_path, config_, models, pairs=pairs))
    assert account.stats["pairs"] == 5
    given = {"preconditioner": files(tmp_path, "preconditioner", [rows["preconditioner"]])}
    if method == "one_sided":
        ctx = context(tmp_path, config_, models, pairs=pairs, **given)
        parts = list(Aggregate().run(ctx, shards(pairs, 8)))
        given |= {name: files(tmp_path, name, [parts[0].tables[name]]) for name in ("contributions", "sums")}
    ctx = context(tmp_path, config_, models, pairs=pairs, **given)
    (part,) = Gradients().run(ctx, shards(pairs, 8))
    measured = parts[0] if method == "one_sided" else part
    assert measured.stats["sketch_cosine_error"] > 0
    gradients = part.tables["gradients"]
    assert gradients.num_rows == 7 and gradients.schema.metadata[FACTORS_KEY]
    layers = json.loads(gradients.schema.metadata[b"sketch_layout"])["layers"]
    assert len(layers) == 8 and all("lora_" in layer["name"] for layer in layers)
    assert set(rows["preconditioner"].column("layer").to_pylist()) == {layer["name"] for layer in layers}
