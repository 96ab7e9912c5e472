"""The forward that is trained: the model's own, with nothing drawn at random and nothing added to the loss. docs/methods.md, preference training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from subprocess import CalledProcessError
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from schemas.errors import UserError, first_line
from stages.gradients.rows import BatchRow
from stages.models.compiler import INSTALL
from stages.train.scoring import Scorer

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Largest mean difference of token log-probabilities (nats) that rounding in other kernels and batch shapes explains, by compute dtype; a soft cap, a
scale or another mask moves them by far more."""
_NOISE = re.compile(r"drop|jitter", re.IGNORECASE)
_BALANCE = ("output_router_logits", "router_aux_loss_coef")
"""What TRL's trainers read of a mixture of experts, and SFTTrainer overwrites."""
_CAP, _CAP_IN_TRL = "logits_soft_cap", "final_logit_softcapping"


def make_plain(model: PreTrainedModel) -> Callable[[Any], None]:
    """Turn off the model's own dropout and the noise of its routers, wherever they are kept (modules, their attributes, the config); LoRA's dropout,
    added later, stays. No router logits, so no balancing loss; a soft cap of the logits under the name that TRL reads.

    Returns what gives a model with such a config its values back: they are part of what is exported.
    """
    before = {path: dict(vars(config)) for path, config in _configs(model.config)}
    own = {id(config): config for module in model.modules() for _, config in _configs(getattr(module, "config", None))}
    for config in [*own.values(), *(config for _, config in _configs(model.config))]:
        for name in _noise(config):
            setattr(config, name, 0.0)
        if getattr(config, _BALANCE[0], False):
            setattr(config, _BALANCE[0], False)
    for path, module in model.named_modules():
        if "lora_dropout" in path.split("."):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _noise(module):
            setattr(module, name, 0.0)
    text = model.config.get_text_config()
    if getattr(text, _CAP, None) and getattr(text, _CAP_IN_TRL, None) is None:
        setattr(text, _CAP_IN_TRL, getattr(text, _CAP))

    def give_back(trained: Any) -> None:
        for path, config in _configs(trained.config):
            for name in [name for name in vars(config) if _NOISE.search(name) or name in (*_BALANCE, _CAP_IN_TRL)]:
                if name in before.get(path, {}):
                    setattr(config, name, before[path][name])
                else:
                    delattr(config, name)

    return give_back


def check_forward(
    before: Sequence[torch.Tensor], model: Any, rows: Sequence[BatchRow], scorer: Scorer, section: str
) -> None:
    """Raise UserError unless TRL's forward in training mode gives some rows, padded into one batch, the log-probabilities the model gave them before,
    and the same once more. before: as from `Scorer.token_logps` of the model as it was loaded; model: as the trainer holds it."""
    kind = type(getattr(model, "get_base_model", lambda: model)()).__name__
    try:
        once, again = (torch.cat(_in_training(model, rows, scorer)) for _ in range(2))
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        raise _refusal(
            kind, f"cannot run in TRL's forward ({type(error).__name__}: {first_line(error)})", section
        ) from error
    except (RuntimeError, CalledProcessError) as error:
        if isinstance(error, RuntimeError) and "c compiler" not in str(error).lower():
            raise
        raise UserError(
            f"TRL's loss could not compile its kernels for the GPU ({type(error).__name__}: {first_line(error)})",
            where=section,
            fix=f"{INSTALL} The worker's log has the compiler's words.",
        ) from error
    tolerance = TOLERANCE[scorer.numbers.compute]
    for other, what in (
        (again, "itself when it runs in training mode twice"),
        (torch.cat([*before]), "the model's own forward"),
    ):
        difference = float((once - other).abs().mean())
        if not difference <= tolerance:  # NaN is not
            words = f"differs in TRL's forward from {what} by {difference:.3g} nats a token (tolerance {tolerance:g})"
            raise _refusal(kind, words, section)


def _refusal(kind: str, what: str, section: str) -> UserError:
    return UserError(
        f"{kind} {what}: its losses would be wrong",
        where=section,
        fix="Pairs of this kind of model can be curated, and exported to train elsewhere; to train here, use another model.",
    )


@torch.no_grad()
def _in_training(model: Any, rows: Sequence[BatchRow], scorer: Scorer) -> list[torch.Tensor]:
    """log pi of each completion's tokens, float32 on the CPU, as the trainer computes it."""
    device = model.get_input_embeddings().weight.device
    longest = max(map(len, rows))
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, -100)
    for n, row in enumerate(rows):
        ids_BT[n, : len(row)] = torch.tensor(row.prompt + row.completion)
        mask_BT[n, : len(row)] = 1
        labels_BT[n, len(row.prompt) : len(row)] = torch.tensor(row.completion)
    training = model.training
    model.train()
    for path, module in model.named_modules():
        if "lora_dropout" in path.split("."):
            module.eval()
    try:
        with scorer.numbers.forward():
            given = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
            outputs = model(**{n: t.to(device) for n, t in given.items()}, use_cache=False, fused_lm_head=True)
    finally:
        model.train(training)
    found_BT = outputs.log_probs.float().cpu()
    return [found_BT[n, len(row.prompt) - 1 : len(row) - 1] for n, row in enumerate(rows)]


def _noise(holder: Any) -> list[str]:
    """Attributes that say how often something is dropped, or how much is added."""
    values: Mapping[str, Any] = vars(holder)
    return [name for name, value in values.items() if isinstance(value, float) and value and _NOISE.search(name)]


def _configs(config: Any, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """(path, config) of a config and of those inside it."""
    if isinstance(config, PreTrainedConfig):
        yield path, config
        for name, value in vars(config).items():
            yield from _configs(value, f"{path}.{name}")
