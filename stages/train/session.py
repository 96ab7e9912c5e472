"""What the parts of one training share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from schemas.config import RunConfig
from schemas.config.trainer import TrainerConfig
from schemas.config.training import TrainConfig
from stages.contract import Context, ModelRef
from stages.models.load import load_causal_lm, load_to_cut, settle_threads
from stages.text.render import Renderer, load_renderer
from stages.train.model import Precision, precision
from stages.train.processes import local_size
from stages.train.scoring import Scorer


@dataclass(frozen=True)
class Session:
    """ctx: of the stage. folder: where it keeps checkpoints, logs and the model. start: the model that is trained.

    identity: what the weights depend on; a checkpoint of another identity is never resumed from.
    """

    ctx: Context
    folder: Path
    start: ModelRef
    renderer: Renderer
    numbers: Precision
    identity: str = ""

    @classmethod
    def of(cls, ctx: Context, section: TrainerConfig, start: ModelRef) -> Session:
        """Settle numbers and threads of this process, and read the tokenizer. Raises UserError for what the config or this machine
        make impossible."""
        if ctx.folder is None:
            raise ValueError(f"{section.section} needs a folder")
        numbers = precision(ctx.config, section)
        settle_threads(ctx.config, local_size())
        renderer = load_renderer(start, ctx.config.text, ctx.config.model.trust_remote_code)
        return cls(ctx, ctx.folder, start, renderer, numbers)

    @property
    def config(self) -> RunConfig:
        """The whole config."""
        return self.ctx.config

    @property
    def train(self) -> TrainConfig:
        """The train section."""
        return self.ctx.config.train

    @property
    def note(self) -> Callable[[str], None]:
        """One line for people."""
        return self.ctx.progress.note

    @property
    def checkpoints(self) -> Path:
        """Where trainings keep their checkpoints, and phases and objectives what the next ones need."""
        return self.folder / "checkpoints"

    def trained_by(self, train: TrainConfig) -> Session:
        """The same with another train section."""
        config = self.config.model_copy(update={"train": train})
        return replace(self, ctx=replace(self.ctx, config=config))

    def load(self) -> Any:
        """The model that is trained, as it starts."""
        trust = self.config.model.trust_remote_code
        if self.numbers.sharded:
            return load_to_cut(self.start, trust)
        return load_causal_lm(self.start, self.numbers.load, self.numbers.device, trust)

    def scorer(self) -> Scorer:
        """Scores rows in the numbers of the trainer's forward."""
        return Scorer.of(self.ctx, self.numbers)
