"""Surgery while training: the step's gradient against autograd and TorchJD, and what it must not change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torchjd.aggregation import PCGrad

from schemas.config.training import TrainConfig
from schemas.tables import TABLES
from stages.contract import Context, Silent, Stopped
from stages.train import language_surgery
from stages.train.language_surgery import LanguageSurgeryTrainer, place_resolved
from stages.train.stage import Train
from stages.train.trainer import PairTrainer


def train(ctx: Context) -> list[dict[str, Any]]:
    rows, _ = Train().run(ctx)
    return rows.data.to_pylist()


def weights(ctx: Context) -> dict[str, torch.Tensor]:
    assert ctx.folder is not None
    return load_file(ctx.folder / "adapter" / "adapter_model.safetensors")


def watch(monkeypatch: pytest.MonkeyPatch, kind: type[PairTrainer]) -> list[dict[str, torch.Tensor]]:
    """Gradients of every step as they are when clipping starts."""
    steps: list[dict[str, torch.Tensor]] = []
    real = kind._clip_grad_norm

    def clip(self: Any, model: Any) -> Any:
        steps.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
        return real(self, model)

    monkeypatch.setattr(kind, "_clip_grad_norm", clip)
    return steps


def shares(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, dict[str, torch.Tensor]]]:
    """What every step's surgery was given."""
    given: list[dict[int, dict[str, torch.Tensor]]] = []
    real = place_resolved

    def place(parameters: Any, apart: Any, method: str, seed: int) -> dict[str, float]:
        given.append({number: {name: g.clone() for name, g in its.items()} for number, its in apart.items()})
        return real(parameters, apart, method, seed)

    monkeypatch.setattr(language_surgery, "place_resolved", place)
    return given


def contradict(workbench: Any) -> None:
    """Let every German pair prefer what the English one before it rejects: their gradients point apart."""
    rows = workbench.read("curated").to_pylist()
    for english, german in zip(rows[::2], rows[1::2], strict=True):
        german |= {"prompt": english["prompt"], "chosen": english["rejected"], "rejected": english["chosen"]}
        german["prompt"] = [{**german["prompt"][0], "content": german["prompt"][0]["content"] + "!"}]
    workbench.write("curated", pa.Table.from_pylist(rows, schema=TABLES["curated"].schema))
    workbench.write("gradients", workbench.gradients(rows, workbench.policy))


SETTINGS = {"method": "lora", "batch_size": 6, "max_steps": 2, "micro_batch_size": 2, "max_grad_norm": 1.0}


def test_the_languages_shares_add_up_to_the_plain_gradient_and_are_resolved_as_torchjd_does(
    workbench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two languages: PCGrad has one answer, whatever the order. Micro-batches hold both languages, in float32: 1e-5."""
    contradict(workbench)
    plain = watch(monkeypatch, PairTrainer)
    train(workbench.context("plain", **SETTINGS))
    given = shares(monkeypatch)
    resolved = watch(monkeypatch, LanguageSurgeryTrainer)
    metrics = train(workbench.context("resolved", **SETTINGS, language_surgery="pcgrad"))
    first, (a, b) = given[0], (given[1][0], given[1][1])
    for name, gradient in plain[0].items():
        torch.testing.assert_close(first[0][name] + first[1][name], gradient, rtol=1e-5, atol=1e-7)
    met = []
    for bucket in sorted({name.split(".lora_")[0] for name in a}):
        names = [name for name in a if name.startswith(bucket)]
        stacked = torch.stack([torch.cat([its[name].flatten() for name in names]) for its in (a, b)])
        wanted = PCGrad()(stacked)
        found = torch.cat([resolved[-1][name].flatten() for name in names])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * float(stacked.norm()))
        met.append(bool((stacked[0] @ stacked[1]) < 0))
    logged = {row["name"]: row["value"] for row in metrics if row["step"] == 2}
    assert logged["surgery/conflicts"] == pytest.approx(sum(met) / len(met)) and any(met)
    assert 0 < logged["surgery/cosine"] <= 1


def test_without_a_conflict_it_is_the_plain_step() -> None:
    """Gradients at right angles or less: u is their sum, with weights of exactly 1."""
    torch.manual_seed(0)
    common = torch.rand(3, 4)
    apart = {n: {"m.lora_A.w": common + torch.rand(3, 4), "m.lora_B.w": torch.rand(4, 2)} for n in range(3)}
    parameters = {name: torch.nn.Parameter(torch.zeros_like(g)) for name, g in apart[0].items()}
    figures = place_resolved(parameters, apart, "pcgrad", 0)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, sum(its[name] for its in apart.values()), rtol=1e-6, atol=0)
    assert figures == {"surgery/conflicts": 0.0, "surgery/cosine": pytest.approx(1.0), "surgery/unsolved": 0.0}


LENGTHS = [
    (method, 1.5 if method == "cagrad" else 1.0)
    for method in get_args(TrainConfig.model_fields["language_surgery"].annotation)
    if method != "none"
]


@pytest.mark.parametrize(("method", "length"), LENGTHS)
def test_languages_that_agree_step_as_far_as_without_surgery(method: str, length: float) -> None:
    """CAGrad goes c = 0.5 further, by its formula. Gradients that differ by 1%, since some methods invert the Gram matrix: to 2%."""
    torch.manual_seed(0)
    common = torch.randn(40)
    apart = {n: {"w": common + 0.01 * torch.randn(40)} for n in range(3)}
    parameters = {"w": torch.nn.Parameter(torch.zeros(40))}
    figures = place_resolved(parameters, apart, method, 0)
    torch.testing.assert_close(parameters["w"].grad, length * 3 * common, rtol=0.02, atol=0.1)
    assert figures["surgery/cosine"] > 0.999


@pytest.mark.parametrize(("method", "length"), LENGTHS)
def test_a_language_without_a_gradient_in_a_bucket_changes_nothing(method: str, length: float) -> None:
    common = torch.tensor([1.0, -2.0, 3.0])
    apart = {0: {"w": common}, 1: {"w": torch.zeros(3)}, 2: {"w": common.clone()}}
    parameters = {"w": torch.nn.Parameter(torch.zeros(3))}
    place_resolved(parameters, apart, method, 0)
    torch.testing.assert_close(parameters["w"].grad, length * 2 * common, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["pcgrad", "mgda", "imtl_g", "upgrad", "dualproj"])
def test_no_language_is_worse_off_to_first_order_where_the_method_promises_it(method: str) -> None:
    """<u, G_l> >= 0 of two conflicting languages, in each bucket by itself."""
    apart = {
        0: {"a.lora_A.w": torch.tensor([1.0, 0.2]), "b.lora_A.w": torch.tensor([1.0, 0.0])},
        1: {"a.lora_A.w": torch.tensor([-0.8, 0.3]), "b.lora_A.w": torch.tensor([0.0, 2.0])},
    }
    parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in apart[0]}
    place_resolved(parameters, apart, method, 0)
    for its in apart.values():
        for name, gradient in its.items():
            assert float(parameters[name].grad @ gradient) > -1e-5


def test_a_method_that_leaves_nothing_of_the_gradients_says_so() -> None:
    """Of two that oppose each other, one three times as long, the shortest mixture is 0."""
    apart = {0: {"w": torch.tensor([1.0, 0.0])}, 1: {"w": torch.tensor([-3.0, 0.0])}}
    parameters = {"w": torch.nn.Parameter(torch.zeros(2))}
    figures = place_resolved(parameters, apart, "mgda", 0)
    assert parameters["w"].grad.norm() < 1e-6 and figures["surgery/cosine"] == 0


@pytest.mark.parametrize("method", ["upgrad", "dualproj"])
def test_gradients_that_are_alike_to_single_precision_have_weights(method: str) -> None:
    """Inner products in float32 make a quadratic program of these that is not convex."""
    torch.manual_seed(0)
    common = torch.randn(65_536)
    apart = {n: {"w": (1 + n / 10) * common + 3e-4 * torch.randn(65_536)} for n in range(3)}
    parameters = {"w": torch.nn.Parameter(torch.zeros(65_536))}
    assert place_resolved(parameters, apart, method, 0)["surgery/unsolved"] == 0


def test_gradients_that_cancel_have_figures() -> None:
    """The length of their sum is rounding, which may be below 0 as a product."""
    for seed in range(20):
        torch.manual_seed(seed)
        one, other = torch.randn(2, 256)
        apart = {n: {"w": g} for n, g in enumerate([one, other, -(one + other)])}
        parameters = {"w": torch.nn.Parameter(torch.zeros(256))}
        assert -1 <= place_resolved(parameters, apart, "pcgrad", seed)["surgery/cosine"] <= 1


def test_a_bucket_without_weights_keeps_the_sum_and_is_counted() -> None:
    """IMTL-G has none for two gradients of one length that oppose each other; the other bucket is resolved."""
    apart = {
        0: {"a.lora_A.w": torch.tensor([1.0, 0.0]), "b.lora_A.w": torch.tensor([1.0, 0.5])},
        1: {"a.lora_A.w": torch.tensor([-1.0, 0.0]), "b.lora_A.w": torch.tensor([-0.5, 1.0])},
    }
    parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in apart[0]}
    figures = place_resolved(parameters, apart, "imtl_g", 0)
    assert figures["surgery/unsolved"] == 0.5
    assert parameters["a.lora_A.w"].grad.tolist() == [0.0, 0.0]
    assert float(parameters["b.lora_A.w"].grad @ apart[1]["b.lora_A.w"]) > 0


def test_gradients_that_are_not_finite_are_left_for_what_looks_at_them() -> None:
    apart = {0: {"w": torch.tensor([1.0, torch.inf])}, 1: {"w": torch.tensor([1.0, 1.0])}}
    parameters = {"w": torch.nn.Parameter(torch.zeros(2))}
    place_resolved(parameters, apart, "pcgrad", 0)
    assert parameters["w"].grad.tolist() == [2.0, torch.inf]


def test_the_micro_batch_changes_nothing(workbench: Any) -> None:
    """float32, and AdamW divides small gradients by themselves: to a hundredth of a step of 1e-2."""
    contradict(workbench)
    small = workbench.context("small", **{**SETTINGS, "micro_batch_size": 1}, language_surgery="pcgrad")
    large = workbench.context("large", **{**SETTINGS, "micro_batch_size": 6}, language_surgery="pcgrad")
    train(small), train(large)
    for name, weight in weights(small).items():
        torch.testing.assert_close(weight, weights(large)[name], rtol=1e-4, atol=1e-4)


def test_a_stopped_training_ends_with_the_same_weights(workbench: Any) -> None:
    contradict(workbench)
    settings = {**SETTINGS, "max_steps": 3, "save_steps": 1, "language_surgery": "pcgrad"}
    whole = workbench.context("whole", **settings)
    metrics = train(whole)
    with pytest.raises(Stopped):
        train(workbench.context("halted", **settings, stop_at=1))
    resumed = workbench.context("halted", **settings)
    assert train(resumed) == metrics
    assert all(torch.equal(weight, weights(resumed)[name]) for name, weight in weights(whole).items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "full"}, "no use with train.method: full"),
        ({"processes": 2}, "train.processes: 1"),
        ({"method": "full", "allo": {"mask": "warmup"}}, "do not go together"),
        ({"orthalign": {"objectives": [{"name": n, "where": "true"} for n in "ab"]}}, "do not go together"),
        ({"sections": {"languages": {"seen": ["en"]}}}, "languages.seen has one"),
    ],
)
def test_what_does_not_go_together_is_refused(workbench: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        workbench.context("refused", **{"method": "lora", **settings}, language_surgery="pcgrad")


def test_figures_of_a_step_are_means_over_its_pairs_as_without_surgery(workbench: Any) -> None:
    """Four pairs of one language and two of the other, or so, in a batch; before the first step both trainings have the same weights. float32: 1e-4."""
    rows = workbench.read("curated").to_pylist()
    for n, row in enumerate(rows):
        row["language"] = "de" if n % 3 == 0 else "en"
    workbench.write("curated", pa.Table.from_pylist(rows, schema=TABLES["curated"].schema))
    settings = SETTINGS | {"micro_batch_size": 6, "max_steps": 1}
    figures = []
    for name, extra in (("plain", {}), ("apart", {"language_surgery": "pcgrad"})):
        logged = train(workbench.context(name, **settings, **extra))
        figures.append({row["name"]: row["value"] for row in logged if row["step"] == 1})
    plain, apart = figures
    same = [name for name in plain if name.startswith(("logps/", "rewards/"))]
    assert len(same) >= 4
    for name in same:
        assert apart[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-4), name


def test_pairs_of_one_language_train_as_without_surgery_and_it_is_said(workbench: Any) -> None:
    rows = [{**row, "language": "de"} for row in workbench.read("curated").to_pylist()]
    workbench.write("curated", pa.Table.from_pylist(rows, schema=TABLES["curated"].schema))
    said: list[str] = []
    apart = workbench.context("apart", **SETTINGS, language_surgery="pcgrad")
    train(replace(apart, progress=Silent(said.append)))
    plain = workbench.context("plain", **SETTINGS)
    train(plain)
    assert "all pairs are de: train.language_surgery has nothing to resolve" in said
    for name, weight in weights(apart).items():
        torch.testing.assert_close(weight, weights(plain)[name], rtol=1e-4, atol=1e-4)
