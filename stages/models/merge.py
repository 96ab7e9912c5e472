"""A PEFT adapter into its base model, once: every stage then sees an ordinary model.

`python -m stages.models.merge ADAPTER BASE TARGET` does the work, in a process of its own.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from schemas.files import publish
from schemas.ids import content_id
from stages.contract import ModelRef
from stages.models.folder import check_folder, pass_processors_on, read_json
from stages.models.process import one_at_a_time, run_module, say


def base_of(adapter: ModelRef) -> tuple[str, str | None]:
    """(name, revision) of the base that an adapter's adapter_config.json names. Raises UserError when it names none."""
    assert adapter.path is not None
    config = read_json(adapter.path / "adapter_config.json", adapter.name)
    base_name = config.get("base_model_name_or_path")
    if not isinstance(base_name, str) or not base_name:
        raise UserError(
            f"The adapter {adapter.name} does not name its base model",
            where=f"{adapter.path / 'adapter_config.json'}, base_model_name_or_path",
            fix="Write the base model's folder or hub id there.",
        )
    return base_name, config.get("revision")


def merged_adapter(adapter: ModelRef, base: ModelRef, cache: Path) -> ModelRef:
    """The adapter merged into its base, from the cache if it was merged before."""
    assert adapter.path is not None and base.path is not None
    digest = content_id("merged adapter", base.digest, adapter.digest)
    target = cache / "merged" / digest
    if not target.is_dir():
        arguments = [str(adapter.path), str(base.path), str(target)]
        run_module("stages.models.merge", arguments, f"Merging the adapter {adapter.name}")
    check_folder(target, adapter.name)
    return ModelRef(adapter.name, target, digest, (adapter.path, base.path))


def build_merged(adapter: Path, base: Path, target: Path) -> None:
    """Merge in float32, save in the base's own dtype with the adapter's tokenizer if it has one."""
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    from stages.models.load import load_causal_lm
    from stages.models.merging import merge_checked, with_adapter
    from stages.text.render import load_tokenizer

    with one_at_a_time(target.parent / f"{target.name}.lock"):
        if target.is_dir():
            return
        logging.disable_progress_bar()
        say(f"merging adapter {adapter} into {base}")
        work = target.parent / f"{target.name}.work"
        shutil.rmtree(work, ignore_errors=True)
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        model = load_causal_lm(ModelRef(str(base), base, ""), torch.float32, torch.device("cpu"))
        tokenizer_source = adapter if (adapter / "tokenizer_config.json").is_file() else base
        tokenizer = load_tokenizer(ModelRef(str(tokenizer_source), tokenizer_source, ""))
        model = merge_checked(with_adapter(model, adapter, str(adapter)), str(adapter))
        dtype = AutoConfig.from_pretrained(base, **local).dtype
        model.to(dtype if isinstance(dtype, torch.dtype) else torch.float32).save_pretrained(work)
        tokenizer.save_pretrained(work)
        pass_processors_on(base, work)
        publish(work, target)


if __name__ == "__main__":
    try:
        build_merged(*map(Path, sys.argv[1:4]))
    except UserError as error:
        say(" ".join(str(error).split()))
        sys.exit(1)
