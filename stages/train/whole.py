"""Weights that are not cut over processes, in a checkpoint: under the names that they have in the model.

transformers would write the names of the hub's files, and read them back by the model's: where they differ (experts are many tensors in a
file and one in the module) a resumed run went on with the weights it had begun with.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from schemas.errors import UserError
from stages.models.folder import weight_files


def write_whole(model: PreTrainedModel, folder: Path) -> None:
    """Write its weights and configuration."""
    model.save_pretrained(folder, save_original_format=False)


def read_whole(model: PreTrainedModel, folder: Path, assign: bool = False) -> None:
    """Read what `write_whole` wrote, in place. assign: the tensors in the files take the place of the model's, mapped, in their dtype.
    Raises UserError where names are missing or unknown; then nothing is certain of the model."""
    first: dict[int, str] = {}
    one_of = {  # a tied weight is in the files under one of its names
        name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    missing, unknown = set(one_of.values()), set[str]()
    for path in weight_files(folder):
        tensors = load_file(path)
        unknown |= tensors.keys() - one_of.keys()
        missing -= {one_of[name] for name in tensors.keys() & one_of.keys()}
        model.load_state_dict(tensors, strict=False, assign=assign)
    if missing or unknown:
        odd = [f"lacks {len(missing)} weights, {min(missing)}"] if missing else []
        odd += [f"has {len(unknown)} that the model lacks, {min(unknown)}"] if unknown else []
        raise UserError(
            f"The checkpoint {folder.name} is of another model, or of another version: it {' and '.join(odd)}",
            where=str(folder),
            fix="Remove the folder: training then goes on from the checkpoint before it, or begins anew.",
        )
    if assign:
        model.tie_weights()
