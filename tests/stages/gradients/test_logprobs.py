"""Completion log-probabilities equal log_softmax of the model's full logits; their gradient equals autograd's."""

from __future__ import annotations

import pytest
import torch

from stages.gradients.batching import TokenBudget
from stages.gradients.logprobs import Head, check_head, logprobs_of_rows, token_logprobs
from stages.gradients.rows import BatchRow, RowBatch

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi", "gpt2", "cohere", "granite")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_equal_full_logits(architecture, make_model, make_pairs, oracle_values, fresh_seed) -> None:
    model = make_model(architecture)
    rows = [row for pair in make_pairs(4, seed=fresh_seed) for row in pair.rows]
    values = logprobs_of_rows(model, rows, TokenBudget(64), chunk_elements=300)
    for row, value in zip(rows, values, strict=True):
        with torch.no_grad():
            want = oracle_values(model.eval(), row.prompt, row.completion)
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5)
        assert not value.requires_grad


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 70, 10**6])
def test_gradient_equals_autograd(softcap, chunk, fresh_seed) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    weight, bias, hidden = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((30, 8), (30,), (7, 8))
    )
    target = torch.randint(0, 30, (7,), generator=generator)
    upstream = torch.randn(7, generator=generator, dtype=torch.float64)
    hidden.requires_grad_(True)
    ours = token_logprobs(hidden, target, Head(weight, bias, 0.7, softcap), chunk)
    logits = 0.7 * (hidden @ weight.T + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    theirs = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (a,) = torch.autograd.grad((ours * upstream).sum(), hidden)
    (b,) = torch.autograd.grad((theirs * upstream).sum(), hidden)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_head_reads_scale_and_softcap(make_model) -> None:
    assert Head.of(make_model("gemma2")).softcap == 3.0
    assert Head.of(make_model("cohere")).scale == pytest.approx(0.3)
    assert Head.of(make_model("granite")).scale == pytest.approx(0.25)
    assert Head.of(make_model("phi")).bias is not None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_check_head_accepts_known_heads(architecture, make_model) -> None:
    check_head(make_model(architecture))


def test_check_head_refuses_an_unknown_logit_transform(make_model) -> None:
    model = make_model("llama")
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="transforms its logits"):
        check_head(model)


def test_check_head_does_not_take_the_rounding_of_another_batch_shape_for_attention_to_later_tokens(make_model) -> None:
    model = make_model("llama")
    norm_forward = model.model.norm.forward
    model.model.norm.forward = lambda hidden: norm_forward(hidden) * (1.5 if hidden.shape[0] > 1 else 1.0)
    check_head(model)


def test_check_head_refuses_attention_to_later_tokens(make_model) -> None:
    model = make_model("llama")
    norm_forward = model.model.norm.forward
    model.model.norm.forward = lambda hidden: norm_forward(hidden + hidden.mean(dim=1, keepdim=True))
    with pytest.raises(ValueError, match="not causal"):
        check_head(model)


def test_rows_need_prompt_and_completion() -> None:
    with pytest.raises(ValueError, match="at least one"):
        BatchRow((), (1,))
    with pytest.raises(ValueError, match="at least one"):
        BatchRow((1,), ())
    with pytest.raises(ValueError, match="at least one row"):
        RowBatch.build([])


def test_positions_predict_the_next_token() -> None:
    batch = RowBatch.build([BatchRow((5, 6), (7, 8, 9)), BatchRow((1,), (2,))])
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9], [1, 2, 0, 0, 0]]
    assert batch.row_M.tolist() == [0, 0, 0, 1]
    assert batch.at_M.tolist() == [1, 2, 3, 0]
    assert batch.target_M.tolist() == [7, 8, 9, 2]
    assert batch.spread(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]
