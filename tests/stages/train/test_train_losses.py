"""Every loss of `loss.type` as it is trained: value and gradient against its closed form, and the weights curation gives pairs."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from test_train_loss import BETA, ROWS, trainer_for
from torch import Tensor
from transformers import AutoModelForCausalLM

from schemas.config import RunConfig
from schemas.config.loss import LossConfig
from stages.contract import ModelRef
from stages.gradients.weights import pair_weights
from stages.train.batches import BatchPlan
from stages.train.phase import Phase, _arguments
from stages.train.session import Session
from stages.train.stage import Train
from tests.stages.pair_losses import LOSSES, NLL, settings_of

COUNTS = [torch.tensor([len(ids) for ids in ROWS[name]]) for name in ("chosen_ids", "rejected_ids")]


def loss_of(name: str) -> LossConfig:
    """The config of a loss of `LOSSES`."""
    return LossConfig.model_validate(settings_of(name, BETA))


def rows_of(loss: LossConfig) -> dict[str, list[Any]]:
    """`ROWS`, with a reference of 0 for a loss without one, and for one whose value the formula knows only there."""
    zero = loss.reference_free or loss.nll
    return {column: [0.0] * 4 if zero and column.startswith("ref_") else values for column, values in ROWS.items()}


def batch_of(trainer: Any, rows: dict[str, list[Any]], of: slice = slice(None)) -> dict[str, Tensor]:
    """Some rows as the trainer sees them."""
    return trainer.data_collator([dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)][of])


def log_ratios(model: torch.nn.Module, rows: dict[str, list[Any]] = ROWS) -> list[Tensor]:
    """s - s_ref of chosen and rejected [4], from plain logits of one sequence at a time, with their graph."""
    found = []
    for side in ("chosen", "rejected"):
        sums = []
        for prompt, completion, reference in zip(
            rows["prompt_ids"], rows[f"{side}_ids"], rows[f"ref_{side}_logps"], strict=True
        ):
            logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            at = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
            sums.append(logps[at, torch.tensor(completion)].sum() - reference)
        found.append(torch.stack(sums))
    return found


@pytest.fixture(scope="module")
def oracle(tiny_folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_value_and_gradient_of_every_loss_equal_its_closed_form(
    tiny_folder: Path, tmp_path: Path, oracle: torch.nn.Module, name: str
) -> None:
    preference = loss_of(name)
    trainer, rows = trainer_for(tiny_folder, tmp_path, preference=preference), rows_of(preference)
    loss = trainer.compute_loss(trainer.model.train(), batch_of(trainer, rows))
    x_w, x_l = log_ratios(oracle, rows)
    want = LOSSES[name](x_w, x_l, *COUNTS, BETA).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)

    parameters = dict(oracle.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(want, list(parameters.values())), strict=True))
    loss.backward()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for parameter, gradient in trainer.model.named_parameters():
        torch.testing.assert_close(
            gradient.grad.double(), expected[parameter], rtol=1e-3, atol=1e-5 * scale, msg=parameter
        )


@pytest.mark.parametrize("name", sorted(name for name in LOSSES if "+" not in name))
def test_curation_weighs_pairs_as_the_trained_loss_pushes_them(
    tiny_folder: Path, tmp_path: Path, oracle: torch.nn.Module, name: str
) -> None:
    """dL/ds_ref = -dL/ds of TRL's loss, per side, is what the conflict stage multiplies the sides' gradients by."""
    trainer, rows = trainer_for(tiny_folder, tmp_path, preference=loss_of(name)), rows_of(loss_of(name))
    batch = batch_of(trainer, rows)
    references = [batch[f"ref_{side}_logps"].requires_grad_() for side in ("chosen", "rejected")]
    trainer.compute_loss(trainer.model, batch).backward()
    with torch.no_grad():
        x_w, x_l = log_ratios(oracle, rows)
    got = pair_weights(loss_of(name), x_w, x_l, *COUNTS)
    sides = torch.ones(4, 2) if got.sides_N2 is None else got.sides_N2
    for side, sign in enumerate((1.0, -1.0)):
        pushed = sign * 4 * references[side].grad.double() / BETA  # a mean over four pairs
        torch.testing.assert_close(
            (got.weight_N * sides[:, side]).double(), pushed, rtol=1e-4, atol=1e-5 * float(pushed.abs().max())
        )


@pytest.mark.parametrize("name", ["simpo", "sigmoid+nll", "simpo+nll"])
def test_the_gradient_curation_forms_is_the_one_that_is_trained_with(
    tiny_folder: Path, tmp_path: Path, oracle: torch.nn.Module, name: str
) -> None:
    """beta sum c_i (grad s_w, grad s_l weighed) / 4 = -grad L, in the parameters: to 1e-3, the trainer's in float32."""
    trainer, rows = trainer_for(tiny_folder, tmp_path, preference=loss_of(name)), rows_of(loss_of(name))
    trainer.compute_loss(trainer.model.train(), batch_of(trainer, rows)).backward()
    s_w, s_l = log_ratios(oracle, rows)
    weight_N, sides_N2 = pair_weights(loss_of(name), s_w.detach(), s_l.detach(), *COUNTS)
    pushed = BETA * (weight_N * (sides_N2[:, 0] * s_w - sides_N2[:, 1] * s_l)).mean()
    parameters = dict(oracle.named_parameters())
    want = dict(zip(parameters, torch.autograd.grad(pushed, list(parameters.values())), strict=True))
    scale = max(float(gradient.abs().max()) for gradient in want.values())
    for parameter, got in trainer.model.named_parameters():
        torch.testing.assert_close(-got.grad.double(), want[parameter], rtol=1e-3, atol=1e-5 * scale, msg=parameter)


def test_simpo_is_the_one_of_trls_cpo_trainer(tiny_folder: Path, tmp_path: Path) -> None:
    """Value to 1e-5, gradients to 1e-3 of the largest, and the rewards that are logged."""
    from trl.experimental.cpo import CPOTrainer

    preference = LossConfig(type="simpo", beta=2.0, gamma=1.1)
    trainer, rows = trainer_for(tiny_folder, tmp_path, preference=preference), rows_of(preference)
    ours = trainer.compute_loss(trainer.model.train(), batch_of(trainer, rows))
    ours.backward()
    theirs = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=1.1, beta=2.0, label_smoothing=0.0, accelerator=trainer.accelerator
    )
    model, averages = AutoModelForCausalLM.from_pretrained(tiny_folder), []
    for side in ("chosen", "rejected"):
        for prompt, completion in zip(rows["prompt_ids"], rows[f"{side}_ids"], strict=True):
            labels = torch.tensor([[-100] * len(prompt) + completion])
            logits = model(torch.tensor([prompt + completion])).logits
            averages.append(CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True))
    losses_N, chosen_N, rejected_N = CPOTrainer.cpo_loss(theirs, torch.cat(averages[:4]), torch.cat(averages[4:]))
    assert ours.item() == pytest.approx(losses_N.mean().item(), rel=1e-5)
    losses_N.mean().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5 * scale, msg=name)
    logged = trainer._metrics["train"]
    assert logged["rewards/chosen"][-1] == pytest.approx(chosen_N.mean().item(), rel=1e-4)
    assert logged["rewards/rejected"][-1] == pytest.approx(rejected_N.mean().item(), rel=1e-4)
    assert logged["rewards/accuracies"][-1] == (chosen_N > rejected_N).float().mean().item()


def test_dpo_and_nll_of_a_pair_is_trls_mixture_of_sigmoid_and_sft(tiny_folder: Path, tmp_path: Path) -> None:
    """Of one pair, where a mean over the micro-batch's tokens is one over the pair's: the same bits but for the order of sums."""
    ours = trainer_for(tiny_folder, tmp_path / "a", preference=loss_of("sigmoid+nll"))
    theirs = trainer_for(tiny_folder, tmp_path / "b")
    theirs.loss_types, theirs.loss_weights = ["sigmoid", "sft"], [1.0, NLL]
    for row in range(4):
        found = []
        for trainer in (ours, theirs):
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model.train(), batch_of(trainer, ROWS, slice(row, row + 1)))
            loss.backward()
            found.append((loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert len(ours._metrics["train"]["nll"]) == 4


def test_simpo_is_trained_without_a_reference(workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward is made for one, what is stored of one has no part, and the card says so."""

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a forward of the reference")

    monkeypatch.setattr("stages.train.job.checked_references", never)
    monkeypatch.setattr("stages.train.orthalign.recomputed", never)
    sections = {"loss": {"type": "simpo", "beta": 2.0, "gamma": 1.0}, "conflict": {"weighting": "none"}}
    figures = []
    for off in (0.0, 7.0):
        table = workbench.read("gradients")
        column = table.schema.get_field_index("ref_logp_chosen")
        values = pa.array([value - off for value in table["ref_logp_chosen"].to_pylist()], pa.float32())
        workbench.write("gradients", table.set_column(column, table.schema.field(column), values))
        ctx = workbench.context(f"train{off}", sections=sections, max_steps=2)
        ctx.models["reference"] = ModelRef("absent", workbench.root / "absent", "another digest")
        metrics = next(iter(Train().run(ctx))).data.to_pylist()
        figures.append([row["value"] for row in metrics if row["name"] in ("loss", "rewards/chosen")])
    assert figures[0] == figures[1] and all(math.isfinite(value) for value in figures[0])
    card = (ctx.folder / "model" / "README.md").read_text()
    assert "SimPO" in card and "no reference model" in card and "Reference model" not in card


@pytest.mark.parametrize("name", ["exo_pair", "ipo", "sppo_hard", "apo_down"])
def test_the_stage_trains_with_the_loss_and_settings_of_the_config(workbench, name: str) -> None:
    """Round 0 starts at the reference: the first loss is the formula at x = 0."""
    loss = {"type": name, "beta": 0.25} | ({"label_smoothing": 0.01} if name == "exo_pair" else {})
    ctx = workbench.context(sections={"loss": loss, "conflict": {"weighting": "none"}}, max_steps=1)
    metrics = next(iter(Train().run(ctx))).data.to_pylist()
    first = next(row["value"] for row in metrics if row["name"] == "loss")
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1)
    assert first == pytest.approx(float(LOSSES[name](zero, zero, one, one, 0.25)), rel=1e-3)
    card = (ctx.folder / "model" / "README.md").read_text()
    assert name in card and "log sigmoid" not in card


@pytest.mark.parametrize("name", ["robust", "discopop"])
def test_a_loss_without_settings_takes_those_of_its_paper(workbench, name: str) -> None:
    ctx = workbench.context(sections={"loss": {"type": name}})
    phase = Phase(None, BatchPlan(1, 1, 1, 1, 0), ctx.folder, "i")  # type: ignore[arg-type]
    arguments = _arguments(Session.of(ctx, ctx.config.train, workbench.model), phase, 0)
    assert arguments.loss_type == [name]
    assert arguments.discopop_tau == 0.05 and arguments.label_smoothing == (0.1 if name == "robust" else 0.0)


def config(**sections: object) -> RunConfig:
    rest = {
        "name": "t",
        "languages": {"seen": ["en"]},
        "model": {"policy": "m"},
        "prompts": {"sources": [{"path": "p"}]},
    }
    return RunConfig.model_validate(rest | sections)


REFUSED = {
    "aot": ({"type": "aot"}, {}, "sorts the pairs of a micro-batch"),
    "sft": ({"type": "sft"}, {}, "chosen answers alone"),
    "alpha": (
        {"type": "ipo", "alpha": 0.1},
        {"conflict": {"weighting": "none"}},
        "loss.alpha has no use with loss.type: ipo",
    ),
    "smoothing": ({"label_smoothing": 0.1}, {}, "loss.label_smoothing has no use with loss.type: sigmoid"),
    "tau": ({"type": "hinge", "discopop_tau": 0.1}, {}, "loss.discopop_tau has no use with loss.type: hinge"),
    "lengths": ({"type": "ipo"}, {}, "both_sides: true"),
    "simpo": ({"type": "simpo"}, {}, "both_sides: true"),
    "likelihood": ({"nll": 1.0}, {}, "sigmoid with loss.nll .*both_sides: true"),
    "gamma": ({"gamma": 0.5}, {}, "loss.gamma has no use with loss.type: sigmoid"),
    "no reference": (
        {"type": "simpo"},
        {"rounds": 2, "train": {"reference": "initial"}, "conflict": {"weighting": "none"}},
        "train.reference has no use with loss.type: simpo",
    ),
    "rpo": ({"type": "rpo"}, {}, "loss.nll"),
    "kto": ({"type": "kto"}, {}, "single answers with a label"),
    "orpo": ({"type": "orpo"}, {}, "simpo"),
    "later rounds": ({"type": "bco_pair"}, {"rounds": 2, "train": {"reference": "initial"}}, "both_sides: true"),
    "one-sided": (
        {"type": "ipo"},
        {"gradients": {"sketch": {"method": "one_sided"}}, "conflict": {"leave_out": "pair"}},
        "conflict.weighting: none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_loss_cannot_do_is_refused_with_the_reason(case: str) -> None:
    loss, rest, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        config(loss=loss, **rest)


def test_what_a_loss_can_do_is_accepted() -> None:
    config(loss={"type": "ipo"}, gradients={"sketch": {"both_sides": True}})
    config(loss={"type": "bco_pair"}, rounds=2)
    config(loss={"type": "apo_down"}, conflict={"weighting": "none"})
    simpo = config(loss={"type": "simpo", "beta": 2.0}, rounds=2, gradients={"sketch": {"both_sides": True}})
    assert simpo.loss.target == 0.5 and simpo.loss.label == "SimPO, gamma 0.5"
    assert config(loss={"nll": 0.2}, conflict={"weighting": "none"}).loss.label == "DPO + 0.2 NLL"
    assert config().loss == LossConfig(type="sigmoid", beta=0.1, alpha=0.0)
