"""The algebra of `LowRank`: its operators are those of the linear maps that it stands for, with and without a gain per row."""
import operator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from modlab.maths.lowrank import LowRank, fold, stack

I, O, B = 5, 4, 3 # widths of the layer, rows of the batch
F64 = torch.float64
close = torch.testing.assert_close
pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def maps(draw, rows=st.booleans()):
    "A map on the one layer, of any small rank, with or without a gain per row."
    r, with_rows, seed = draw(st.integers(1, 4)), draw(rows), draw(st.integers(0, 10**6))
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)
    return LowRank(random(r, I), random(*[B] * with_rows, r), random(O, r))


numbers = st.floats(-4, 4) | st.integers(-4, 4) | st.floats(-4, 4).map(lambda c: torch.tensor(c))
doses = numbers | st.lists(st.floats(-4, 4), min_size=B, max_size=B).map(lambda c: torch.tensor(c, dtype=F64))
X = torch.randn(B, 6, I, generator=torch.Generator().manual_seed(1), dtype=F64)
Y = torch.randn(B, 6, O, generator=torch.Generator().manual_seed(2), dtype=F64)
per_row = lambda s: s[:, None, None] if isinstance(s, torch.Tensor) and s.ndim else s
many = settings(max_examples=60, deadline=None)


@many
@given(maps(), maps())
def test_sum_and_difference_act_like_their_parts(a, b):
    close((a + b)(X), a(X) + b(X))
    close((a - b)(X), a(X) - b(X))
    close((a + b)(X), (b + a)(X))
    close((a + b).matrix().expand(B, O, I), (a.matrix() + b.matrix()).expand(B, O, I))
    assert (a + b).rank == a.rank + b.rank
    close((a - a)(X), torch.zeros_like(Y))


@many
@given(maps(), maps(), doses)
def test_scaling_is_linear_from_either_side(a, b, s):
    close((s * a)(X), per_row(s) * a(X))
    close((a * s)(X), (s * a)(X))
    close((s * (a + b))(X), (s * a + s * b)(X))
    assert (s * a).rank == a.rank and (s * a).gain.dtype == F64 and (s * a).down is a.down and (s * a).up is a.up


@many
@given(maps(), doses, doses)
def test_scalings_compose(a, s, t):
    close((s * (t * a))(X), per_row(s) * (per_row(t) * a(X)))
    close((-a)(X), (-1 * a)(X))
    assert torch.equal((-1 * -a)(X), a(X))


@many
@given(maps(), maps(), doses)
def test_the_transpose_is_the_adjoint(a, b, s):
    close((a(X) * Y).sum((1, 2)), (X * a.T(Y)).sum((1, 2)))  # <aX, Y> = <X, aᵀY>, row by row
    close((s * a).T(Y), (s * a.T)(Y))
    close((a + b).T(Y), (a.T + b.T)(Y))
    back = a.T.T
    assert all(torch.equal(getattr(back, f), getattr(a, f)) for f in ("down", "gain", "up"))


@many
@given(st.lists(maps(), min_size=1, max_size=4))
def test_python_can_sum_them(many_maps):
    total, stacked = sum(many_maps), stack(many_maps)
    close(total(X), stacked(X))
    close(total(X), sum(m(X) for m in many_maps))
    close(total.norm().expand(B), torch.linalg.matrix_norm(total.matrix()).expand(B))


@many
@given(maps(rows=st.just(False)), maps(rows=st.just(False)), st.floats(-4, 4))
def test_folding_and_recompressing_know_the_operators(a, b, c):
    W = torch.zeros(O, I, dtype=F64)
    close(fold(fold(W, c * a), -b), (c * a - b).matrix())
    close((a + b - b).recompress(a.rank)[0].matrix(), a.matrix())


@pytest.mark.parametrize("s", [torch.ones(B, 1), torch.ones(2, 2, 2)])
def test_a_scale_of_another_shape_is_refused(s):
    a = LowRank(torch.ones(2, I), torch.ones(2), torch.ones(O, 2))
    for f in (lambda: s * a, lambda: a * s):
        with pytest.raises(ValueError, match="by one number per row"): f()


def test_rows_that_do_not_fit_are_refused():
    plain = LowRank(torch.ones(2, I), torch.ones(2), torch.ones(O, 2))
    three, two = torch.ones(3) * plain, torch.ones(2) * plain
    with pytest.raises(ValueError, match="2 numbers .* has 3 rows"): torch.ones(2) * three
    with pytest.raises(ValueError, match=r"\[2, 3\] rows"): two + three
    with pytest.raises(ValueError, match="cannot be folded"): fold(torch.zeros(O, I), three)
    with pytest.raises(ValueError, match="cannot be recompressed"): three.recompress(1)
    with pytest.raises(ValueError, match="different layers"): plain + plain.T


@pytest.mark.parametrize("f", [operator.add, operator.sub, operator.mul])
@pytest.mark.parametrize("other", ["a", None, [1.0]])
def test_what_is_no_map_and_no_number_is_a_type_error(f, other):
    a = LowRank(torch.ones(2, I), torch.ones(2), torch.ones(O, 2))
    for left, right in ((a, other), (other, a)):
        with pytest.raises(TypeError): f(left, right)


def test_gradients_pass_through_a_dose():
    a = LowRank(torch.randn(2, I), torch.randn(2, requires_grad=True), torch.randn(O, 2))
    c = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    (c * a + a)(X.float()).sum().backward()
    assert c.grad.shape == (3,) and a.gain.grad.abs().sum() > 0


def test_its_repr_prints_no_tensor():
    a = LowRank(torch.ones(2, I), torch.ones(2), torch.ones(O, 2))
    assert repr(a) == "LowRank(rank 2, 5 -> 4)" and "3 rows" in repr(torch.ones(3) * a)
    assert a == a and a != LowRank(a.down, a.gain, a.up), "compared as objects: no tensor is asked for its truth"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("o, i", [(30, 50), (50, 30)])
@pytest.mark.parametrize("transposed", [False, True])
def test_folding_rounds_once(dtype, o, i, transposed):
    "The plain twin: a float32 copy of the weight, and the product added to it."
    g = torch.Generator().manual_seed(0)
    m = LowRank(torch.randn(8, i, generator=g), torch.rand(8, generator=g), torch.randn(o, 8, generator=g))
    W = torch.randn(i, o, generator=g).to(dtype).T if transposed else torch.randn(o, i, generator=g).to(dtype)
    before, wide = W.clone(), torch.promote_types(dtype, torch.float32)
    got = fold(W, m)
    plain = W.to(wide) + (m.up.to(wide) * m.gain.to(wide)) @ m.down.to(wide)
    assert got.dtype == dtype and got.shape == (o, i) and torch.equal(W, before)
    close(got, plain.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    if dtype.itemsize == 2: assert (got == plain.to(dtype)).float().mean() > 0.99
    exact = W.double() + (m.up.double() * m.gain.double()) @ m.down.double()
    assert ((got.double() - exact).abs() <= (torch.finfo(dtype).eps / 2 + 1e-6) * exact.abs() + 1e-6).all(), "rounded once"


def test_a_fold_has_a_gradient():
    up = torch.ones(3, 2, requires_grad=True)
    fold(torch.zeros(3, 4, dtype=torch.bfloat16), LowRank(torch.ones(2, 4), torch.ones(2), up)).sum().backward()
    assert torch.equal(up.grad, torch.full((3, 2), 4.0))
