"""TRL's SFTTrainer, given our token ids and labels.

Rows arrive tokenised and labelled, and TRL prepares nothing (`skip_prepare_dataset`): nothing is rendered again, packed, truncated
or dropped. Overrides of TRL 1.16 (pinned; tests/stages/sft check that the methods are still there):
- `_get_num_items_in_batch`: the loss is the mean over the step's learnt tokens whatever the model's forward accepts (transformers
  falls back to a mean over micro-batches).
- what `stages/train/resumable.py` names.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer

from schemas.ids import seed_for
from stages.gradients.rows import BatchRow
from stages.sft.conversations import IGNORED, Conversations
from stages.train.arguments import common_arguments
from stages.train.batches import BatchPlan
from stages.train.callbacks import StepCallback
from stages.train.forward import check_forward, make_plain
from stages.train.model import adapter_config
from stages.train.resumable import Resumable, train_all
from stages.train.session import Session


class ConversationTrainer(Resumable, SFTTrainer):
    """SFTTrainer on rows of input_ids and labels: cross-entropy, mean over the learnt tokens of an optimizer step."""

    loss_is_scaled_for_ga: bool | None = True  # type: ignore[assignment]

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor:
        """Learnt tokens in this optimizer step, over all devices."""
        tokens = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(tokens).sum() if self.args.world_size > 1 else tokens


def data_seed(session: Session) -> int:
    """Of the order of the conversations, and of an adapter's first weights."""
    return seed_for(session.config.seed, "sft") % 2**32


def fine_tune(
    session: Session, model: PreTrainedModel, conversations: Conversations, plan: BatchPlan
) -> tuple[Any, list[dict[str, Any]]]:
    """(the trained model, with its adapter if there is one; TRL's log). Raises Stopped when asked to stop; a checkpoint of the
    last step is then on disk."""
    config, sft = session.config, session.config.sft
    seed = data_seed(session)
    set_seed(seed)  # the adapter's first weights
    first, scorer = tuple(conversations.rows["input_ids"][0].as_py()), session.scorer()
    rows = [BatchRow(first[:1], first[1:])]
    before = scorer.token_logps(model, rows)
    give_back = make_plain(model)
    steps = StepCallback(session.ctx, sft, len(conversations))
    arguments = SFTConfig(
        output_dir=str(session.checkpoints),
        run_name=f"{config.name}-sft",
        project=config.name,
        **common_arguments(sft, plan, session.numbers, seed),
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one device trains, whatever else is visible
    trainer = ConversationTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset(conversations.rows),
        processing_class=session.renderer.tokenizer,
        peft_config=adapter_config(sft, model),
        callbacks=[steps],
        identity=session.identity,
    )
    check_forward(before, trainer.model, rows, scorer, sft.section)
    train_all(session, trainer, steps, len(conversations))
    for one in (model, trainer.model):
        give_back(one)
    return trainer.model, trainer.state.log_history
