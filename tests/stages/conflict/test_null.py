"""Nulls: half of all cosines are negative without signal; halves of one language agree when there is signal."""

from __future__ import annotations

import pytest
import torch

from stages.conflict import null as nulls
from stages.conflict.directions import count_conflicts, directions, signed_directions
from stages.gradients.omegas import mean_omegas


def sign_flip_null(chunks, language_N, omega_N, n_languages, columns=(slice(None),), draws=20, seed=0):
    signs_RN = nulls.flip_signs(len(language_N), draws, seed)
    _, sums_RLD = signed_directions(chunks, language_N, omega_N, n_languages, signs_RN)
    return nulls.sign_flip_null(sums_RLD, columns)


def split_half_null(chunks, language_N, omega_N, n_languages, draws=20, seed=0, group_N=None):
    group_N = torch.arange(len(language_N)) if group_N is None else group_N
    halves_RN = nulls.half_masks(language_N, group_N, n_languages, draws, seed)
    direction_LD, first_RLD = signed_directions(chunks, language_N, omega_N, n_languages, halves_RN)
    return nulls.split_half_null(first_RLD, direction_LD)


def negative_rate(null):
    return float((null.cosine_RSM[null.valid_RSM] < 0).double().mean())


def test_pairs_that_share_an_answer_are_in_one_half(stream, fresh_seed) -> None:
    """Noise where pairs share an answer: drawn pair by pair, halves agree (same side) or oppose (chosen of one, rejected of the
    other) by that alone; drawn by group they are noise, as they are."""
    group_N, language_N = torch.arange(400) // 2, torch.zeros(400, dtype=torch.int64)
    omega_N = mean_omegas(language_N, 1)
    found = {}
    for side in (1.0, -1.0):
        for labels in ("pairs", "groups"):
            cosines = []
            for k in range(12):
                generator = torch.Generator().manual_seed(fresh_seed + k)
                own_ND = torch.randn(400, 100, generator=generator, dtype=torch.float64)
                shared_ND = torch.randn(200, 100, generator=generator, dtype=torch.float64)[group_N]
                g_ND = own_ND + 3 * shared_ND * torch.where(torch.arange(400) % 2 == 0, 1.0, side)[:, None]
                label_N = group_N if labels == "groups" else torch.arange(400)
                null = split_half_null(stream(g_ND), language_N, omega_N, 1, seed=k, group_N=label_N)
                cosines.append(float(null.cosine_RSM.mean()))
            found[side, labels] = sum(cosines) / 12
    assert found[1.0, "pairs"] > 0.2 and found[-1.0, "pairs"] < -0.2
    assert abs(found[1.0, "groups"]) < 0.1 and abs(found[-1.0, "groups"]) < 0.1


def test_halves_cut_no_group(fresh_seed) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    group_N, language_N = (
        torch.randint(0, 30, (200,), generator=generator),
        torch.randint(0, 3, (200,), generator=generator),
    )
    half_RN = nulls.half_masks(language_N, group_N, 3, 5, fresh_seed)
    for language in range(3):
        for half_n in half_RN[:, language_N == language]:
            first, second = (set(group_N[language_N == language][half_n == side].tolist()) for side in (1, 0))
            assert not first & second and 0 <= len(second) - len(first) <= 1


def test_sign_flips_give_one_half_whatever_the_signal(world, stream, fresh_seed) -> None:
    g_ND, language_N = world(fresh_seed, n=200, dim=100, signal=3.0)
    omega_N = mean_omegas(language_N, 4)
    null = sign_flip_null(stream(g_ND), language_N, omega_N, 4, draws=200, seed=1)
    assert null.cosine_RSM.shape == (200, 1, 6)
    assert negative_rate(null) == pytest.approx(0.5, abs=0.15)


def test_sign_flips_equal_flipping_the_stream(world, stream) -> None:
    g_ND, language_N = world(3)
    omega_N = mean_omegas(language_N, 4)
    null = sign_flip_null(stream(g_ND), language_N, omega_N, 4, draws=2, seed=5, columns=(slice(0, 9), slice(9, 24)))
    sign_RN = nulls.flip_signs(60, 2, 5)
    assert sorted(set(sign_RN.flatten().tolist())) == [-1, 1]
    for r in range(2):
        flipped_LD = directions(stream(g_ND * sign_RN[r, :, None]), language_N, omega_N, 4)[:, 9:]
        want = [
            float(torch.cosine_similarity(flipped_LD[a], flipped_LD[b], dim=0))
            for a in range(4)
            for b in range(a + 1, 4)
        ]
        assert null.cosine_RSM[r, 1].tolist() == pytest.approx(want)


def test_split_halves_agree_with_signal_and_not_without(world, stream, fresh_seed) -> None:
    """All halvings of one noise share its sums, so that its rate may be far from a half: a half is the mean over worlds."""

    def rate(seed: int, signal: float) -> float:
        g_ND, language_N = world(seed, n=300, dim=100, signal=signal)
        return negative_rate(split_half_null(stream(g_ND), language_N, mean_omegas(language_N, 4), 4, draws=30))

    assert rate(fresh_seed, 3.0) == 0.0
    assert sum(rate(fresh_seed + k, 0.0) for k in range(16)) / 16 == pytest.approx(0.5, abs=0.2)


def test_tail_tells_real_conflict_from_noise(stream, fresh_seed) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    centre_LD = torch.linalg.qr(torch.randn(60, 4, generator=generator, dtype=torch.float64)).Q.T
    centre_LD = centre_LD - centre_LD.mean(dim=0)  # a simplex: every pair of languages opposes
    language_N = torch.arange(200) % 4
    g_ND = 5 * centre_LD[language_N] + torch.randn(200, 60, generator=generator, dtype=torch.float64)
    omega_N = mean_omegas(language_N, 4)
    direction_LD = directions(stream(g_ND), language_N, omega_N, 4)
    observed = count_conflicts(direction_LD @ direction_LD.T)
    null = sign_flip_null(stream(g_ND), language_N, omega_N, 4, draws=99)
    assert observed == 6
    assert null.tail([observed])[0] <= 0.1
    assert null.tail([0]) == [1.0]


def test_seeded_and_defined_for_tiny_languages(stream) -> None:
    g_ND = torch.randn(5, 6)
    language_N = torch.tensor([0, 0, 0, 0, 1])
    omega_N = mean_omegas(language_N, 3)
    first = split_half_null(stream(g_ND), language_N, omega_N, 3, seed=4)
    again = split_half_null(stream(g_ND), language_N, omega_N, 3, seed=4)
    assert torch.equal(first.cosine_RSM, again.cosine_RSM)
    assert not torch.equal(first.cosine_RSM, split_half_null(stream(g_ND), language_N, omega_N, 3, seed=5).cosine_RSM)
    assert first.valid_RSM[:, 0, 0].all()
    assert not first.valid_RSM[:, 0, 1:].any()
    single = torch.zeros(5, dtype=torch.int64)
    assert not sign_flip_null(stream(g_ND), single, mean_omegas(single, 1), 1).valid_RSM.any()


def test_halves_are_halves_of_every_language() -> None:
    language_N = torch.tensor([0] * 7 + [1] * 4 + [2])
    half_RN = nulls.half_masks(language_N, torch.arange(12), 4, draws=30, seed=1)
    for language, want in enumerate((3, 2, 0)):
        assert (half_RN[:, language_N == language].sum(dim=1) == want).all()
    assert len({tuple(row) for row in half_RN.tolist()}) > 10


@pytest.mark.parametrize("pairs", [10_000, 100])
def test_pairs_that_are_in_no_direction_are_in_no_half(pairs, fresh_seed) -> None:
    """Trusted pairs among others (conflict.target: dev): it is they that are cut into equal halves."""
    omega_N = torch.zeros(400, dtype=torch.float64)
    omega_N[::40] = 0.1
    language_N = torch.zeros(400, dtype=torch.int64)
    sample = nulls.Sample.draw(language_N, torch.arange(400), omega_N, 1, 16, fresh_seed, pairs)
    assert sample.rows_n.tolist() == list(range(0, 400, 40)) and sample.complete and sample.error == 0
    assert (sample.half_Rn.sum(1) == 5).all()
