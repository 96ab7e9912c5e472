"""A process that ends in the middle of a shard loses little, and whoever goes on gives what one go gives, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.contract import ModelRef, Stopped
from stages.gradients import unfinished
from stages.gradients.aggregate import Aggregate
from stages.gradients.sketcher import PROBE, Sketcher
from stages.gradients.stage import Gradients
from stages.gradients.unfinished import Unfinished
from tests.stages.gradients import one_sided_bench
from tests.stages.gradients.one_sided_bench import SEED
from tests.stages.gradients.test_gradients_stage import config, pairs
from tests.stages.stage_context import context, shards


class Killed(BaseException):
    """As if by SIGKILL: nothing is done after it."""


@pytest.fixture
def reference(tiny_model, tmp_path) -> ModelRef:
    """Another model than the policy."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_model / name).exists():
            (tmp_path / "other" / name).write_bytes((tiny_model / name).read_bytes())
    return ModelRef("other", tmp_path / "other", "other")


def computed(monkeypatch) -> list[int]:
    """Pairs of every batch that is sketched from here on."""
    counts: list[int] = []
    launch = Sketcher._launch

    def counted(self, batch, shared):
        if self.seed == SEED and batch != [
            PROBE
        ]:  # not to measure the sketch's error, or whether prompts can be shared
            counts.append(len(batch))
        return launch(self, batch, shared)

    monkeypatch.setattr(Sketcher, "_launch", counted)
    return counts


STAGES = {
    "two_sided": (Gradients, lambda: config(token_budget=64), lambda: pairs(15, 3)),
    "one_sided, mean": (Aggregate, lambda: one_sided_bench.config(token_budget=64), lambda: one_sided_bench.table(15, 3)),
    "one_sided, ema": (
        Aggregate,
        lambda: one_sided_bench.config({"direction": "ema"}, token_budget=64),
        lambda: one_sided_bench.table(15, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("end", ["stopped", "killed"])
@pytest.mark.parametrize("kind", STAGES)
def test_a_shard_that_was_cut_anywhere_is_finished_bit_for_bit(tmp_path, models, reference, monkeypatch, kind, end):
    stage, settings, rows = STAGES[kind]
    table, models = rows(), {**models, "reference": reference}
    ctx = context(tmp_path, settings(), models, pairs=table)
    (whole,) = stage().run(ctx, shards(table, 15))
    batches = computed(monkeypatch)
    (_,) = stage().run(ctx, shards(table, 15))
    total, every = sum(batches), list(batches)
    assert len(every) > 4
    for after in (1, 3):
        ctx.unfinished = lambda shard, after=after: tmp_path / f"{shard}-{after}.safetensors"
        batches.clear()
        if end == "stopped":
            ctx.stop = lambda after=after: len(batches) >= after
            with pytest.raises(Stopped):
                list(stage().run(ctx, shards(table, 15)))
            ctx.stop = lambda: False
        else:
            with monkeypatch.context() as patch:
                patch.setattr(unfinished, "_SAVE_SECONDS", 0.0)
                patch.setattr(unfinished, "_SHARE", 1e9)
                launch = Sketcher._launch

                def killed(self, batch, shared, launch=launch, after=after):
                    if len(batches) >= after:
                        raise Killed
                    return launch(self, batch, shared)

                patch.setattr(Sketcher, "_launch", killed)
                with pytest.raises(Killed):
                    list(stage().run(ctx, shards(table, 15)))
        done = len(batches)
        batches.clear()
        (part,) = stage().run(ctx, shards(table, 15))
        assert done == after and batches == every[done:], "what was computed is not computed again"
        assert part.tables.keys() == whole.tables.keys()
        assert all(part.tables[name].equals(whole.tables[name]) for name in whole.tables)
        assert part.tallies == whole.tallies and part.stats["tokens"] == whole.stats["tokens"]
        assert part.seconds_before > 0
        assert ctx.progress.done >= total


def test_what_is_not_whole_or_no_such_file_is_as_if_it_had_never_been_written(tmp_path, models, monkeypatch):
    table = pairs(6, 3)
    ctx = context(tmp_path, config(), models, pairs=table)
    (whole,) = Gradients().run(ctx, shards(table, 6))
    ctx.unfinished = lambda shard: tmp_path / "file"
    for content in (b"", b"torn", (16).to_bytes(8, "little") + b'{"a":1}', b"\xff" * 64):
        (tmp_path / "file").write_bytes(content)
        (part,) = Gradients().run(ctx, shards(table, 6))
        assert part.tables["gradients"].equals(whole.tables["gradients"])


def test_a_large_state_is_saved_so_seldom_that_it_costs_a_twentieth_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(unfinished.time, "monotonic", lambda: now[0])
    saves: list[float] = []

    def slow(tensors, path, metadata):
        saves.append(now[0])
        now[0] += 10.0
        path.write_bytes(b"")

    monkeypatch.setattr(unfinished, "save_file", slow)
    shard = Unfinished(tmp_path / "file", lambda: False)
    for step in range(1000):
        now[0] += 1.0
        shard.add("sums", lambda step=step: {str(step): {"x": torch.zeros(1)}})
    gaps = [b - a for a, b in itertools.pairwise(saves)]
    assert saves[0] == pytest.approx(20.0) and min(gaps) >= 200.0


def test_rows_go_with_the_state_they_belong_to(tmp_path):
    """Sums of one pass say nothing of another, and rows that are in no saved sum are not in any."""
    stop = [True]
    first = Unfinished(tmp_path / "file", lambda: stop[0])
    first.keep("sums of 9", lambda: {"en": torch.ones(2)})
    with pytest.raises(Stopped):
        first.add("sums of 9", lambda: {"p": {"x": torch.ones(1)}})
    again = Unfinished(tmp_path / "file", lambda: False)
    assert again.rows("sums of 9")["p"]["x"] == 1 and again.keep("sums of 9", dict)["en"].tolist() == [1, 1]
    other = Unfinished(tmp_path / "file", lambda: False)
    assert other.keep("sums of 8", dict) == {} and not other.rows("sums of 9") and not other.rows("sums of 8")


def test_without_a_place_nothing_is_kept_and_nothing_stops():
    shard = Unfinished(None, lambda: True)
    shard.add("sketches", lambda: {"p": {"x": torch.ones(1)}})
    assert not shard.rows("sketches")
