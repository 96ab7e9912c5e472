"""For people who use the optimizers in a script of their own: the examples run, and bfloat16 weights are trained as float32 ones are."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optimizer_bench import SHAPES, Bench
from torch import nn

from schemas.errors import UserError
from stages.train.optimizers import ActiveEntries, Merge, OnlineMergingAdamW, Protected, build_task_vector
from stages.train.optimizers.build_vector import FINGERPRINT
from stages.train.optimizers.stream import write_stream

ROOT = Path(__file__).resolve().parents[4]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the task vector of `small`, by strings alone."""
    monkeypatch.chdir(tmp_path)
    shapes = {name: tuple(p.shape) for name, p in small().named_parameters()}
    ones = {name: torch.ones(shape) for name, shape in shapes.items()}
    write_stream(
        Path("task_vector.safetensors"), shapes, torch.bfloat16, lambda n: iter([ones[n]]), {FINGERPRINT: "ones"}
    )
    return tmp_path


def test_the_docstrings_example_runs(here: Path) -> None:
    text = OnlineMergingAdamW.__doc__
    assert text is not None
    example = re.search(r"\n( {8}optimizer = .*?)\n\n", text, re.S)
    assert example is not None
    from stages.train.optimizers import TaskVector

    names: dict[str, Any] = {
        "model": small(),
        **{c.__name__: c for c in (OnlineMergingAdamW, Merge, TaskVector)},
    }
    exec(textwrap.dedent(example[1]), names)  # noqa: S102  (of our own docstring)
    for p in names["model"].parameters():
        p.grad = torch.ones_like(p)
    names["optimizer"].step()


def test_the_trainer_of_the_docs_takes_its_arguments_and_leaves_norms_undecayed(here: Path) -> None:
    text = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8")
    example = next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "MergingTrainer" in code)
    names: dict[str, Any] = {}
    exec(example, names)  # noqa: S102  (of our own documentation)
    trainer = object.__new__(names["MergingTrainer"])
    trainer.model, trainer.optimizer = small(), None
    trainer.args = SimpleNamespace(
        learning_rate=3e-4, weight_decay=0.07, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6
    )
    made = trainer.create_optimizer()
    assert trainer.create_optimizer() is made
    matrices, rest = made.param_groups
    assert {p.ndim for p in matrices["params"]} == {2} and {p.ndim for p in rest["params"]} == {1}
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.07, 0.0)
    for group in made.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)


def test_strings_are_paths(here: Path) -> None:
    from safetensors.torch import save_file

    bench = Bench(1)
    for folder, moved in (("sft", 1.0), ("base", 0.0)):
        Path(folder).mkdir()
        save_file({n: t + moved for n, t in bench.start.items()}, f"{folder}/model.safetensors")
    build_task_vector("sft", "base", "out.safetensors")
    assert Path("out.safetensors").is_file()
    masks = ActiveEntries({n: torch.ones(s, dtype=torch.bool) for n, s in SHAPES.items()})
    masks.save("masks.safetensors")
    assert ActiveEntries.load("masks.safetensors").fingerprint == masks.fingerprint
    bases = Protected({"layer.weight": torch.eye(24)[:, :2].contiguous()}, {})
    bases.save("bases.safetensors")
    assert Protected.load("bases.safetensors").fingerprint == bases.fingerprint


def test_the_second_moment_of_bfloat16_weights_decays() -> None:
    """After gradients fell from 1 to 0.01 the step is the closed form's. In bfloat16, v * 0.999 rounds back to v, for good."""
    weight = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    made = OnlineMergingAdamW([("w", weight)], lr=1e-3, weight_decay=0.0, merge=Merge("anchor", 1e-3))
    v, stuck = 0.0, torch.zeros((), dtype=torch.bfloat16)
    for step in range(1500):
        gradient = 1.0 if step < 20 else 2.0**-7
        weight.grad = torch.full((8,), gradient, dtype=torch.bfloat16)
        made.step()
        v = 0.999 * v + 0.001 * gradient**2
        stuck = stuck * 0.999 + 0.001 * gradient**2
    found = made.state[weight]["exp_avg_sq"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.full((8,), v, dtype=torch.float64), rtol=1e-4, atol=0)
    assert float(stuck) > 3 * v


def test_moments_of_torchs_bfloat16_adamw_are_taken_over_as_float32() -> None:
    bench = Bench(2, torch.bfloat16)
    weights, gradients = bench.weights(), bench.gradients(2)
    theirs = torch.optim.AdamW(weights.items(), lr=1e-2)
    for name, p in weights.items():
        p.grad = gradients[0][name]
    theirs.step()
    ours = bench.merged(weights, Merge("anchor", 0.01))
    saved = theirs.state_dict()
    for group, own in zip(saved["param_groups"], ours.state_dict()["param_groups"], strict=True):
        group |= {key: own[key] for key in own.keys() - group.keys()}
    ours.load_state_dict(saved)
    ours.step()
    for p in weights.values():
        assert ours.state[p]["exp_avg"].dtype == torch.float32 and int(ours.state[p]["step"]) == 2


def test_a_state_that_drew_other_masks_is_refused_and_others_are_not() -> None:
    bench = Bench(3)
    for merge, refused in ((Merge("ondare", 0.1, 0.5), True), (Merge("onties", 0.1, 0.5), False)):
        weights = bench.weights()
        made = bench.merged(weights, merge)
        for name, value in bench.gradients(1)[0].items():
            weights[name].grad = value
        made.step()
        old = made.state_dict()
        for group in old["param_groups"]:
            del group["draws"]
        again = bench.merged(weights, merge)
        if refused:
            with pytest.raises(UserError, match="drew other random masks"):
                again.load_state_dict(old)
        else:
            again.load_state_dict(old)
            again.step()
            again.load_state_dict(again.state_dict())
