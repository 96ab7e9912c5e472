"""Every loss of `loss.type` as it is trained: value and gradient against its closed form, and the weights curation gives pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_train_loss import BETA, ROWS, batch_loss, trainer_for
from torch import Tensor
from transformers import AutoModelForCausalLM

from schemas.config import RunConfig
from schemas.config.loss import LossConfig
from stages.gradients.weights import pair_weights
from stages.train.batches import BatchPlan
from stages.train.phase import Phase, _arguments
from stages.train.session import Session
from stages.train.stage import Train
from tests.stages.pair_losses import LOSSES, SETTINGS

COUNTS = [torch.tensor([len(ids) for ids in ROWS[name]]) for name in ("chosen_ids", "rejected_ids")]


def log_ratios(model: torch.nn.Module) -> list[Tensor]:
    """s - s_ref of chosen and rejected [4], from plain logits of one sequence at a time, with their graph."""
    found = []
    for side in ("chosen", "rejected"):
        sums = []
        for prompt, completion, reference in zip(
            ROWS["prompt_ids"], ROWS[f"{side}_ids"], ROWS[f"ref_{side}_logps"], strict=True
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
    trainer = trainer_for(tiny_folder, tmp_path, loss_type=[name], **SETTINGS.get(name, {}))
    loss = batch_loss(trainer)
    x_w, x_l = log_ratios(oracle)
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


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_curation_weighs_pairs_as_the_trained_loss_pushes_them(
    tiny_folder: Path, tmp_path: Path, oracle: torch.nn.Module, name: str
) -> None:
    """dL/ds_ref = -dL/ds of TRL's loss, per side, is what the conflict stage multiplies the sides' gradients by."""
    trainer = trainer_for(tiny_folder, tmp_path, loss_type=[name], **SETTINGS.get(name, {}))
    rows = [dict(zip(ROWS, values, strict=True)) for values in zip(*ROWS.values(), strict=True)]
    batch = trainer.data_collator(rows)
    references = [batch[f"ref_{side}_logps"].requires_grad_() for side in ("chosen", "rejected")]
    trainer.compute_loss(trainer.model, batch).backward()
    with torch.no_grad():
        x_w, x_l = log_ratios(oracle)
    settings = {"type": name, "beta": BETA, **SETTINGS.get(name, {})}
    got = pair_weights(LossConfig.model_validate(settings), x_w, x_l, *COUNTS)
    sides = torch.ones(4, 2) if got.sides_N2 is None else got.sides_N2
    for side, sign in enumerate((1.0, -1.0)):
        pushed = sign * 4 * references[side].grad.double() / BETA  # a mean over four pairs
        torch.testing.assert_close(
            (got.weight_N * sides[:, side]).double(), pushed, rtol=1e-4, atol=1e-5 * float(pushed.abs().max())
        )


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
    assert config().loss == LossConfig(type="sigmoid", beta=0.1, alpha=0.0)
