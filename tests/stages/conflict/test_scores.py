"""Leave-one-out and leave-group-out scores equal directions recomputed from scratch; odd cases have defined results."""

from __future__ import annotations

import errno
import math
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import UserError
from schemas.tables import FEW_PAIRS
from stages.conflict.directions import directions, signed_directions
from stages.conflict.scores import FLAGS, PairScores
from stages.conflict.scoring import score_products, score_sketches
from stages.conflict.stream import Chunk
from stages.conflict.waiting import Waiting
from stages.gradients.omegas import ema_omegas, mean_omegas
from stages.surgery.methods import surgery


def from_scratch(g_ND, language_N, omega_N, n_languages, method, columns, labels, refit):
    """The definition: delete the pair's group, renormalise, rebuild every G', take cosines of whole vectors."""
    n, dim = g_ND.shape
    full = torch.stack([(omega_N[:, None] * g_ND)[language_N == k].sum(dim=0) for k in range(n_languages)])
    weight_SL = [method(full[:, c] @ full[:, c].T) for c in columns]
    out = []
    for i in range(n):
        stay = torch.tensor([label != labels[i] for label in labels])
        rest = torch.zeros(n_languages, dim, dtype=torch.float64)
        for k in range(n_languages):
            mine = stay & (language_N == k)
            if mine.any():
                rest[k] = (omega_N[mine, None] * g_ND[mine]).sum(dim=0) / omega_N[mine].sum()
        weights = [method(rest[:, c] @ rest[:, c].T) for c in columns] if refit else weight_SL
        merged, others = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
        for c, w in zip(columns, weights, strict=True):
            merged[c] = w @ rest[:, c]
            others[c] = torch.where(torch.arange(n_languages) == language_N[i], 0.0, w) @ rest[:, c]
        cosine = [float(torch.cosine_similarity(g_ND[i], v, dim=0)) for v in (merged, others, *rest)]
        out.append([*cosine[:2], cosine[2 + int(language_N[i])], *cosine[2:]])
    return torch.tensor(out, dtype=torch.float64)


def as_matrix(scores: PairScores) -> torch.Tensor:
    return torch.cat([torch.stack([scores.score_all, scores.score_others, scores.cosine_own], 1), cosines(scores)], 1)


def cosines(scores: PairScores) -> torch.Tensor:
    """0 where there is none."""
    return scores.cosines(0, len(scores.norm)).double().nan_to_num(0.0)


def cosines_valid(scores: PairScores) -> torch.Tensor:
    return ~scores.cosines(0, len(scores.norm)).isnan()


def assert_same(got: torch.Tensor, want: torch.Tensor, rtol: float = 1e-8, atol: float = 1e-9) -> None:
    """Scores; the cosines beside them are float32."""
    torch.testing.assert_close(got[:, :3], want[:, :3], rtol=rtol, atol=atol)
    torch.testing.assert_close(got[:, 3:], want[:, 3:], rtol=max(rtol, 2e-6), atol=max(atol, 2e-7))


def optional(scores: PairScores, name: str) -> list[float | None]:
    values, valid = getattr(scores, name), getattr(scores, f"{name}_valid")
    return [v if ok else None for v, ok in zip(values.tolist(), valid.tolist(), strict=True)]


def conflicting(scores: PairScores, languages: list[str]) -> list[list[str]]:
    negative = (cosines(scores) < 0).tolist()
    return [[name for name, bad in zip(languages, row, strict=True) if bad] for row in negative]


def flag_names(scores: PairScores) -> list[list[str]]:
    return [[name for name in FLAGS if scores.flags[name][i]] for i in range(len(scores.norm))]


WHOLE = (torch.arange(24),)
SEGMENTS = (torch.arange(0, 24, 3), torch.arange(1, 24, 3), torch.arange(2, 24, 3))


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("columns", [WHOLE, SEGMENTS], ids=["whole", "segments"])
@pytest.mark.parametrize(
    ("grouping", "waiting_bytes"),
    [("alone", 0), ("pairs", 10**6), ("mixed", 0), ("scattered", 10**6), ("scattered", 0)],
)
def test_scores_equal_recomputation(grouping, waiting_bytes, columns, refit, world, stream, fresh_seed) -> None:
    g_ND, language_N = world(fresh_seed)
    n = len(g_ND)
    labels = {
        "alone": list(range(n)),
        "pairs": [i // 2 for i in range(n)],
        "mixed": [i if i % 3 else 1000 + i // 12 for i in range(n)],
        "scattered": [i % 17 for i in range(n)],
    }[grouping]
    omega_N = ema_omegas(language_N, 4, 0.8, 3)
    method = surgery("pcgrad", 4, seed=1, repeats=3)
    direction_LD = directions(stream(g_ND), language_N, omega_N, 4)
    got = score_sketches(
        stream(g_ND, 11), language_N, omega_N, direction_LD, method, columns=columns,
        group_N=None if grouping == "alone" else torch.tensor(labels), refit=refit, waiting_bytes=waiting_bytes,
    )  # fmt: skip
    want = from_scratch(g_ND, language_N, omega_N, 4, method, columns, labels, refit)
    assert_same(as_matrix(got), want)
    torch.testing.assert_close(got.norm, g_ND.norm(dim=1))
    assert got.score_all_valid.all()
    assert cosines_valid(got).all()


def test_a_language_that_outweighs_all_others_leaves_them_exact(world, stream, fresh_seed) -> None:
    """Its only group gone, what is left is not a difference from what was there."""
    g_ND, language_N = world(fresh_seed)
    g_ND = g_ND * torch.where(language_N == 2, 1e7, 1.0)[:, None]
    labels = torch.where(language_N == 2, 1000, torch.arange(len(g_ND)))
    omega_N, method = mean_omegas(language_N, 4), surgery("mean", 4)
    direction_LD = directions(stream(g_ND), language_N, omega_N, 4)
    got = as_matrix(score_sketches(stream(g_ND), language_N, omega_N, direction_LD, method, group_N=labels))
    want = from_scratch(g_ND, language_N, omega_N, 4, method, (slice(None),), labels.tolist(), False)
    leaves = language_N == 2
    assert_same(got[leaves], want[leaves].nan_to_num())


def test_pure_noise_scores_zero_only_when_left_out(world, stream, fresh_seed) -> None:
    """400 pairs of noise, 4 languages: mean score within 5 standard errors of 0, and clearly positive when kept in."""
    g_ND, language_N = world(fresh_seed, n=400, dim=400, signal=0.0)
    omega_N = mean_omegas(language_N, 4)
    direction_LD = directions(stream(g_ND), language_N, omega_N, 4)
    got = score_sketches(stream(g_ND, 64), language_N, omega_N, direction_LD, surgery("pcgrad", 4)).score_all
    assert abs(float(got.mean())) < 5 * float(got.std()) / 20 + 1 / 400
    kept_in = torch.cosine_similarity(g_ND, direction_LD.sum(dim=0)[None], dim=1)
    assert float(kept_in.mean()) > 0.04


def test_translations_leak_unless_the_group_leaves(stream, fresh_seed) -> None:
    """Noise whose translations are copies: leaving one out scores high, leaving the group out scores zero."""
    generator = torch.Generator().manual_seed(fresh_seed)
    task = torch.arange(50).repeat(4)
    language_N = torch.arange(4).repeat_interleave(50)
    g_ND = torch.randn(50, 300, generator=generator, dtype=torch.float64)[task]
    omega_N = mean_omegas(language_N, 4)
    args = (stream(g_ND), language_N, omega_N, directions(stream(g_ND), language_N, omega_N, 4), surgery("mean", 4))
    alone = score_sketches(*args).score_all.mean()
    together = score_sketches(*args, group_N=task).score_all
    assert float(alone) > 0.08
    assert abs(float(together.mean())) < 5 * float(together[:50].std()) / 50**0.5 + 1 / 50


def test_planted_conflicts_rank_last(world, stream, fresh_seed) -> None:
    g_ND, language_N = world(fresh_seed, n=200, dim=200, languages=3, signal=0.0)
    shared = torch.randn(200, generator=torch.Generator().manual_seed(fresh_seed), dtype=torch.float64)
    flipped = torch.arange(200) % 5 == 0
    g_ND = g_ND + 0.5 * shared * torch.where(flipped, -1.0, 1.0)[:, None]
    omega_N = mean_omegas(language_N, 3)
    got = score_sketches(
        stream(g_ND), language_N, omega_N, directions(stream(g_ND), language_N, omega_N, 3), surgery("pcgrad", 3)
    )
    for score in (got.score_all, got.score_others):
        auroc = (score[~flipped][:, None] > score[flipped][None]).double().mean()
        assert float(auroc) > 0.95


def run(g_ND, language, languages, stream, **options) -> PairScores:
    language_N = torch.tensor(language)
    g_ND = g_ND.double()
    omega_N = mean_omegas(language_N, languages)
    direction_LD = directions(stream(g_ND), language_N, omega_N, languages)
    method = surgery(options.pop("method", "pcgrad"), languages)
    scores = score_sketches(stream(g_ND), language_N, omega_N, direction_LD, method, **options)
    for value in (scores.score_all, scores.score_others, scores.cosine_own, scores.norm):
        assert torch.isfinite(value).all()
    return scores


def test_zero_gradient_has_no_score(stream) -> None:
    got = run(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.5, 1.0]]), [0, 0, 1, 1], 2, stream)
    assert optional(got, "score_all")[1] is None
    assert optional(got, "cosine_own")[1] is None
    assert conflicting(got, ["a", "b"])[1] == []
    assert "zero_gradient" in flag_names(got)[1]
    assert optional(got, "cosine_own")[0] is None  # what is left of its language is zero
    assert "no_own_direction" in flag_names(got)[0]
    assert optional(got, "score_all")[0] == pytest.approx(0.75 / math.sqrt(0.75**2 + 1))


def test_single_language_scores_against_itself(stream) -> None:
    got = run(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), [0, 0, 0], 1, stream)
    assert got.score_all.tolist() == pytest.approx(got.cosine_own.tolist())
    assert optional(got, "score_others") == [None] * 3
    assert all("single_language" in flags for flags in flag_names(got))


def test_empty_languages_do_not_count(stream) -> None:
    got = run(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), [1, 1, 1], 3, stream)
    assert got.score_all_valid.all()
    assert cosines_valid(got).tolist() == [[False, True, False]] * 3
    assert got.flags["single_language"].all()


def test_language_with_one_pair_is_scored_against_the_others(stream) -> None:
    many = FEW_PAIRS // 2
    got = run(torch.tensor([[1.0, 0.0], *[[1.0, 1.0], [1.0, -1.0]] * many]), [0, *[1] * 2 * many], 2, stream)
    assert optional(got, "cosine_own")[0] is None
    assert optional(got, "score_all")[0] == pytest.approx(1.0)
    assert optional(got, "score_others")[0] == pytest.approx(1.0)
    assert flag_names(got)[0] == ["few_pairs", "no_own_direction"]
    assert flag_names(got)[1] == []


def test_only_one_pair_at_all(stream) -> None:
    got = run(torch.tensor([[1.0, 2.0]]), [0], 1, stream)
    assert optional(got, "score_all") == [None]
    assert flag_names(got) == [["single_language", "few_pairs", "no_own_direction", "no_direction"]]


def test_group_that_is_everything_has_no_score(stream) -> None:
    got = run(torch.randn(6, 4), [0, 0, 0, 1, 1, 1], 2, stream, group_N=torch.zeros(6, dtype=torch.int64))
    assert optional(got, "score_all") == [None] * 6
    assert got.flags["no_direction"].all()


def test_cancelling_directions_have_no_score(stream) -> None:
    v = torch.randn(1, 5).repeat(4, 1)
    got = run(torch.cat([v, -v]), [0] * 4 + [1] * 4, 2, stream, method="mean")
    assert optional(got, "score_all") == [None] * 8
    assert got.flags["no_direction"].all()
    assert optional(got, "score_others") == pytest.approx([-1.0] * 8)
    assert conflicting(got, ["a", "b"]) == [["b"]] * 4 + [["a"]] * 4


def test_cancelling_directions_under_pcgrad_project_to_nothing(stream) -> None:
    v = torch.randn(1, 5).repeat(4, 1)
    got = run(torch.cat([v, -v]), [0] * 4 + [1] * 4, 2, stream)
    assert optional(got, "score_all") == [None] * 8


def test_neither_chunks_nor_where_rows_wait_change_a_score(world, stream, fresh_seed) -> None:
    g_ND, language_N = world(fresh_seed)
    labels = torch.arange(60) % 20
    omega_N = mean_omegas(language_N, 4)
    direction_LD = directions(stream(g_ND), language_N, omega_N, 4)
    args = (language_N, omega_N, direction_LD, surgery("pcgrad", 4))
    want = as_matrix(score_sketches(stream(g_ND), *args, group_N=labels))
    for chunk, waiting_bytes in ((1, 0), (60, 0), (13, 10**6)):
        got = as_matrix(score_sketches(stream(g_ND, chunk), *args, group_N=labels, waiting_bytes=waiting_bytes))
        assert torch.equal(got, want)


def test_what_an_earlier_pass_kept_is_not_read_again(world, stream, fresh_seed) -> None:
    """Not where memory holds every row, nor where all rows wait; rows that leave alone and do not fit are read again."""
    g_ND, language_N = world(fresh_seed)
    omega_N = mean_omegas(language_N, 4)
    everyone, some = torch.arange(60) % 20, torch.where(torch.arange(60) < 50, torch.arange(60), 50)
    for labels, waiting_bytes, passes in ((everyone, 10**6, 1), (everyone, 0, 1), (some, 10**6, 1), (some, 0, 2)):
        read, scored = [], []

        def chunks(read=read):
            read.append(len(g_ND))
            return stream(g_ND, 13)()

        with closing(Waiting(labels, waiting_bytes)) as kept:
            direction_LD, _ = signed_directions(chunks, language_N, omega_N, 4, keep=kept.put)
            args = (language_N, omega_N, direction_LD, surgery("pcgrad", 4))
            got = score_sketches(chunks, *args, waiting=kept, advance=scored.append)
        assert len(read) == passes and sum(read) + sum(scored) == 120  # progress is the same
        want = score_sketches(stream(g_ND), *args, group_N=labels)
        assert_same(as_matrix(got), as_matrix(want), 1e-9, 1e-10)


def test_a_group_too_large_to_hold_scores_the_same(world, stream, fresh_seed, monkeypatch) -> None:
    g_ND, language_N = world(fresh_seed, n=90)
    labels = torch.where(torch.arange(90) % 3 > 0, 0, torch.arange(90))
    omega_N = mean_omegas(language_N, 4)
    args = (language_N, omega_N, directions(stream(g_ND), language_N, omega_N, 4), surgery("pcgrad", 4))
    want = as_matrix(score_sketches(stream(g_ND), *args, columns=SEGMENTS, group_N=labels))
    monkeypatch.setattr("stages.conflict.scoring.BLOCK", 16)
    got = as_matrix(score_sketches(stream(g_ND), *args, columns=SEGMENTS, group_N=labels))
    assert_same(got, want, 1e-9, 1e-10)


def test_stored_rows_score_as_their_exact_values(world, fresh_seed) -> None:
    """float16 rows with factors, summed in float32: as close to float64 as float32 is."""
    g_ND, language_N = world(fresh_seed, n=1500, dim=64)
    stored_ND, factor_N = (g_ND / g_ND.norm(dim=1, keepdim=True) * 64).half(), g_ND.norm(dim=1) / 64
    exact_ND = stored_ND.double() * factor_N[:, None]
    omega_N, labels = mean_omegas(language_N, 4), torch.arange(1500) % 700
    found = []
    for chunks in (lambda: [Chunk(stored_ND, factor_N)], lambda: [exact_ND]):
        direction_LD = directions(chunks, language_N, omega_N, 4)
        found.append(
            as_matrix(score_sketches(chunks, language_N, omega_N, direction_LD, surgery("pcgrad", 4), group_N=labels))
        )
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("labels", [torch.arange(60), torch.arange(60) % 20], ids=["alone", "groups"])
def test_columns_scaled_late_score_as_scaled_rows(labels, world, stream, fresh_seed) -> None:
    g_ND, language_N = world(fresh_seed)
    scale_D = torch.rand(24, generator=torch.Generator().manual_seed(fresh_seed), dtype=torch.float64) + 0.1
    omega_N, method = mean_omegas(language_N, 4), surgery("pcgrad", 4)
    sign_RN = torch.ones(1, 60, dtype=torch.int8)
    late_LD, late_RLD = signed_directions(stream(g_ND), language_N, omega_N, 4, sign_RN, scale_D=scale_D)
    early_LD = directions(stream(g_ND * scale_D), language_N, omega_N, 4)
    torch.testing.assert_close(late_LD, early_LD)
    torch.testing.assert_close(late_RLD[0], early_LD)
    for bytes_ in (0, 10**6):
        args = (language_N, omega_N, early_LD, method)
        late = score_sketches(stream(g_ND), *args, scale_D=scale_D, group_N=labels, waiting_bytes=bytes_)
        early = score_sketches(stream(g_ND * scale_D), *args, group_N=labels, waiting_bytes=bytes_)
        assert_same(as_matrix(late), as_matrix(early), 1e-7, 1e-7)
        torch.testing.assert_close(late.norm, early.norm)


def test_what_float32_leaves_of_nothing_is_no_direction(world, fresh_seed) -> None:
    """One pair of each language has a gradient, the others none: without it nothing of its language is left."""
    g_ND, language_N = world(fresh_seed, n=400, dim=512)
    factor_N = torch.zeros(400, dtype=torch.float64)
    factor_N[:8] = torch.rand(8, dtype=torch.float64) + 0.5
    omega_N = mean_omegas(language_N, 4)
    for k in range(4):  # the first of each language alone
        mine = (language_N[:8] == k).nonzero()[1:, 0]
        factor_N[mine] = 0.0

    def chunks():
        return [Chunk(g_ND.half(), factor_N)]

    direction_LD = directions(chunks, language_N, omega_N, 4)
    got = score_sketches(chunks, language_N, omega_N, direction_LD, surgery("pcgrad", 4))
    alone = factor_N > 0
    assert not got.cosine_own_valid[alone].any()
    assert got.flags["no_own_direction"][alone].all()
    one = [Chunk(g_ND.half(), torch.where(torch.arange(400) == int(alone.nonzero()[0, 0]), factor_N, 0.0))]
    direction_LD = directions(lambda: one, language_N, omega_N, 4)
    got = score_sketches(lambda: one, language_N, omega_N, direction_LD, surgery("pcgrad", 4))
    assert not got.score_all_valid.any()


def test_rows_that_wait_lie_in_the_given_folder_which_a_full_disk_is_blamed_on(
    world, stream, monkeypatch, tmp_path
) -> None:
    g_ND, language_N = world(0)
    omega_N = mean_omegas(language_N, 4)
    args = (stream(g_ND), language_N, omega_N, directions(stream(g_ND), language_N, omega_N, 4), surgery("mean", 4))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match="No space left") as error:
        score_sketches(*args, group_N=torch.arange(60) % 20, waiting_bytes=0, scratch_folder=tmp_path)
    assert error.value.filename == str(tmp_path)


def test_no_room_for_rows_that_wait_is_said_with_what_to_do(world, stream, monkeypatch) -> None:
    g_ND, language_N = world(0)
    omega_N = mean_omegas(language_N, 4)
    args = (stream(g_ND), language_N, omega_N, directions(stream(g_ND), language_N, omega_N, 4), surgery("mean", 4))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(UserError, match=r"Make room there.*leave_out: pair"):
        score_sketches(*args, group_N=torch.arange(60) % 20, waiting_bytes=0)


def test_products_alone_score_as_the_pairs_themselves(world, stream, fresh_seed) -> None:
    g_ND, language_N = world(fresh_seed)
    omega_N = mean_omegas(language_N, 4)
    direction_LD = directions(stream(g_ND), language_N, omega_N, 4)
    method = surgery("pcgrad", 4)
    want = score_sketches(stream(g_ND), language_N, omega_N, direction_LD, method)
    products_NSL, square_NS = (g_ND @ direction_LD.T)[:, None], g_ND.square().sum(dim=1)[:, None]
    for size in (7, 60):  # the stream's chunks change nothing
        chunks = list(zip(products_NSL.split(size), square_NS.split(size), strict=True))
        gram_SLL, count_L = (direction_LD @ direction_LD.T)[None], torch.bincount(language_N, minlength=4)
        got = score_products(chunks, language_N, omega_N, gram_SLL, method, count_L=count_L)
        assert_same(as_matrix(got), as_matrix(want))
    for wrong in (chunks * 2, [], [(products_NSL[1:], square_NS[1:])]):
        with pytest.raises(ValueError, match="rows for 60 pairs"):
            score_products(wrong, language_N, omega_N, gram_SLL, method, count_L=count_L)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.sampled_from(["pcgrad", "mean", "unit_mean"]))
def test_scores_know_no_scale_no_order_of_pairs_and_no_names(seed, scale, name) -> None:
    """All gradients scaled together; pairs in another order; languages numbered anew (order-free methods)."""
    generator = torch.Generator().manual_seed(seed)
    language_N = torch.randint(0, 3, (30,), generator=generator)
    language_N[:6] = torch.arange(6) % 3
    g_ND = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 20, (30,), generator=generator)
    turn = torch.randperm(30, generator=generator)

    def matrix(rows_ND, language, groups, method=name):
        omega_N = mean_omegas(language, 3)
        direction_LD = directions(lambda: [rows_ND], language, omega_N, 3)
        return as_matrix(
            score_sketches(lambda: [rows_ND], language, omega_N, direction_LD, surgery(method, 3), group_N=groups)
        )

    want = matrix(g_ND, language_N, labels)
    torch.testing.assert_close(matrix(scale * g_ND, language_N, labels), want, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(matrix(g_ND[turn], language_N[turn], labels[turn]), want[turn], rtol=2e-6, atol=2e-7)
    if name != "pcgrad":
        names = torch.randperm(3, generator=generator)
        renamed = matrix(g_ND, names[language_N], labels)
        torch.testing.assert_close(renamed[:, :3], want[:, :3], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(renamed[:, 3:][:, names], want[:, 3:], rtol=2e-6, atol=2e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_a_language_duplicated_scores_the_old_pairs_as_if_counted_twice(seed) -> None:
    """Every pair of language 0 again as language 2, leaving together with its copy: the mean direction then counts that
    language twice, and nothing else changes."""
    generator = torch.Generator().manual_seed(seed)
    language_N = torch.arange(20) % 2
    g_ND = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    copies = language_N == 0
    more_ND, more_N = torch.cat([g_ND, g_ND[copies]]), torch.cat([language_N, torch.full((10,), 2)])
    group_N = torch.cat([torch.arange(20), torch.arange(20)[copies]])
    omega_N = mean_omegas(more_N, 3)
    direction_LD = directions(lambda: [more_ND], more_N, omega_N, 3)
    got = score_sketches(lambda: [more_ND], more_N, omega_N, direction_LD, surgery("mean", 3), group_N=group_N)
    torch.testing.assert_close(got.score_all[20:], got.score_all[:20][copies])
    torch.testing.assert_close(cosines(got)[:, 0], cosines(got)[:, 2], rtol=1e-6, atol=1e-6)
    for i in range(20):
        stay = torch.arange(20) != i
        means = [g_ND[stay & (language_N == k)].mean(dim=0) for k in (0, 1)]
        want = torch.cosine_similarity(g_ND[i], 2 * means[0] + means[1], dim=0)
        assert float(got.score_all[i]) == pytest.approx(float(want), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["pcgrad", "mean"]))
def test_noise_scores_nothing_on_average_left_out(seed, name) -> None:
    generator = torch.Generator().manual_seed(seed)
    language_N = torch.arange(160) % 4
    g_ND = torch.randn(160, 300, generator=generator, dtype=torch.float64)
    omega_N = mean_omegas(language_N, 4)
    direction_LD = directions(lambda: [g_ND], language_N, omega_N, 4)
    for group_N in (None, torch.arange(160) // 4):
        got = score_sketches(lambda: [g_ND], language_N, omega_N, direction_LD, surgery(name, 4), group_N=group_N)
        assert abs(float(got.score_all.mean())) < 0.04  # kept in, noise scores 1 / sqrt(160 / 4) or so
    assert float(torch.cosine_similarity(g_ND, direction_LD.sum(dim=0)[None], dim=1).mean()) > 0.06
