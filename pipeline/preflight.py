"""Checks before hours are spent: the files the config points to, and the packages the stages need."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from pipeline.config_digests import config_files
from schemas.config import RunConfig
from schemas.config.loggers import LOGGERS
from schemas.errors import UserError
from stages.catalog import StageSpec
from stages.conflict.solvers import packages

_INSTALL = 'Install them: pip install -e ".[cpu]" or ".[cuda]".'


def preflight(config: RunConfig, specs: Iterable[StageSpec]) -> None:
    """Raise UserError for a missing file or package of any of the stages."""
    for spec in specs:
        config_files(spec, config)
        _loggers(spec, config)
        missing = [package for package in _packages(spec, config) if find_spec(package) is None]
        if "vllm" in missing:
            raise UserError(
                "vLLM is not installed",
                where="engine.kind: vllm",
                fix='Install it (pip install -e ".[cuda]", or make with PLATFORM=cpu), or set engine.kind: transformers.',
            )
        if spec.name == "conflict" and (
            solvers := [name for name in packages(config.conflict.surgery) if name in missing]
        ):
            raise UserError(
                f"This surgery method needs the packages {', '.join(solvers)}",
                where=f"conflict.surgery: {config.conflict.surgery}",
                fix='Install them (pip install -e ".[solvers]"), or set conflict.surgery: pcgrad.',
            )
        if missing:
            raise UserError(f"Stage {spec.name} needs the packages {', '.join(missing)}", fix=_INSTALL)


def _loggers(spec: StageSpec, config: RunConfig) -> None:
    """Raise UserError for a logger of the stage's training that is not installed."""
    for section in (config.sft, config.train):
        for name in section.report_to if section.section == spec.name else ():
            if not LOGGERS[name].installed:
                raise UserError(
                    f"The logger {name} is not installed",
                    where=f"{section.section}.report_to",
                    fix=f"pip install {LOGGERS[name].install}, or remove it from {section.section}.report_to.",
                )


def _packages(spec: StageSpec, config: RunConfig) -> list[str]:
    engine = {"vllm": ["vllm"], "transformers": ["torch", "transformers"], "openai": ["openai", "transformers"]}
    needs = list(engine[config.engine.kind]) if spec.engine else []
    match spec.name:
        case "pairs":
            needs += ["transformers"]
        case "precondition" | "aggregate" | "gradients" | "evaluate":
            needs += ["torch", "transformers"]
        case "conflict":
            needs += ["torch", "transformers", *packages(config.conflict.surgery)]
        case "sft" | "train":
            section = config.sft if spec.name == "sft" else config.train
            needs += ["torch", "transformers", "trl", *(["peft"] if section.method == "lora" else [])]
    return needs
