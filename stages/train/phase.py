"""One training phase: TRL's trainer on some pairs, from the weights as they are, resumable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed
from trl import DPOConfig

from schemas.ids import seed_for
from stages.train.arguments import common_arguments
from stages.train.batches import BatchPlan
from stages.train.callbacks import StepCallback
from stages.train.dataset import TrainingPairs
from stages.train.forward import check_forward, make_plain
from stages.train.loggers import report_under
from stages.train.model import adapter_config
from stages.train.processes import world_size
from stages.train.resumable import train_all
from stages.train.seen import rows_seen
from stages.train.session import Session
from stages.train.trainer import PairTrainer

History = list[dict[str, Any]]
"""TRL's log."""


@dataclass(frozen=True)
class Phase:
    """What a phase trains on: plain DPO with AdamW, unless a subclass says otherwise.

    checkpoints: folder of its checkpoints; identity: what its weights depend on. number: of the phases of a training; later:
    optimizer steps of the phases after it. title: of its curves in loggers; none: those of the training. kind: the trainer.
    """

    pairs: TrainingPairs
    plan: BatchPlan
    checkpoints: Path
    identity: str
    number: int = 0
    later: int = 0
    title: str = ""
    kind: type[PairTrainer] = PairTrainer

    def options(self, session: Session, model: PreTrainedModel) -> dict[str, Any]:
        """Arguments that only this kind of trainer takes."""
        return {}


def train_phase(session: Session, model: PreTrainedModel, phase: Phase) -> tuple[Any, History]:
    """(the model trained, with its adapter if there is one; TRL's log). Raises Stopped when asked to stop; a checkpoint of
    the last step is then on disk."""
    rows, scorer = phase.pairs.pair(0).rows, session.scorer()
    looked_at = not session.numbers.sharded  # a model that will be cut is on no device yet
    before = scorer.token_logps(model, rows) if looked_at else []
    give_back = make_plain(model)
    trainer, steps = _trainer(session, model, phase)
    if looked_at:
        check_forward(before, trainer.model, rows, scorer, session.train.section)
    train_all(session, trainer, steps, len(phase.pairs))
    _restore_forward(model)
    trained = trainer.whole_model(session.numbers.compute)
    for one in (model, trained):
        give_back(one)
    return trained, trainer.state.log_history


def pairs_seen(session: Session, phase: Phase) -> set[int]:
    """Positions in curated of the pairs that the phase learns from."""
    seed = phase_seed(session, phase.number)
    rows = rows_seen(len(phase.pairs), phase.plan, session.train.batch_size, seed)
    return {phase.pairs.numbers[row] for row in rows}


def phase_seed(session: Session, number: int) -> int:
    """Of everything random in a phase: the first weights of an adapter, the order of the pairs, dropout, random masks."""
    return (seed_for(session.config.training_seed, session.ctx.round, "train") + number) % 2**32


def _restore_forward(model: PreTrainedModel) -> None:
    """Take back what TRL and accelerate put in the place of `forward`: accelerate wraps a model once, so that the next phase's
    forward, which TRL sets anew, would run without autocast."""
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        model.__dict__.pop(name, None)


def _trainer(session: Session, model: PreTrainedModel, phase: Phase) -> tuple[PairTrainer, StepCallback]:
    ctx, pairs, seed = session.ctx, phase.pairs, phase_seed(session, phase.number)
    set_seed(seed)  # the adapter's first weights
    steps = StepCallback(ctx, session.train, len(pairs), phase.later)
    trainer = _kind(phase, session)(
        model=model,
        args=_arguments(session, phase, seed),
        train_dataset=pairs.dataset(),
        processing_class=session.renderer.tokenizer,
        peft_config=adapter_config(session.train, model),
        callbacks=[steps],
        identity=phase.identity,
        preference=ctx.config.loss,
        **phase.options(session, model),
    )
    report_under(phase.title, trainer.callback_handler.callbacks)
    return trainer, steps


def _kind(phase: Phase, session: Session) -> Any:
    if world_size() == 1:
        return phase.kind
    from stages.train.together import together

    return together(phase.kind, session.numbers.copies)


class _Arguments(DPOConfig):
    """DPOConfig of a model that is where it should be: one that will be cut need not fit a device."""

    @property
    def place_model_on_device(self) -> bool:
        return False


def _arguments(session: Session, phase: Phase, seed: int) -> DPOConfig:
    config = session.config
    arguments = _Arguments(
        output_dir=str(phase.checkpoints),
        run_name=f"{config.name}-round-{session.ctx.round}",
        project=config.name,
        **common_arguments(config.train, phase.plan, session.numbers, seed),
        loss_type=[config.loss.in_trl],
        beta=config.loss.beta,
        label_smoothing=config.loss.smoothing,
        discopop_tau=config.loss.tau,
        precompute_ref_log_probs=True,
        disable_dropout=False,
    )
    # One device a process, whatever else is visible (tensor-parallel inference): no nn.DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
