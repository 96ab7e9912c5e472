"""The task vector of a run: built from the run's models once, shared by its rounds and by runs of the same models."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from schemas.errors import UserError
from schemas.ids import content_id
from stages.contract import Context, ModelRef
from stages.models.cache import cache_folder
from stages.models.load import dtype_of_files, load_causal_lm
from stages.models.process import one_at_a_time
from stages.models.strict import headers
from stages.train.optimizers.build_vector import TrainedParameter, build_task_vector
from stages.train.optimizers.task_vector import TaskVector
from stages.train.whole import write_whole


def task_vector_for(ctx: Context, model: nn.Module) -> TaskVector | None:
    """What `train.optimizer` merges with: theta_SFT - theta_base or, of an anchored rule, theta_SFT - the weights training starts from (None
    when they are the same, as in round 0).

    Kept in the user's cache folder under the hashes of both models. Raises UserError, naming the tensor, when the models do
    not fit `model`, the one that is trained.
    """
    train = ctx.config.train
    facts = train.merge_facts
    if facts is None:
        return None
    sft = ctx.models["sft"]
    other = ctx.models["policy" if facts.anchored else "base"]
    if sft.digest == other.digest:
        if facts.anchored:
            return None
        raise UserError(
            f"The task vector is zero: {sft.name} and {other.name} are the same model",
            where="train.merge.base",
            fix="Name the pretrained model that the SFT model was made from.",
        )
    # Against a later round's weights the difference is small: bfloat16 would move the anchor by 2^-9 of it.
    dtype = torch.float32 if facts.anchored else torch.bfloat16
    return TaskVector.open(_built(ctx, sft, other, wanted(model), dtype), train.merge.keep)


def wanted(model: nn.Module) -> dict[str, TrainedParameter]:
    """The trainable parameters by name; a tied one once, with its other names."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {
        name: TrainedParameter(tuple(parameter.shape), tuple(other for other in names[id(parameter)] if other != name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _built(
    ctx: Context, sft: ModelRef, other: ModelRef, parameters: dict[str, TrainedParameter], dtype: torch.dtype
) -> Path:
    if sft.path is None or other.path is None:
        missing = sft if sft.path is None else other
        raise UserError(f"There is no folder of {missing.name} on this machine", where="train.merge")
    shapes = sorted((name, list(want.shape), list(want.aliases)) for name, want in parameters.items())
    target = cache_folder() / "task_vectors" / f"{content_id(sft.digest, other.digest, shapes, str(dtype))}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(target.with_suffix(".lock")):
        if not target.is_file():
            ctx.progress.note(f"building the task vector: {sft.name} minus {other.name}")
            names, trust = (sft.name, other.name), ctx.config.model.trust_remote_code
            made = target.with_suffix(".models")
            shutil.rmtree(made, ignore_errors=True)  # what a kill left
            later, earlier = (
                _in_module_names(model, parameters, made / str(number), trust)
                for number, model in enumerate((sft, other))
            )
            build_task_vector(later, earlier, target, names=names, parameters=parameters, dtype=dtype)
            shutil.rmtree(made, ignore_errors=True)
    return target


def _in_module_names(model: ModelRef, parameters: dict[str, TrainedParameter], made: Path, trust: bool) -> Path:
    """The model's folder; a copy in `made` where its files have other names than the module (experts are many tensors in a file and one in
    the module)."""
    assert model.path is not None
    held = headers(model.path).keys()
    if all(held & {name, *want.aliases} for name, want in parameters.items()):
        return model.path
    loaded = load_causal_lm(model, dtype_of_files(model) or torch.float32, torch.device("cpu"), trust)
    if not all(loaded.state_dict().keys() & {name, *want.aliases} for name, want in parameters.items()):
        return model.path  # another architecture: it is said of its own names
    write_whole(loaded, made)
    return made
