"""A prompt computed once gives the log-probabilities and sketches of two separate rows, or it is not shared."""

from __future__ import annotations

import pytest
import torch

from stages.gradients.batching import TokenBudget
from stages.gradients.layers import select_layers
from stages.gradients.projections import SketchLayout
from stages.gradients.rows import Pair, RowBatch
from stages.gradients.sharing import PROBE, PROBE_WINDOW, SharingCost, visible
from stages.gradients.sketcher import Sketcher

SHARING = (
    *("llama", "qwen2", "qwen3", "gemma2", "gemma2_eager", "gemma3", "mistral", "mistral_sliding", "phi", "phi3"),
    *("gpt2", "cohere", "granite"),
)
NOT_SHARING = ("bloom", "mamba", "lfm2")


def entered(model, dim=600, **options) -> Sketcher:
    unreached = ["*.dt_proj"] if model.config.model_type == "mamba" else []  # its weight is used without calling it
    return Sketcher(model, SketchLayout.plan(select_layers(model, exclude=unreached).layers, dim), seed=3, **options)


@pytest.mark.parametrize("architecture", SHARING)
def test_shared_prompts_change_nothing(architecture, make_model, make_pairs, fresh_seed) -> None:
    pairs = make_pairs(8, seed=fresh_seed)
    with entered(make_model(architecture), prefix_sharing=True) as sketcher:
        assert sketcher.sharing, sketcher.sharing_note
        shared, apart = sketcher.sketch(pairs, shared=True), sketcher.sketch(pairs)
    assert torch.cosine_similarity(shared.sketch_ND, apart.sketch_ND).min() >= 0.99999
    error = (shared.sketch_ND - apart.sketch_ND).norm(dim=1) / apart.sketch_ND.norm(dim=1)
    assert error.max() <= 1e-4
    torch.testing.assert_close(shared.logp_chosen_N, apart.logp_chosen_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared.logp_rejected_N, apart.logp_rejected_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "phi"])  # others compute their norms in float32 in any case
def test_shared_prompts_are_exact_in_float64(architecture, make_model, make_pairs) -> None:
    pairs = make_pairs(5, seed=2)
    with entered(make_model(architecture, dtype=torch.float64)) as sketcher:
        shared, apart = sketcher.sketch(pairs, shared=True), sketcher.sketch(pairs)
    torch.testing.assert_close(shared.sketch_ND, apart.sketch_ND, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", NOT_SHARING)
def test_models_that_read_the_sequence_itself_are_measured_and_left_alone(architecture, make_model, make_pairs) -> None:
    pairs = make_pairs(3, seed=1)
    model = make_model(architecture)
    with entered(model) as sketcher:
        want = sketcher.run(pairs, TokenBudget(1000))
    with entered(model, prefix_sharing=True) as sketcher:
        assert not sketcher.sharing
        assert type(model).__name__ in sketcher.sharing_note
        got = sketcher.run(pairs, TokenBudget(1000))
    assert torch.equal(got.sketch_ND, want.sketch_ND)


def test_a_window_that_the_model_ignores_is_found(make_model) -> None:
    """The probe narrows the window, so that one of thousands of tokens is felt on a short pair."""
    model = make_model("llama")
    model.config.sliding_window = 4096  # LlamaModel knows no window
    with entered(model, prefix_sharing=True) as sketcher:
        assert "another result" in sketcher.sharing_note
    assert model.config.sliding_window == 4096
    assert min(map(len, (PROBE.chosen, PROBE.rejected, PROBE.prompt))) > PROBE_WINDOW


def test_run_shares_where_it_pays_and_keeps_the_order(make_model, make_pairs) -> None:
    model = make_model("llama")
    short = make_pairs(5, seed=6)
    long = [Pair((4, 5), tuple(range(3, 28)), tuple(range(30, 55))) for _ in range(2)]
    pairs = [short[0], long[0], *short[1:], long[1]]
    cost = SharingCost(model)
    assert {cost.pays(pair) for pair in pairs} == {True, False}
    with entered(model) as sketcher:
        apart = sketcher.run(pairs, TokenBudget(100))
    batches: list[list[Pair]] = []
    with entered(model, prefix_sharing=True) as sketcher:
        together = sketcher.run(pairs, TokenBudget(100), batches.append)
    assert torch.cosine_similarity(together.sketch_ND, apart.sketch_ND).min() >= 0.99999
    torch.testing.assert_close(together.logp_chosen_N, apart.logp_chosen_N, rtol=1e-5, atol=1e-5)
    assert sorted((pair for batch in batches for pair in batch), key=repr) == sorted(pairs, key=repr)
    for batch in batches:
        assert len({cost.pays(pair) for pair in batch}) == 1


def test_pairs_that_do_not_fit_are_named_by_their_place(make_model, make_pairs, monkeypatch) -> None:
    model, pairs = make_model("llama"), make_pairs(6, seed=4)
    with entered(model, prefix_sharing=True) as sketcher:
        launch = sketcher._launch

        def small(batch, shared):
            if any(pair in (pairs[1], pairs[4]) for pair in batch):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return launch(batch, shared)

        monkeypatch.setattr(sketcher, "_launch", small)
        misfits: list[int] = []
        got = sketcher.run(pairs, TokenBudget(1000), misfits=misfits)
    assert misfits == [1, 4]
    with entered(model) as sketcher:
        want = sketcher.sketch([pairs[i] for i in (0, 2, 3, 5)])
    torch.testing.assert_close(got.sketch_ND, want.sketch_ND, rtol=1e-4, atol=1e-4)


def test_both_sides_are_never_shared(make_model, make_pairs) -> None:
    with entered(make_model("llama"), both_sides=True, prefix_sharing=True) as sketcher:
        assert "both sides" in sketcher.sharing_note
        assert sketcher.run(make_pairs(2), TokenBudget(100)).chosen_ND is not None
        with pytest.raises(ValueError, match="row for each side"):
            sketcher.sketch(make_pairs(2), shared=True)


def test_the_first_rejected_token_is_predicted_from_the_prompt() -> None:
    batch = RowBatch.build_shared([Pair((5, 6), (7, 8), (9, 10, 11)), Pair((1,), (2,), (3,))])
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9, 10, 11], [1, 2, 3, 0, 0, 0, 0]]
    assert batch.sharing.position_BT.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 1, 0, 0, 0, 0]]
    assert batch.row_M.tolist() == [0, 0, 1, 0, 0, 0, 1]
    assert batch.at_M.tolist() == [1, 2, 0, 1, 4, 5, 0]
    assert batch.target_M.tolist() == [7, 8, 2, 9, 10, 11, 3]
    spread = batch.spread(torch.arange(1.0, 8.0)).tolist()
    assert spread == [[1, 2, 0], [3, 0, 0], [4, 5, 6], [7, 0, 0]]
    for pair in (Pair((), (1,), (2,)), Pair((1,), (), (2,)), Pair((1,), (2,), ())):
        with pytest.raises(ValueError, match="tokens"):
            RowBatch.build_shared([pair])


@pytest.mark.parametrize("window", [None, 3])
def test_the_mask_hides_what_a_row_of_its_own_would_not_hold(window) -> None:
    """Against each side's own causal mask, written out; and the same from FlexAttention's evaluation of the function."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    pairs = [Pair((5, 6), (7, 8), (9, 10, 11)), Pair((1, 2, 3, 4), (2,), (3, 3, 3, 3))]
    sharing = RowBatch.build_shared(pairs).sharing
    rows, tokens = sharing.side_BT.shape
    index = torch.arange(tokens)
    mask = visible(sharing, window)
    got = mask(torch.arange(rows)[:, None, None], None, index[None, :, None], index[None, None, :])
    for b, pair in enumerate(pairs):
        p, c = len(pair.prompt), len(pair.chosen)
        for side in (range(p + c), [*range(p), *range(p + c, pair.joined)]):
            for q, query in enumerate(side):
                want = {key for k, key in enumerate(side) if k <= q and (window is None or q - k < window)}
                assert set(got[b, query].nonzero().flatten().tolist()) == want
    evaluated = flex.create_mask(mask, rows, None, tokens, tokens, device="cpu")
    assert torch.equal(evaluated[:, 0], got)
