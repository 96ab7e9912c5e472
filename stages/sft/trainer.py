"""TRL's SFTTrainer, given our token ids and labels.

Rows arrive tokenised and labelled, and TRL prepares nothing (`skip_prepare_dataset`): nothing is rendered again, packed, truncated
or dropped. Overrides of TRL 1.16 (pinned; tests/stages/sft check that the methods are still there):
- `_get_num_items_in_batch`: the loss is the mean over the step's learnt tokens whatever the model's forward accepts (transformers
  falls back to a mean over micro-batches).
- `create_optimizer`: torch's AdamW, weight decay on matrices only, as in the train stage.
- what `stages/train/resumable.py` names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer

from schemas.ids import seed_for
from stages.contract import Context
from stages.sft.conversations import IGNORED, Conversations
from stages.text.render import Renderer
from stages.train.arguments import common_arguments
from stages.train.batches import BatchPlan
from stages.train.callbacks import StepCallback
from stages.train.model import Precision, adapter_config, disable_dropout
from stages.train.optimizers.build import decay_groups
from stages.train.resumable import Resumable, train_all


class ConversationTrainer(Resumable, SFTTrainer):
    """SFTTrainer on rows of input_ids and labels: cross-entropy, mean over the learnt tokens of an optimizer step."""

    loss_is_scaled_for_ga: bool | None = True  # type: ignore[assignment]

    def __init__(self, *args: Any, identity: str, **kwargs: Any) -> None:
        self.identity = identity
        super().__init__(*args, **kwargs)

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor:
        """Learnt tokens in this optimizer step, over all devices."""
        tokens = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(tokens).sum() if self.args.world_size > 1 else tokens

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the model as it is wrapped now."""
        if self.optimizer is None:
            wrapped: Any = self.model if model is None else model
            self.optimizer = torch.optim.AdamW(
                decay_groups(wrapped, self.args.weight_decay), lr=self.args.learning_rate
            )
        return self.optimizer


def fine_tune(
    ctx: Context,
    folder: Path,
    model: PreTrainedModel,
    renderer: Renderer,
    conversations: Conversations,
    plan: BatchPlan,
    numbers: Precision,
    identity: str,
) -> tuple[Any, list[dict[str, Any]]]:
    """(the trained model, with its adapter if there is one; TRL's log). Checkpoints lie in folder/checkpoints. Raises Stopped
    when asked to stop; a checkpoint of the last step is then on disk."""
    config, sft = ctx.config, ctx.config.sft
    seed = seed_for(config.seed, "sft") % 2**32
    set_seed(seed)  # the adapter's first weights
    disable_dropout(model)
    steps = StepCallback(ctx.progress, ctx.stop, len(conversations), row="conversation")
    arguments = SFTConfig(
        output_dir=str(folder / "checkpoints"),
        run_name=f"{config.name}-sft",
        project=config.name,
        **common_arguments(sft, plan, numbers, seed),
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one device trains, whatever else is visible
    trainer = ConversationTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset(conversations.rows),
        processing_class=renderer.tokenizer,
        peft_config=adapter_config(sft.lora, model) if sft.method == "lora" else None,
        callbacks=[steps],
        identity=identity,
    )
    train_all(ctx, trainer, steps, len(conversations), "conversations", "sft")
    return trainer.model, trainer.state.log_history
