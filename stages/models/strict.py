"""A model's files against its architecture, before weights are read: the loader's own rules, run on tensors without data.

transformers fills what it does not find with random numbers and only warns; so does nobody who reads a run's results. Here
a folder's tensors (names, shapes and types from the headers) are loaded into a model on the meta device, renamings,
conversions and ties included, and anything missing, unexpected or misshapen is an error that names it. Takes seconds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from schemas.errors import UserError, first_line, foreign
from stages.contract import ModelRef
from stages.models.folder import is_quantised, weight_files
from stages.models.text_model import auto_class, is_wrapper
from stages.text.render import load_tokenizer

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
}
_IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias)$")
"""Buffers that older versions of transformers wrote beside the weights."""
_NOT_TEXT = re.compile(r"vision|visual|image|audio|speech|video|multi_modal|projector|(^|\.)mtp\.")
"""Parts of a wrapper that a text model does not have."""
_WRAPPERS = {
    "_orig_mod.": "torch.compile (save model._orig_mod)",
    "module.": "DataParallel or DDP (save model.module)",
    "_fsdp_wrapped_module.": "FSDP (save its full state dict)",
    "base_model.model.": "PEFT (save model.merge_and_unload(), or give the adapter's folder)",
    "base_layer.": "PEFT (save model.merge_and_unload(), or give the adapter's folder)",
    "lora_": "PEFT (save model.merge_and_unload(), or give the adapter's folder)",
    "policy.": "a trainer (save the model inside it)",
    "pretrained_model.": "a model with a value head (save its pretrained_model)",
}
_OTHER_HEADS = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|RewardModel|ImageClassification|CTC)$"
)
_SHOWN = 3


def skeleton(
    model: ModelRef, trust_remote_code: bool = False, class_of: Callable[[Any], Any] = auto_class
) -> PreTrainedModel:
    """The model on the meta device; class_of: a config's transformers class. Raises UserError when its files do not fit its architecture, or its tokenizer its
    embeddings."""
    assert model.path is not None
    config = config_of(model, trust_remote_code, language_model=class_of is auto_class)
    with foreign(partial(unloadable, model)):
        with torch.device("meta"):
            made: PreTrainedModel = class_of(config).from_config(config, trust_remote_code=trust_remote_code)
        if not is_quantised(model.path):  # its tensors are packed, to be unpacked while they are read
            disable_progress_bar()  # of tensors without data
            with _quiet() as lines:
                try:
                    kind: Any = type(made)
                    made, found = kind.from_pretrained(
                        None,
                        config=made.config,
                        state_dict=headers(model.path),
                        device_map={"": "meta"},
                        output_loading_info=True,
                        ignore_mismatched_sizes=True,
                    )
                except RuntimeError as error:
                    raise UserError(
                        f"The weights of {model.name} do not fit its architecture ({type(made).__name__}): {_named(lines, error)}",
                        where=str(model.path),
                        fix="Download or save the model again.",
                    ) from error
            refuse_misfits(model, made, found)
    check_tokenizer(model, made, trust_remote_code)
    return made


def config_of(model: ModelRef, trust_remote_code: bool, language_model: bool = True) -> Any:
    """The model's configuration. Raises UserError; language_model: also for one that is none."""
    with foreign(partial(unloadable, model)):
        config = AutoConfig.from_pretrained(str(model.path), trust_remote_code=trust_remote_code, local_files_only=True)
        if language_model:
            refuse_other_kinds(model, config)
        return config


def refuse_other_kinds(model: ModelRef, config: Any) -> None:
    """Raise UserError for a model that does not continue texts: an encoder, an encoder and decoder, a classifier."""
    saved = (getattr(config, "architectures", None) or [""])[0]
    encoder = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    kind = ""
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder (sequence-to-sequence) model"
    elif encoder or saved.endswith("ForMaskedLM"):
        kind = "an encoder, which does not continue texts"
    elif other := _OTHER_HEADS.search(saved):
        kind = f"no language model: its head is for {other.group(1)}"
    if kind:
        raise UserError(
            f"{model.name} is {kind} ({saved or config.model_type})",
            where=str(model.path),
            fix="Give a causal language model: an architecture that ends in ForCausalLM.",
        )


def headers(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's tensors without data."""
    found: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                part = file.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype(), torch.float32)
                found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return found


def refuse_misfits(model: ModelRef, made: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Raise UserError for tensors that are missing, unexpected or misshapen. found: transformers' loading info."""
    text_only = made.config.get_text_config() is made.config and not is_wrapper(made)
    unexpected = sorted(
        name
        for name in found["unexpected_keys"]
        if not _IGNORED.search(name) and not (text_only and _NOT_TEXT.search(name))
    )
    missing, misshapen = sorted(found["missing_keys"]), sorted(found["mismatched_keys"], key=str)
    if not (unexpected or missing or misshapen or found["error_msgs"]):
        return
    said = []
    if missing:
        said.append(f"{len(missing)} are missing ({_some(missing)}), which transformers would fill with random numbers")
    if unexpected:
        said.append(f"{len(unexpected)} are not the architecture's ({_some(unexpected)})")
    if misshapen:
        shapes = [f"{name} {_shape(have)} instead of {_shape(want)}" for name, have, want in misshapen]
        said.append(f"{len(misshapen)} have another shape ({_some(shapes)})")
    said += [first_line(ValueError(message)) for message in found["error_msgs"]]
    wrapper = next((how for mark, how in _WRAPPERS.items() if any(_marked(name, mark) for name in unexpected)), "")
    fix = "Download or save the model again, or correct its config.json."
    if wrapper:
        fix = f"The names are those of a wrapper, {wrapper}: save the model inside it, or take the wrapper out of the names."
    raise UserError(
        f"The weights of {model.name} do not fit its architecture ({type(made).__name__}): {'; '.join(said)}",
        where=str(model.path),
        fix=fix,
    )


def check_tokenizer(model: ModelRef, made: PreTrainedModel, trust_remote_code: bool = False) -> None:
    """Raise UserError when the tokenizer gives ids that the embeddings have no row for.

    More rows than tokens is fine (padding). So are special tokens beyond the rows that text never gets (a mark for images):
    but not the ones that pad, begin or end a text.
    """
    embeddings: Any = made.get_input_embeddings()
    rows = int(embeddings.weight.shape[0])
    tokenizer = load_tokenizer(model, trust_remote_code)
    used = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    marks = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} - used
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows and index not in marks}
    if beyond:
        names = sorted(beyond, key=lambda token: beyond[token])
        raise UserError(
            f"The tokenizer of {model.name} has {len(beyond)} tokens that the model has no embedding for ({_some(names)}): "
            f"ids to {max(beyond.values())}, {rows} rows",
            where=str(model.path),
            fix="Use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) and train the new rows.",
        )


def unloadable(model: ModelRef, error: Exception) -> UserError:
    """The words for a model that transformers cannot load."""
    return UserError(
        f"The model {model.name} cannot be loaded: {first_line(error)}",
        where=str(model.path),
        fix="Check that transformers knows this architecture; code shipped with a model needs "
        "model.trust_remote_code: true.",
    )


def _marked(name: str, mark: str) -> bool:
    return name.startswith(mark) or f".{mark}" in name


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:_SHOWN]) + (", …" if len(shown) > _SHOWN else "")


def _shape(size: Any) -> str:
    return "x".join(map(str, size))


def _named(lines: list[str], error: Exception) -> str:
    """The tensors that a loading report names."""
    found = [line.split("|")[0].strip() for line in lines if re.search(r"\|\s*(MISMATCH|CONVERSION)", line)]
    return f"{_some(found)} cannot be put together from the files" if found else first_line(error)


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage()).splitlines()


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """transformers' log lines are kept instead of shown."""
    logger, kept = logging.getLogger("transformers"), _Kept()
    before = logger.handlers[:]
    logger.handlers = [kept]
    try:
        yield kept.lines
    finally:
        logger.handlers = before
