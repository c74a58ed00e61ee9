"""The sorted solution against linear programs, brute force and finite differences."""

from collections.abc import Callable
from itertools import permutations
from math import gcd

import numpy as np
import ot
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor

from aot_plugin.ot import coupling
from aot_plugin.ot.penalties import PENALTIES
from aot_plugin.ot.transport import soft_sort, transport_value

Cost = Callable[[Tensor], Tensor]


def northwest_corner(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    found = coupling.monotone_coupling(n, m)
    return tuple(map(torch.from_numpy, (found.u_index, found.v_index, found.mass)))


def recoupled_fraction(u: Tensor, v: Tensor) -> float:
    return coupling.recoupled_fraction(u.numpy(), v.numpy())


SIZES = [(1, 1), (1, 5), (6, 1), (8, 8), (12, 12), (6, 9), (7, 12), (30, 17)]

# Multiples of 1/8 are exact in binary, and drawn from a narrow range they hold plenty of ties.
values = st.integers(-40, 40).map(lambda k: k / 8)
samples = st.lists(values, min_size=1, max_size=9).map(lambda x: torch.tensor(x).double())
epsilons = st.sampled_from([0.05, 0.2, 1.0, 3.0, 20.0])
# Any convex cost will do, not only ours: the largest of a few straight lines.
convex_costs = st.lists(st.tuples(values, values), min_size=1, max_size=4).map(
    lambda lines: lambda z: torch.stack([a * z + b for a, b in lines]).amax(0)
)


@pytest.fixture(params=sorted(PENALTIES))
def cost(request: pytest.FixtureRequest) -> Cost:
    penalty, beta = PENALTIES[request.param], 0.7
    return lambda z: penalty(z, beta)


def sample(size: int, seed: int, ties: bool = False, scale: float = 3.0) -> Tensor:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)).double() * scale
    return (x / 2).round() if ties else x


def permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def value_and_gradients(u: Tensor, v: Tensor, cost: Cost, **kwargs) -> tuple[Tensor, ...]:
    u, v = u.clone().requires_grad_(), v.clone().requires_grad_()
    value = transport_value(u, v, cost, **kwargs)
    return value.detach(), *torch.autograd.grad(value, (u, v))


def summed_over_ties(x: Tensor, gradient: Tensor) -> Tensor:
    """The derivative in the direction that moves equal atoms together: the only one that exists
    at ties, and the gradient itself where there are none."""
    groups = torch.unique(x, return_inverse=True)[1]
    return torch.zeros(int(groups.max()) + 1).double().index_add(0, groups, gradient)


# Hard sort.


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_value_and_gradient_equal_the_linear_program(n: int, m: int, ties: bool, cost: Cost):
    """POT's network simplex knows nothing of order: it gets the whole matrix h(u_i - v_j). By the
    envelope theorem its plan P gives the gradient dOT/du_i = sum_j P_ij h'(u_i - v_j)."""
    u, v = sample(n, seed=n, ties=ties) + 0.3, sample(m, seed=100 + m, ties=ties)
    z = (u[:, None] - v[None, :]).requires_grad_()
    costs = cost(z)
    (slopes,) = torch.autograd.grad(costs.sum(), z)
    plan = torch.from_numpy(
        ot.emd(ot.unif(n), ot.unif(m), costs.detach().numpy(), check_marginals=True)
    )
    value, du, dv = value_and_gradients(u, v, cost)
    expected = ot.emd2(ot.unif(n), ot.unif(m), costs.detach().numpy())
    assert value.item() == pytest.approx(expected, rel=1e-12, abs=1e-13)
    for x, gradient, lp in ((u, du, plan * slopes), (v, dv, -(plan * slopes).T)):
        torch.testing.assert_close(
            summed_over_ties(x, gradient), summed_over_ties(x, lp.sum(1)), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("sort", ["hard", "soft"])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_gradient_equals_finite_differences(n: int, m: int, sort: str, cost: Cost):
    u, v = sample(n, seed=n).requires_grad_(), sample(m, seed=100 + m).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda u, v: transport_value(u, v, cost, sort=sort, epsilon=0.8), (u, v)
    )


@given(samples, samples, convex_costs, st.integers(0, 2**32))
def test_no_other_coupling_is_cheaper(u: Tensor, v: Tensor, cost: Cost, seed: int):
    """Relabelling the atoms before the north-west corner rule gives all permutations when n = m,
    and some coupling with the right marginals in any case."""
    i, j, mass = northwest_corner(len(u), len(v))
    other = cost(u[permutation(len(u), seed)[i]] - v[permutation(len(v), seed + 1)[j]])
    assert transport_value(u, v, cost) <= (mass * other).sum() + 1e-12


def test_some_other_coupling_is_dearer():
    """Guards the property above against being met by a cost that no coupling changes."""
    u, v = sample(8, seed=0), sample(8, seed=1)
    sorted_value = transport_value(u, v, torch.square)
    assert sorted_value < 0.5 * (u - v).square().mean()


@given(samples, samples)
def test_coupling_costs_what_transport_value_says(u: Tensor, v: Tensor):
    for penalty in PENALTIES.values():
        i, j, mass = northwest_corner(len(u), len(v))
        expected = (mass * penalty(u.sort().values[i] - v.sort().values[j], 0.5)).sum()
        torch.testing.assert_close(transport_value(u, v, lambda z, h=penalty: h(z, 0.5)), expected)


@given(samples, samples)
def test_coupling_is_monotone_and_has_its_marginals(u: Tensor, v: Tensor):
    i, j, mass = northwest_corner(len(u), len(v))
    assert (torch.diff(i) >= 0).all() and (torch.diff(j) >= 0).all()
    for index, size in ((i, len(u)), (j, len(v))):
        marginal = torch.zeros(size).double().index_add(0, index, mass)
        torch.testing.assert_close(marginal, torch.full((size,), 1 / size).double())


@given(samples, samples)
def test_duplicated_rows_change_nothing(u: Tensor, v: Tensor):
    """m copies of u against n copies of v have equal sizes: a plain sort and mean solves that."""
    as_equal_sizes = (u.repeat(len(v)).sort().values - v.repeat(len(u)).sort().values).square()
    for left, right in ((u, v), (u.repeat(3), v), (u, v.repeat(2))):
        torch.testing.assert_close(
            transport_value(left, right, torch.square), as_equal_sizes.mean()
        )


@given(samples, samples, st.integers(0, 2**32))
def test_the_order_of_the_rows_does_not_matter(u: Tensor, v: Tensor, seed: int):
    shuffled = u[permutation(len(u), seed)], v[permutation(len(v), seed + 1)]
    for sort in ("hard", "soft"):
        left = transport_value(u, v, torch.square, sort=sort)
        right = transport_value(*shuffled, torch.square, sort=sort)
        assert torch.equal(left, right)


def assert_exact_marginals(n: int, m: int) -> None:
    """In units of 1/(n m) all masses are integers: compare without rounding."""
    i, j, mass = northwest_corner(n, m)
    units = (mass * (n * m)).round().long()
    assert torch.equal(units.double() / (n * m), mass)
    assert (units > 0).all()
    assert len(units) == n + m - gcd(n, m)
    for index, size, per_atom in ((i, n, m), (j, m, n)):
        assert (torch.diff(index) >= 0).all()
        marginal = torch.zeros(size, dtype=torch.int64).index_add(0, index, units)
        assert (marginal == per_atom).all()


@given(st.integers(1, 300), st.integers(1, 300))
def test_marginals_are_exact(n: int, m: int):
    assert_exact_marginals(n, m)


@pytest.mark.parametrize(("n", "m"), [(100_000, 99_999), (100_003, 65_536), (100_000, 1)])
def test_marginals_are_exact_for_large_coprime_sizes(n: int, m: int):
    assert_exact_marginals(n, m)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_an_empty_sample_is_an_error(sizes: tuple[int, int]):
    with pytest.raises(ValueError, match=f"n={sizes[0]} and m={sizes[1]}"):
        transport_value(torch.zeros(sizes[0]), torch.zeros(sizes[1]), torch.square)


@pytest.mark.parametrize("sort", ["hard", "soft"])
def test_float32_stays_float32_and_agrees_with_float64(sort: str, cost: Cost):
    u, v = sample(700, seed=0), sample(500, seed=1)
    double = value_and_gradients(u, v, cost, sort=sort)
    single = value_and_gradients(u.float(), v.float(), cost, sort=sort)
    for x, y in zip(single, double, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=1e-7)


# Soft sort.


@given(samples, epsilons)
def test_soft_sort_is_a_projection_onto_the_permutahedron(x: Tensor, epsilon: float):
    """y is the projection of z onto the convex set P iff y is in P and <z - y, p - y> <= 0 for all
    p in P. For the permutahedron of w, membership is majorization (Rado), and the p that maximizes
    <z - y, p> is w sorted like z - y (rearrangement inequality): the certificate is exact."""
    y = soft_sort(x, epsilon).flip(0)
    z = torch.arange(len(x), 0, -1).double() / epsilon
    tops_of_x = x.sort(descending=True).values.cumsum(0)
    assert (y.sort(descending=True).values.cumsum(0) <= tops_of_x + 1e-9).all()
    assert y.sum().item() == pytest.approx(x.sum().item(), abs=1e-9)
    best = ((z - y).sort().values * x.sort().values).sum()
    assert best <= ((z - y) * y).sum() + 1e-7


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("n", [2, 4, 6])
def test_soft_sort_equals_the_quadratic_program(n: int, ties: bool, epsilon: float):
    """min |p - z| over the convex hull of all n! permutations p of x, by SciPy: the weights of the
    nearest point are, up to their sum, the non-negative least-squares solution of
    min |(V - z) weights|^2 + (sum of weights - 1)^2 (V: the permutations as columns)."""
    x = sample(n, seed=n, ties=ties).numpy()
    z = np.arange(n, 0, -1) / epsilon
    vertices = np.array(list(permutations(x))).T
    system = np.vstack([vertices - z[:, None], np.ones(vertices.shape[1])])
    weights = nnls(system, np.eye(n + 1)[-1])[0]
    nearest = vertices @ weights / weights.sum()
    np.testing.assert_allclose(
        soft_sort(torch.from_numpy(x), epsilon).numpy()[::-1], nearest, atol=1e-9
    )


@given(samples, epsilons)
def test_soft_sort_keeps_sum_and_order(x: Tensor, epsilon: float):
    y = soft_sort(x, epsilon)
    assert (torch.diff(y) >= -1e-12).all()
    assert y.sum().item() == pytest.approx(x.sum().item(), abs=1e-9)
    assert y.min() >= x.min() - 1e-12 and y.max() <= x.max() + 1e-12


@given(samples, st.floats(0.01, 0.999))
def test_soft_sort_is_the_sort_where_gaps_are_below_one_over_epsilon(x: Tensor, share: float):
    widest = torch.diff(x.sort().values).max().item() if len(x) > 1 else 0.0
    assume(widest > 0)
    assert torch.equal(soft_sort(x, share / widest), x.sort().values)
    softer = soft_sort(x, 1.01 / widest)
    assert not torch.equal(softer, x.sort().values)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_epsilon_gives_the_hard_sort_and_its_gradient(ties: bool, dtype: torch.dtype):
    """Down to an epsilon whose 1/epsilon swamps the values: nothing may be lost to rounding."""
    u, v = sample(40, seed=0, ties=ties).to(dtype), sample(25, seed=1, ties=ties).to(dtype)
    hard = value_and_gradients(u, v, torch.square)
    for epsilon in (1e-3, 1e-6, 1e-9):
        soft = value_and_gradients(u, v, torch.square, sort="soft", epsilon=epsilon)
        assert torch.equal(soft[0], hard[0])
        for x, a, b in ((u, soft[1], hard[1]), (v, soft[2], hard[2])):
            torch.testing.assert_close(
                summed_over_ties(x, a.double()), summed_over_ties(x, b.double())
            )


def test_epsilon_goes_from_the_sort_to_the_mean():
    x = sample(20, seed=3)
    spreads = [soft_sort(x, epsilon).std().item() for epsilon in (0.1, 1.0, 10.0, 1e4)]
    assert spreads == sorted(spreads, reverse=True)
    torch.testing.assert_close(soft_sort(x, 1e8), x.mean().expand(20), rtol=0, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1.0, 5.0])
def test_jacobian_of_the_soft_sort(epsilon: float):
    """Central differences; and every output is a mean of inputs, each input used up in full."""
    x = sample(9, seed=5)
    jacobian = torch.autograd.functional.jacobian(lambda x: soft_sort(x, epsilon), x)
    step = 1e-5 * torch.eye(9).double()
    differences = torch.stack(
        [(soft_sort(x + e, epsilon) - soft_sort(x - e, epsilon)) / 2e-5 for e in step], dim=1
    )
    torch.testing.assert_close(jacobian, differences, rtol=0, atol=1e-8)
    for dim in (0, 1):
        torch.testing.assert_close(jacobian.sum(dim), torch.ones(9).double())


@given(samples, epsilons)
def test_gradient_of_the_soft_sort_is_finite_at_ties(x: Tensor, epsilon: float):
    x = torch.cat([x, x]).requires_grad_()
    weights = torch.arange(len(x)).double()
    (gradient,) = torch.autograd.grad((weights * soft_sort(x, epsilon)).sum(), x)
    assert gradient.isfinite().all()
    assert gradient.sum().item() == pytest.approx(weights.sum().item())


@pytest.mark.parametrize("epsilon", [0.0, -1.0])
def test_epsilon_must_be_positive(epsilon: float):
    with pytest.raises(ValueError, match="epsilon > 0"):
        soft_sort(torch.zeros(3), epsilon)


# How far AOT is from the pairwise loss.


@given(samples, st.integers(0, 2**32))
def test_comonotone_rows_are_not_recoupled(x: Tensor, seed: int):
    """Non-decreasing functions of one variable, ties on either side included."""
    x = x[permutation(len(x), seed)]
    for f, g in ((x, x), (x, 2 * x + 1), (x.clamp(max=0), x), (x.clamp(max=0), x.clamp(min=0))):
        assert recoupled_fraction(f, g) == 0


@given(st.lists(st.tuples(values, values), min_size=2, max_size=9))
def test_rows_are_recoupled_exactly_where_pairs_are_in_the_wrong_order(rows: list):
    """Rows alone are optimal for strictly convex costs iff no two of them are crossed."""
    u, v = torch.tensor(rows).double().T
    crossed = ((u[:, None] - u) * (v[:, None] - v) < 0).any()
    assert (recoupled_fraction(u, v) > 0) == crossed


def test_recoupled_fraction_counts_rows():
    u = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert recoupled_fraction(u, torch.tensor([1.0, 0.0, 2.0, 3.0])) == 0.5
    assert recoupled_fraction(u, u.flip(0)) == 1.0
