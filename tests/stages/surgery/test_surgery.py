"""Weights from the Gram matrix equal surgery done on the vectors themselves, and TorchJD's."""

from __future__ import annotations

import math
import sys
from typing import get_args

import pytest
import torch

from schemas.config.base import conditions_of
from schemas.config.curation import ConflictConfig
from schemas.errors import UserError
from stages.surgery import pcgrad
from stages.surgery.bargains import min_norm_weights, nash_weights
from stages.surgery.methods import METHODS, WEIGHTED, surgery
from stages.surgery.pcgrad import draw_orders, pcgrad_weights
from stages.surgery.solvers import TORCHJD, packages

SOLVED = ("mgda", "nash_mtl", *TORCHJD)


def built(name: str, n: int, **kwargs: int):
    """The method, or a skip where its optional solver is not installed."""
    try:
        return surgery(name, n, **kwargs)
    except ImportError as error:
        pytest.skip(str(error))


def vector_pcgrad(direction_LD: torch.Tensor, order_LL: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of arXiv 2001.06782 on the vectors."""
    total = torch.zeros_like(direction_LD[0])
    for i, start in enumerate(direction_LD):
        running = start.clone()
        for j in order_LL[i].tolist():
            other = direction_LD[j]
            if j != i and running @ other < 0 and other @ other > 0:
                running = running - (running @ other) / (other @ other) * other
        total = total + running
    return total


@pytest.mark.parametrize("languages", [1, 2, 5, 9])
@pytest.mark.parametrize("steps", [2, 32])
def test_coefficient_space_equals_vector_space(languages, steps, fresh_seed, monkeypatch) -> None:
    """Also where the steps of a row are cut into blocks."""
    monkeypatch.setattr(pcgrad, "_STEPS", steps)
    generator = torch.Generator().manual_seed(fresh_seed)
    for _ in range(20):
        direction_LD = torch.randn(languages, 4, generator=generator, dtype=torch.float64)
        order_RLL = draw_orders(languages, 1, int(torch.randint(2**31, (1,), generator=generator)))
        got = pcgrad_weights(direction_LD @ direction_LD.T, order_RLL) @ direction_LD
        torch.testing.assert_close(got, vector_pcgrad(direction_LD, order_RLL[0]), rtol=1e-9, atol=1e-9)


def test_matrices_solved_together_are_as_each_alone(monkeypatch) -> None:
    """Also cut into blocks of steps and chunks of rows, of which some hold rows of two matrices and of two orders."""
    direction_BLD = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction_BLD[3] = direction_BLD[3].abs()  # no two conflict
    gram_BLL, order_RLL = direction_BLD @ direction_BLD.mT, draw_orders(7, 3, 1)
    want = torch.stack([pcgrad_weights(gram_LL, order_RLL) for gram_LL in gram_BLL])
    monkeypatch.setattr(pcgrad, "_STEPS", 3)
    monkeypatch.setattr(pcgrad, "_NUMBERS", 10 * (7 + 9))
    torch.testing.assert_close(pcgrad_weights(gram_BLL, order_RLL), want, rtol=1e-12, atol=1e-12)
    assert bool((want[3] == 1).all())


def test_many_languages_are_right_to_float32(monkeypatch, fresh_seed) -> None:
    direction_LD = torch.randn(40, 60, generator=torch.Generator().manual_seed(fresh_seed), dtype=torch.float64)
    order_RLL = draw_orders(40, 1, 3)
    monkeypatch.setattr(pcgrad, "_MANY", 1)
    got = pcgrad_weights(direction_LD @ direction_LD.T, order_RLL) @ direction_LD
    want = vector_pcgrad(direction_LD, order_RLL[0])
    assert float((got - want).norm()) < 1e-4 * float(want.norm())


def test_equals_torchjd_with_the_same_permutations(fresh_seed) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    generator = torch.Generator().manual_seed(fresh_seed)
    for seed in range(10):
        direction_LD = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        gram = direction_LD @ direction_LD.T
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            want = aggregation.PCGradWeighting()(gram)
        torch.testing.assert_close(surgery("pcgrad", 6, seed=seed, repeats=1)(gram), want, rtol=1e-10, atol=1e-10)


def aggregator(name: str, n: int):
    """TorchJD's own aggregator of whole vectors, for methods that have one."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    kinds = {
        "mean": "Mean", "mgda": "MGDA", "imtl_g": "IMTLG", "aligned_mtl": "AlignedMTL", "gradvac": "GradVac",
        "upgrad": "UPGrad", "dualproj": "DualProj", "cagrad": "CAGrad", "nash_mtl": "NashMTL",
    }  # fmt: skip
    arguments = {
        "cagrad": {"c": 0.5},
        "nash_mtl": {"n_tasks": n, "max_norm": 0.0, "update_weights_every": 1, "optim_niter": 20},
    }
    return getattr(aggregation, kinds[name])(**arguments.get(name, {}))


@pytest.mark.parametrize("name", ["mean", *SOLVED])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_weights_from_the_gram_matrix_give_the_direction_torchjd_finds_from_the_vectors(name, scale) -> None:
    """On vectors that conflict, at the size of real gradients and small; directions are compared at unit norm."""
    if name == "nash_mtl" and sys.version_info >= (3, 13):
        pytest.skip("TorchJD's NashMTL needs ecos, which has no wheel for Python 3.13")
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        centre = torch.randn(1, 30, generator=generator, dtype=torch.float64)
        vector_LD = 0.4 * centre + torch.randn(4, 30, generator=generator, dtype=torch.float64)
        vector_LD[0] -= 0.6 * vector_LD[1]
        method = built(name, 4, seed=seed)
        got = method((scale * vector_LD) @ (scale * vector_LD).T) @ vector_LD
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            want = aggregator(name, 4)(vector_LD)
        exact, rough = (
            ("mean", "imtl_g", "aligned_mtl", "gradvac"),
            ("mgda", "upgrad", "dualproj"),
        )  # TorchJD's, not ours
        tolerance = 1e-8 if name in exact else 1e-2 if name in rough else 2e-3
        torch.testing.assert_close(got / got.norm(), want / want.norm(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", sorted(SOLVED))
def test_a_language_without_a_direction_gets_no_weight_and_changes_no_other(name) -> None:
    vector_LD = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = torch.zeros(4, 4, dtype=torch.float64)
    gram[:3, :3] = vector_LD @ vector_LD.T
    weights = built(name, 4, seed=5)(gram)
    assert weights[3] == 0
    torch.testing.assert_close(weights[:3], built(name, 3, seed=5)(gram[:3, :3]))
    assert built(name, 4)(torch.zeros(4, 4)).tolist() == [0.0] * 4


def test_a_fresh_gradvac_has_no_history_and_is_pcgrad_with_one_order() -> None:
    """Its target cosine is an average over past steps; a single aggregate has none, so the target is zero."""
    for seed in range(5):
        vector_LD = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gram = vector_LD @ vector_LD.T
        totals = [built("gradvac", 5, seed=seed)(gram) for _ in range(2)]
        assert torch.equal(*totals)  # called twice: nothing is remembered
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            order = [[j if j < i else j + 1 for j in torch.randperm(4).tolist()] for i in range(5)]
        want = vector_pcgrad(vector_LD, torch.tensor([[*row, i] for i, row in enumerate(order)]))
        torch.testing.assert_close(totals[0] @ vector_LD, want, rtol=1e-6, atol=1e-6)


def test_the_config_knows_exactly_these_methods() -> None:
    assert set(get_args(ConflictConfig.model_fields["surgery"].annotation)) == set(METHODS)


@pytest.mark.parametrize("name", sorted(TORCHJD))
def test_the_packages_named_are_those_torchjd_asks_for(name, monkeypatch) -> None:
    """Whatever is missing, TorchJD itself names nothing that `packages` does not."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    mixins = pytest.importorskip("torchjd._mixins")
    monkeypatch.setattr(mixins, "find_spec", lambda package: None)
    if packages(name) == ["torchjd"]:
        aggregator(name, 2)
        return
    with pytest.raises(ImportError) as error:
        aggregator(name, 2)
    assert aggregation and all(package in str(error.value) for package in packages(name)[1:])


def test_pcgrad_only_adds_weight_and_is_idle_without_conflict(fresh_seed) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    direction_LD = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    method = surgery("pcgrad", 6, seed=1, repeats=8)
    assert method(direction_LD @ direction_LD.T).min() >= 1 - 1e-12
    friendly = direction_LD.abs()
    assert torch.equal(method(friendly @ friendly.T), torch.ones(6, dtype=torch.float64))


def test_pcgrad_averages_its_orders_and_leaves_the_global_generator_alone() -> None:
    direction_LD = torch.randn(5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gram = direction_LD @ direction_LD.T
    before = torch.random.get_rng_state()
    got = surgery("pcgrad", 5, seed=9, repeats=4)(gram)
    assert torch.equal(before, torch.random.get_rng_state())
    want = torch.stack([vector_pcgrad(direction_LD, order) for order in draw_orders(5, 4, 9)]).mean(dim=0)
    torch.testing.assert_close(got @ direction_LD, want)
    assert torch.equal(got, surgery("pcgrad", 5, seed=9, repeats=4)(gram))


def test_a_direction_without_length_is_harmless() -> None:
    gram = torch.tensor([[1.0, -0.5, 0.0], [-0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])
    for name in ("pcgrad", "mean", "unit_mean"):
        assert torch.isfinite(surgery(name, 3)(gram)).all()
    assert surgery("unit_mean", 3)(gram)[2] == 0


@pytest.mark.parametrize("name", sorted(METHODS))
def test_batches_of_matrices_equal_one_at_a_time(name) -> None:
    """Every method takes [S, L, L]; solvers that are not installed say which package they want."""
    direction = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = direction @ direction.mT
    method = built(name, 4, seed=2, repeats=3)
    state = torch.random.get_rng_state()
    together = method(gram)
    assert torch.equal(state, torch.random.get_rng_state())
    assert together.shape == (3, 4)
    for s in range(3):
        torch.testing.assert_close(together[s], method(gram[s]), rtol=1e-9, atol=1e-9)


def test_means() -> None:
    gram = torch.tensor([[4.0, 0.0], [0.0, 16.0]])
    assert surgery("mean", 2)(gram).tolist() == [0.5, 0.5]
    assert surgery("unit_mean", 2)(gram).tolist() == [0.25, 0.125]


def test_errors() -> None:
    with pytest.raises(ValueError, match="known: pcgrad"):
        surgery("pc_grad", 2)
    with pytest.raises(ValueError, match="square"):
        surgery("mean", 2)(torch.ones(2, 3))
    with pytest.raises(ValueError, match="not finite"):
        surgery("mean", 2)(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="at least one order"):
        surgery("pcgrad", 2, repeats=0)


def test_a_solver_that_finds_nothing_is_said(monkeypatch) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    method = surgery("imtl_g", 3)
    monkeypatch.setattr(aggregation, "IMTLGWeighting", lambda: lambda gram: torch.full((3,), float("nan")))
    with pytest.raises(UserError, match=r"found no weights.*imtl_g.*pcgrad"):
        method(torch.eye(3))


@pytest.mark.parametrize("length", [0.3, 0.49, 0.51, 3.0])
def test_imtl_g_gains_alike_for_all_languages_also_where_its_weights_sum_to_less_than_zero(length: float) -> None:
    """Torchjd's v / sum v points against all of them at length 0.3, where none conflict."""
    pytest.importorskip("torchjd")
    cosine_LL = torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, 0.7], [0.9, 0.7, 1.0]], dtype=torch.float64)
    length_L = torch.tensor([length, 1.0, 1.0], dtype=torch.float64)
    gram_LL = cosine_LL * length_L * length_L[:, None]
    share_L = gram_LL @ surgery("imtl_g", 3)(gram_LL) / length_L
    assert share_L.min() > 0
    torch.testing.assert_close(share_L, share_L.mean().expand(3), rtol=1e-8, atol=0)


@pytest.mark.parametrize("ratio", [1e-1, 1e-3, 1e-4, 1e-5])
def test_cagrad_goes_on_where_one_language_hardly_has_a_gradient(ratio: float) -> None:
    """The point at c |g_0| from the mean whose least gain is the largest: none of 20,000 in the ball has a larger one."""
    pytest.importorskip("torchjd")
    pytest.importorskip("cvxpy")
    direction_LD = torch.tensor(
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.6 * ratio, 0.8 * ratio]], dtype=torch.float64
    )
    u_D = surgery("cagrad", 3)(direction_LD @ direction_LD.T) @ direction_LD
    mean_D = direction_LD.mean(dim=0)
    radius = 0.5 * mean_D.norm()
    torch.testing.assert_close((u_D - mean_D).norm(), radius, rtol=1e-6, atol=0)
    way_ND = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gain_NL = (mean_D + radius * torch.nn.functional.normalize(way_ND, dim=1)) @ direction_LD.T
    assert float((direction_LD @ u_D).min()) > float(gain_NL.min(dim=1).values.max()) - 1e-3 * ratio


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_nash_mtl_at_the_edge_of_float64(scale: float) -> None:
    gram_LL = scale**2 * torch.eye(3, dtype=torch.float64)
    weight_L = surgery("nash_mtl", 3)(gram_LL)
    torch.testing.assert_close(weight_L / weight_L.sum(), torch.full((3,), 1 / 3, dtype=torch.float64))


def unlike(seed: int, languages: int, ratio: float) -> torch.Tensor:
    """Directions that conflict, the longest `ratio` times as long as the shortest."""
    generator = torch.Generator().manual_seed(seed)
    direction_LD = torch.randn(languages, 6, generator=generator, dtype=torch.float64)
    direction_LD[0] -= 0.8 * direction_LD[1:].sum(dim=0)
    length_L = (
        ratio ** torch.linspace(0, 1, languages, dtype=torch.float64)[torch.randperm(languages, generator=generator)]
    )
    return torch.nn.functional.normalize(direction_LD, dim=1) * length_L[:, None]


def least_of_all_faces(gram_LL: torch.Tensor) -> float:
    """The least w K w on the simplex: on each face the closed form, kept where it lies inside."""
    best = float(gram_LL.diagonal().min())
    n = len(gram_LL)
    for face in range(1, 2**n):
        at = [k for k in range(n) if face >> k & 1]
        part = gram_LL[at][:, at]
        w = torch.linalg.lstsq(part, torch.ones(len(at), 1, dtype=torch.float64)).solution[:, 0]
        if w.sum() > 0 and (w >= 0).all():
            w = w / w.sum()
            best = min(best, float(w @ part @ w))
    return best


@pytest.mark.parametrize("ratio", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("languages", [2, 3, 6])
def test_mgda_is_the_shortest_of_all_mixtures(languages, ratio, fresh_seed) -> None:
    for k in range(10):
        direction_LD = unlike(fresh_seed + k, languages, ratio)
        gram_LL = direction_LD @ direction_LD.T
        w_L = surgery("mgda", languages)(gram_LL)
        assert w_L.min() >= 0 and float(w_L.sum()) == pytest.approx(1.0)
        assert float(w_L @ gram_LL @ w_L) == pytest.approx(least_of_all_faces(gram_LL), rel=1e-7, abs=1e-9)


def test_mgda_where_lengths_differ_by_a_million() -> None:
    """Optimality (Karush, Kuhn, Tucker) within rounding of the largest squared length: no direction is below the least norm."""
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        direction_LD = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        direction_LD *= 10 ** (6 * torch.rand(6, 1, generator=generator, dtype=torch.float64))
        gram_LL = direction_LD @ direction_LD.T
        w_L = min_norm_weights(gram_LL)
        below = float(w_L @ gram_LL @ w_L - (gram_LL @ w_L).min())
        assert w_L.min() >= 0 and below <= 1e-6 * float(gram_LL.diagonal().max())


def test_mgda_where_directions_depend_on_each_other() -> None:
    v = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    w_L = min_norm_weights(v @ v.T)
    assert float((w_L @ v).norm()) < 1e-6
    same_LD = torch.ones(3, 2, dtype=torch.float64)
    assert float((min_norm_weights(same_LD @ same_LD.T) @ same_LD).norm()) == pytest.approx(2**0.5)


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
@pytest.mark.parametrize("ratio", [1.0, 30.0, 1000.0])
def test_no_language_loses_by_the_dual_cone_methods_however_unlike_the_lengths(name, ratio, fresh_seed) -> None:
    """u.G_k >= 0 for all k: what both papers promise; to 1e-6 of the lengths."""
    for k in range(10):
        direction_LD = unlike(fresh_seed + k, 4, ratio)
        u_D = built(name, 4)(direction_LD @ direction_LD.T) @ direction_LD
        along_L = direction_LD @ u_D / (direction_LD.norm(dim=1) * u_D.norm())
        assert float(along_L.min()) > -1e-6


def test_dualproj_is_the_nearest_point_of_the_cone(fresh_seed) -> None:
    """Optimality of its quadratic program: w >= u, K w >= 0, and K w zero where w > u."""
    for k in range(10):
        direction_LD = unlike(fresh_seed + k, 4, 30.0)
        gram_LL = direction_LD @ direction_LD.T
        w_L = built("dualproj", 4)(gram_LL)
        lower = 0.25
        assert float(w_L.min()) >= lower - 1e-6
        slack_L = (w_L - lower) * (gram_LL @ w_L) / gram_LL.diagonal()
        assert float(slack_L.abs().max()) < 1e-5 * float(w_L.max()) ** 2


@pytest.mark.parametrize("ratio", [1.0, 30.0, 1000.0])
def test_the_nash_bargain_is_where_every_language_gains_alike(ratio, fresh_seed) -> None:
    """alpha_i (K alpha)_i is the same for all i, alpha > 0."""
    for k in range(10):
        direction_LD = unlike(fresh_seed + k, 4, ratio)
        gram_LL = direction_LD @ direction_LD.T
        alpha_L = surgery("nash_mtl", 4)(gram_LL)
        gain_L = alpha_L * (gram_LL @ alpha_L)
        assert alpha_L.min() > 0
        torch.testing.assert_close(gain_L, gain_L.mean().expand(4), rtol=1e-6, atol=0)


def test_nash_with_one_direction_left_is_that_direction_and_without_a_bargain_it_is_refused() -> None:
    gram_LL = torch.zeros(3, 3)
    gram_LL[1, 1] = 4.0
    w_L = surgery("nash_mtl", 3)(gram_LL)
    assert float(w_L[1]) > 0 and w_L[[0, 2]].tolist() == [0.0, 0.0]
    v = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="no direction gains"):
        nash_weights(v @ v.T)
    with pytest.raises(UserError, match=r"found no weights.*no direction gains for all languages.*nash_mtl"):
        surgery("nash_mtl", 2)(v @ v.T)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e8])
def test_directions_that_cancel_each_other_have_no_nash_bargain(n, ratio, fresh_seed) -> None:
    """A positive sum of them is zero, so what one gains another loses; whatever their lengths."""
    for k in range(20):
        generator = torch.Generator().manual_seed(fresh_seed + k)
        v_LD = torch.randn(n, 7, generator=generator, dtype=torch.float64)
        v_LD[-1] = -v_LD[:-1].sum(dim=0)
        v_LD *= torch.logspace(0, math.log10(ratio), n, dtype=torch.float64)[:, None]
        with pytest.raises(ValueError, match="no direction gains"):
            nash_weights(v_LD @ v_LD.T)


def _gram(fresh_seed: int, n: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(fresh_seed)
    direction_LD = torch.randn(n, 7, generator=generator, dtype=torch.float64)
    given = torch.rand(n, generator=generator, dtype=torch.float64) * 3 + 0.1
    return direction_LD, direction_LD @ direction_LD.T, given


def test_weighted_pcgrad_is_pcgrad_of_the_weighted_losses_gradients(fresh_seed) -> None:
    direction_LD, gram_LL, given = _gram(fresh_seed)
    weight_L = built("pcgrad", 5, seed=3, repeats=1, weight_L=given.tolist())(gram_LL)
    scaled_LD = direction_LD * (given / given.mean())[:, None]
    want = vector_pcgrad(scaled_LD, draw_orders(5, 1, 3)[0])
    torch.testing.assert_close(weight_L @ direction_LD, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_a_weighted_dual_cone_is_torchjds_preference_vector(name, fresh_seed) -> None:
    """Directions of one length, where TorchJD's regularisation is the same for all."""
    from torchjd.aggregation import DualProjWeighting, UPGradWeighting

    direction_LD, _, given = _gram(fresh_seed)
    unit_LD = direction_LD / direction_LD.norm(dim=1, keepdim=True)
    gram_LL = unit_LD @ unit_LD.T
    kind = {"upgrad": UPGradWeighting, "dualproj": DualProjWeighting}[name]
    want = kind(pref_vector=given / given.mean() / 5)(gram_LL)
    got = built(name, 5, weight_L=given.tolist())(gram_LL)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-3)


def test_weighted_means_are_the_closed_form(fresh_seed) -> None:
    from torchjd.aggregation import ConstantWeighting

    _, gram_LL, given = _gram(fresh_seed)
    share = given / given.sum()
    got = built("mean", 5, weight_L=given.tolist())(gram_LL)
    torch.testing.assert_close(got, ConstantWeighting(share)(gram_LL))
    unit = built("unit_mean", 5, weight_L=(7 * given).tolist())(gram_LL)
    torch.testing.assert_close(unit, share / gram_LL.diagonal().sqrt())


@pytest.mark.parametrize("name", METHODS)
def test_equal_weights_change_nothing_and_those_that_take_none_say_so(name, fresh_seed) -> None:
    _, gram_LL, _ = _gram(fresh_seed)
    if name not in WEIGHTED:
        with pytest.raises(ValueError, match="takes no weights"):
            built(name, 5, weight_L=[1.0] * 5)
        return
    torch.testing.assert_close(built(name, 5, weight_L=[4.0] * 5)(gram_LL), built(name, 5)(gram_LL))


def test_the_config_knows_which_surgeries_take_weights() -> None:
    (conditions,) = conditions_of(ConflictConfig.model_fields["language_weights"])
    assert set(conditions[".surgery"]) == set(WEIGHTED)


def test_a_language_of_weight_zero_is_in_no_merged_direction(fresh_seed) -> None:
    _, gram_LL, _ = _gram(fresh_seed)
    for name in WEIGHTED:
        weight_L = built(name, 5, weight_L=[1.0, 0.0, 1.0, 1.0, 1.0])(gram_LL)
        assert float(weight_L[1]) == 0 and bool((weight_L[[0, 2, 3, 4]] != 0).any())
