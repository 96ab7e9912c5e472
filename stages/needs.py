"""Which packages stages need, by config: asked before a run, so nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from schemas.config import RunConfig
from schemas.config.loggers import LOGGERS
from schemas.config.model import EngineConfig
from schemas.config.trainer import TrainerConfig
from stages.spec import Needs
from stages.surgery.solvers import packages as surgery_packages


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


def judges(config: RunConfig) -> Needs:
    """The engines of all judges."""
    return _engines({judge.where: config.judge_engine(judge) for judge in config.judge.judges})


def evaluate_engines(config: RunConfig) -> Needs:
    """The run's engine, and that of the second judge."""
    second = config.evaluate.second_judge.engine
    return engine(config) if second is None else _engines({"engine": config.engine, "evaluate.second_judge": second})


def _engines(engines: Mapping[str, EngineConfig]) -> Needs:
    """The words are those of the first that lacks something."""
    wanted = [
        Needs(e.facts.packages, e.facts.fix, e.facts.missing, f"engine.kind: {e.kind} ({where})")
        for where, e in engines.items()
    ]
    return next((need for need in wanted if not all(map(find_spec, need.packages))), wanted[0])


def benchmarks(config: RunConfig) -> Needs:
    """lm-evaluation-harness, for `evaluate.tasks`."""
    return Needs(
        ("lm_eval",) if config.evaluate.tasks else (),
        'Install it (pip install -e ".[eval]"), or leave evaluate.tasks out.',
        "Benchmarks need lm-evaluation-harness, which is not installed",
        "evaluate.tasks",
    )


def surgery_solvers(config: RunConfig) -> Needs:
    """The solvers of `conflict.surgery`."""
    return Needs(
        tuple(surgery_packages(config.conflict.surgery)),
        'Install them (pip install -e ".[solvers]"), or set conflict.surgery: pcgrad.',
        "This surgery method needs the packages {}",
        f"conflict.surgery: {config.conflict.surgery}",
    )


def step_solvers(config: RunConfig) -> Needs:
    """The solvers of `train.language_surgery`."""
    method = config.train.language_surgery
    return Needs(
        tuple(surgery_packages(method)),
        'Install them (pip install -e ".[solvers]"), or set train.language_surgery: pcgrad.',
        "This surgery method needs the packages {}",
        f"train.language_surgery: {method}",
    )


def trainer(config: RunConfig) -> Needs:
    """What `train` trains with."""
    return _trainer(config.train)


def sft_trainer(config: RunConfig) -> Needs:
    """What `sft` trains with."""
    return _trainer(config.sft)


def loggers(config: RunConfig) -> Needs:
    """What `train` reports to."""
    return _loggers(config.train)


def sft_loggers(config: RunConfig) -> Needs:
    """What `sft` reports to."""
    return _loggers(config.sft)


def _trainer(section: TrainerConfig) -> Needs:
    return Needs(("torch", "transformers", "trl", *(["peft"] if section.method == "lora" else [])))


def _loggers(section: TrainerConfig) -> Needs:
    key, wanted = f"{section.section}.report_to", [LOGGERS[name] for name in section.report_to]
    install = " ".join(logger.install for logger in wanted if not logger.installed)
    return Needs(
        tuple(module for logger in wanted for module in logger.modules),
        f"pip install {install}, or remove it from {key}.",
        "The loggers of a training need what is not installed: {}",
        key,
    )
