"""The loss that is trained, by TRL's forward: its kernels run on GPUs alone. Against log-probabilities of the logits in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_check.report import Row, Sizes, right

_PART = "TRL's loss"
_BETA, _PROMPT = 0.1, 7


def loss(sizes: Sizes) -> Iterator[Row]:
    """Token log-probabilities and the gradient of one DPO step, padded rows of unequal lengths, in the dtypes that training computes in."""
    from trl.trainer.utils import add_fused_lm_head

    from benchmarks.gpu_check.gradients import _model

    torch.manual_seed(1)
    ids_BT = torch.randint(5, 512, (4, 40))
    lengths_B = torch.tensor([40, 31, 22, 40])
    places_T = torch.arange(ids_BT.shape[1])
    mask_BT = (places_T < lengths_B[:, None]).long()
    labels_BT = torch.where((mask_BT == 1) & (places_T >= _PROMPT), ids_BT, -100)
    oracle, slopes = _step(_model(64, 2, 512, torch.float64, "cpu"), ids_BT, mask_BT, labels_BT, fused=False)
    for dtype, nats, share in ((torch.float32, 1e-4, 1e-3), (torch.bfloat16, 0.1, 0.15)):
        model = _model(64, 2, 512, dtype, sizes.device)
        add_fused_lm_head(model)
        kind = str(dtype).removeprefix("torch.")
        found, gradient = _step(model, ids_BT, mask_BT, labels_BT, fused=True)
        yield right(_PART, f"log-probabilities in {kind} against float64", float((found - oracle).abs().mean()), nats)
        away = float((gradient - slopes).norm() / slopes.norm())
        yield right(_PART, f"gradient of a DPO step in {kind} against float64", away, share)


def _step(
    model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor, labels_BT: torch.Tensor, fused: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities of the labels [B, T - 1], gradient of the DPO loss of rows 0 and 1 against 2 and 3), float64 on the CPU."""
    ids_BT, mask_BT, labels_BT = (tensor.to(model.device) for tensor in (ids_BT, mask_BT, labels_BT))
    if fused:
        found_BT = model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT, fused_lm_head=True).log_probs
    else:
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1]
        targets_BT = labels_BT[:, 1:].clamp(min=0)
        all_BTV = logits_BTV.log_softmax(-1)
        found_BT = all_BTV.gather(-1, targets_BT[..., None])[..., 0].masked_fill(labels_BT[:, 1:] < 0, 0)
    sums_B = found_BT.sum(1)
    (-torch.nn.functional.logsigmoid(_BETA * (sums_B[:2] - sums_B[2:]))).mean().backward()
    gradient = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    return found_BT.detach().double().cpu(), gradient.cpu()
