"""The train stage with online merging: the result, resume, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from schemas.config import RunConfig
from schemas.config.training import TrainConfig
from schemas.errors import UserError
from stages.contract import Context, ModelRef, Rows
from stages.train.optimizers.build import merge_settings
from stages.train.stage import Train
from stages.train.vector import wanted

BASE = {"base": "unused: the roles are given"}
MERGES: dict[str, dict[str, Any]] = {
    "ondare": {"optimizer": "ondare", "merge": BASE | {"alpha": 0.02, "reserve": 0.5}},
    "onties": {"optimizer": "onties", "merge": BASE | {"alpha": 0.02, "reserve": 0.3, "log_every": 2}},
    "onties released": {
        "optimizer": "onties",
        "merge": BASE | {"alpha": 0.02, "reserve": 0.3, "preset": "released", "keep": "disk"},
    },
    "anchor": {"optimizer": "anchor", "merge": {"alpha": 0.02}},
    "ondare every 2": {
        "optimizer": "ondare",
        "merge": BASE | {"alpha": 0.02, "reserve": 0.5, "every": 2, "keep": "cpu"},
    },
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A "pretrained" model: the policy a little moved."""
    folder = tmp_path_factory.mktemp("base")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=random), alpha=0.05)
    model.save_pretrained(folder)
    return folder


def context(workbench: Any, base: Path, name: str = "train", merge: str = "ondare", **kwargs: Any) -> Context:
    ctx = workbench.context(name, method="full", **MERGES[merge], **kwargs)
    models = ctx.models | {"sft": workbench.model}
    if merge != "anchor":
        models |= {"base": ModelRef("the-base", base, f"digest of {base}")}
    return replace(ctx, models=models)


def train(ctx: Context) -> Any:
    return next(output.data for output in Train().run(ctx) if isinstance(output, Rows))


def weights(ctx: Context) -> dict[str, torch.Tensor]:
    assert ctx.folder is not None
    return load_file(ctx.folder / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Crashing:
    """A Progress that dies at a step, as a killed process would: nothing is saved beyond the last checkpoint."""

    def __init__(self, inner: Any, at: int) -> None:
        self.inner, self.at = inner, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def advance(self, amount: int = 1, **rates: float) -> None:
        self.inner.advance(amount, **rates)
        if self.inner.done >= self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("merge", MERGES)
def test_a_killed_run_ends_with_the_same_weights_and_metrics(workbench: Any, base_folder: Path, merge: str) -> None:
    whole = context(workbench, base_folder, "whole", merge, save_steps=2)
    metrics = train(whole)
    killed = context(workbench, base_folder, "killed", merge, save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(replace(killed, progress=Crashing(killed.progress, 3)))  # type: ignore[arg-type]
    resumed = context(workbench, base_folder, "killed", merge, save_steps=2)
    again = train(resumed)
    assert "resuming from checkpoint-2" in resumed.progress.notes  # type: ignore[attr-defined]
    assert same(weights(whole), weights(resumed))
    assert metrics.equals(again)


def test_merging_moves_the_weights_towards_the_task_vector(workbench: Any, base_folder: Path) -> None:
    """Against AdamW on the same data: OnDARE drifts along SFT - base, the anchor stays nearer to the start."""
    start = load_file(workbench.policy / "model.safetensors")
    base = load_file(base_folder / "model.safetensors")

    def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])

    tau, drift = flat(start) - flat(base), {}
    plain = workbench.context("adamw", method="full")
    train(plain)
    drift["adamw"] = flat(weights(plain)) - flat(start)
    for merge in ("ondare", "anchor"):
        ctx = context(workbench, base_folder, merge, merge)
        metrics = train(ctx)
        drift[merge] = flat(weights(ctx)) - flat(start)
        rows = {r["name"] for r in metrics.to_pylist()}
        assert rows >= {"loss"} and not any(name.startswith("merge/") for name in rows)  # 6 steps, every 10th logged
    along = {name: float(torch.dot(value, tau) / tau.norm() ** 2) for name, value in drift.items()}
    assert along["ondare"] > along["adamw"] + 0.02
    assert float(drift["anchor"].norm()) < 0.99 * float(drift["adamw"].norm())


def test_the_merge_is_logged_and_on_the_card(workbench: Any, base_folder: Path) -> None:
    ctx = context(workbench, base_folder, merge="onties")
    rows = train(ctx).to_pylist()
    logged = {r["name"] for r in rows if r["name"].startswith("merge/")}
    assert logged >= {"merge/delta_norm", "merge/pull_norm", "merge/cosine", "merge/sign_conflict", "merge/drift"}
    assert {r["step"] for r in rows if r["name"] == "merge/alpha_sum"} == {2, 4, 6}
    card = (ctx.folder / "model" / "README.md").read_text()  # type: ignore[operator]
    assert "onties, alpha 0.02" in card and "preset paper, reserve 0.3" in card


def test_the_task_vector_is_built_once_and_checkpoints_do_not_hold_it(workbench: Any, base_folder: Path) -> None:
    first, second = (context(workbench, base_folder, name) for name in ("a", "b"))
    train(first)
    train(second)
    notes = [[n for n in ctx.progress.notes if "building the task vector" in n] for ctx in (first, second)]  # type: ignore[attr-defined]
    assert [len(n) for n in notes] == [1, 0]
    state = torch.load(first.folder / "checkpoints" / "checkpoint-6" / "optimizer.pt", weights_only=True)  # type: ignore[operator]
    keys = {key for entry in state["state"].values() for key in entry}
    assert keys == {"step", "exp_avg", "exp_avg_sq", "start", "displacement"}


def _changed(base: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    shutil.copy(base / "config.json", target)
    return target


def test_a_base_that_does_not_fit_is_refused_before_training(workbench: Any, base_folder: Path, tmp_path: Path) -> None:
    def smaller(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-2].clone()

    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.final_norm.weight"] = tensors.pop("model.norm.weight")

    for name, change, said in (("a", smaller, r"lm_head\.weight"), ("b", renamed, r"model\.norm\.weight")):
        with pytest.raises(UserError, match=said):
            train(context(workbench, _changed(base_folder, tmp_path / name, change), name))


def test_sft_equal_to_base_is_refused(workbench: Any) -> None:
    ctx = context(workbench, workbench.policy)
    with pytest.raises(UserError, match="zero"):  # the same weights under another digest
        train(ctx)
    same_digest = {"base": ModelRef("copy", workbench.policy, workbench.model.digest)}
    with pytest.raises(UserError, match=r"tiny and copy are the same model"):
        train(replace(ctx, models={**ctx.models, **same_digest}))


def test_tied_weights_are_one_parameter_with_two_names(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    assert wanted(model)["lm_head.weight"].aliases == ()
    model.lm_head.weight = model.model.embed_tokens.weight
    names = wanted(model)
    assert "lm_head.weight" not in names and names["model.embed_tokens.weight"].aliases == ("lm_head.weight",)


def test_a_window_longer_than_the_run_is_refused_and_a_cut_one_said_aloud(workbench: Any, base_folder: Path) -> None:
    for every, said in ((7, UserError), (4, None)):
        ctx = workbench.context(method="full", optimizer="ondare", merge=BASE | {"alpha": 0.02, "every": every})
        models = ctx.models | {"sft": workbench.model, "base": ModelRef("the-base", base_folder, "digest of base")}
        if said:
            with pytest.raises(said, match=r"train\.merge\.every"):
                train(replace(ctx, models=models))
        else:
            train(replace(ctx, models=models))
            assert any("the last 2 of 6 steps" in note for note in ctx.progress.notes)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"optimizer": "ondare", "merge": BASE, "method": "lora"}, "LoRA factor"),
        ({"optimizer": "anchor", "merge": {"alpha": 0.1}, "method": "lora"}, "LoRA factor"),
        ({"optimizer": "anchor", "method": "full"}, "no default"),
        (
            {"optimizer": "anchor", "method": "full", "merge": BASE | {"alpha": 0.1}},
            "train.merge.base has no use with train.optimizer: anchor",
        ),
        ({"optimizer": "anchor", "method": "full", "merge": {"alpha": 0.1, "reserve": 0.5}}, "train.merge.reserve"),
        ({"optimizer": "anchor", "method": "full", "merge": {"alpha": 0.1, "preset": "released"}}, "merge.preset"),
        ({"optimizer": "ondare", "method": "full", "merge": BASE | {"rescale": True}}, "train.merge.rescale"),
        ({"optimizer": "adamw", "merge": {"alpha": 0.1}}, "train.merge.alpha has no use with train.optimizer: adamw"),
        ({"optimizer": "onties", "method": "full", "merge": BASE | {"alpah": 0.1}}, "alpah"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(workbench: Any, section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        workbench.context(**section)


def test_defaults_are_the_released_scripts_and_survive_the_resolved_config() -> None:
    config = TrainConfig.model_validate({"optimizer": "onties", "method": "full", "merge": BASE})
    merge = merge_settings(config)
    assert (merge.alpha, merge.reserve, merge.preset, merge.alpha_schedule) == (1e-7, 0.01, "paper", "lr")
    for section in (config, TrainConfig()):
        assert TrainConfig.model_validate(section.model_dump(mode="json")) == section
    assert RunConfig.model_fields["train"].default == TrainConfig()
