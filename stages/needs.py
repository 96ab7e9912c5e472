"""Which packages stages need, by config: asked before a run, so nothing heavy is imported."""

from __future__ import annotations

from schemas.config import RunConfig
from schemas.config.sft import SftConfig
from schemas.config.training import TrainConfig
from stages.conflict.solvers import packages as surgery_packages
from stages.spec import Needs

_LOGGERS = ("tensorboard", "trackio", "wandb")


def tokenizer(config: RunConfig) -> Needs:
    """Texts become tokens."""
    return Needs(("transformers",))


def model(config: RunConfig) -> Needs:
    """A model runs in the stage itself."""
    return Needs(("torch", "transformers"))


def engine(config: RunConfig) -> Needs:
    """The inference engine of the config."""
    facts = config.engine.facts
    return Needs(facts.packages, facts.fix, facts.missing, f"engine.kind: {config.engine.kind}")


def surgery(config: RunConfig) -> Needs:
    """The solvers of `conflict.surgery`."""
    return Needs(
        tuple(surgery_packages(config.conflict.surgery)),
        'Install them (pip install -e ".[solvers]"), or set conflict.surgery: pcgrad.',
        "This surgery method needs the packages {}",
        f"conflict.surgery: {config.conflict.surgery}",
    )


def trainer(config: RunConfig) -> Needs:
    """What `train` trains and logs with."""
    return _trainer(config.train)


def sft_trainer(config: RunConfig) -> Needs:
    """What `sft` trains and logs with."""
    return _trainer(config.sft)


def _trainer(section: TrainConfig | SftConfig) -> Needs:
    loggers = [name for name in section.report_to if name in _LOGGERS]
    return Needs(("torch", "transformers", "trl", *(["peft"] if section.method == "lora" else []), *loggers))
