"""Optimizers for training: AdamW merged online with a task vector. Usable without the pipeline, with plain torch or TRL."""

from stages.train.optimizers.active import ActiveEntries
from stages.train.optimizers.adamw import OnlineMergingAdamW
from stages.train.optimizers.build_vector import build_task_vector
from stages.train.optimizers.settings import Merge
from stages.train.optimizers.subspace import Protected
from stages.train.optimizers.task_vector import TaskVector

__all__ = ["ActiveEntries", "Merge", "OnlineMergingAdamW", "Protected", "TaskVector", "build_task_vector"]
