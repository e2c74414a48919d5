import pytest
import torch

from adalora.core.orthogonality import (
    Lengths,
    deviation,
    least_divisor,
    length_pull,
    relative_error,
    released_gradient,
    squared_gradient,
    step_divisor,
    turned,
)


def regularizer(V, squared_norm):
    """‖V Vᵀ - D‖²_F of each of the k matrices, written with loops over the pairs of vectors."""
    totals = []
    for matrix in V:
        total = 0 * matrix.sum()  # in the graph even where no pair follows
        for i, a in enumerate(matrix):
            for j, b in enumerate(matrix):
                if i != j:
                    total = total + (a @ b) ** 2
                elif squared_norm is not None:
                    total = total + (a @ a - squared_norm) ** 2
        totals.append(total)
    return torch.stack(totals)


@pytest.mark.parametrize("squared_norm", [1.0, 1 / 3, 2.5, None])
@pytest.mark.parametrize("shape", [(1, 4, 9), (3, 5, 7), (2, 1, 6), (2, 6, 3)])
def test_closed_form_is_the_gradient(shape, squared_norm):
    V = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    value = regularizer(V, squared_norm)
    (gradient,) = torch.autograd.grad(value.sum(), V)
    closed = squared_gradient(V.detach(), squared_norm=squared_norm)
    torch.testing.assert_close(closed, gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        deviation(V.detach(), squared_norm=squared_norm).square().sum(dim=(1, 2)),
        value.detach(),
        rtol=1e-12,
        atol=1e-12,
    )


def test_the_input_is_left_alone():
    V = torch.randn(2, 3, 5)
    before = V.clone()
    squared_gradient(V, squared_norm=1.0)
    squared_gradient(V, squared_norm=None)
    relative_error(V)
    assert torch.equal(V, before)


@pytest.mark.parametrize("length", [1.0, 0.5])
def test_orthogonal_vectors_of_the_right_length_have_no_gradient(length):
    basis = torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64)).Q.T
    V = length * basis[None]
    assert squared_gradient(V, squared_norm=length**2).abs().max() < 1e-14
    assert squared_gradient(V, squared_norm=None).abs().max() < 1e-14
    assert squared_gradient(V, squared_norm=4.0).abs().max() > 0.1


def test_descent_makes_vectors_orthogonal():
    V = torch.randn(2, 4, 10, dtype=torch.float64) / 3
    start = relative_error(V)
    for _ in range(400):
        V = V - 0.02 * squared_gradient(V, squared_norm=1.0)
    assert bool((relative_error(V) < 1e-4 * start).all())
    torch.testing.assert_close(V.norm(dim=-1), torch.ones(2, 4, dtype=torch.float64), rtol=1e-4, atol=0)


def stepped(V, *, weight, learning_rate):
    """Lengths asked for too, as with a λ of its own."""
    D = deviation(V, squared_norm=1.0)
    return V - D / step_divisor(D, least=least_divisor(weight, learning_rate)) @ V / 2


def turned_by(V, *, weight, learning_rate):
    none = torch.zeros(len(V), 1, dtype=V.dtype)
    return turned(V, least=least_divisor(weight, learning_rate), lengths=Lengths(none, none), pull=0.0)


def near_orthonormal(deviation):
    torch.manual_seed(0)
    return torch.linalg.qr(torch.randn(3, 9, 4, dtype=torch.float64)).Q.mT + deviation * torch.randn(3, 4, 9).double()


def test_a_step_is_the_gradients_while_it_is_short():
    V = near_orthonormal(0.03)
    expected = V - 0.01 * 2.0 * squared_gradient(V, squared_norm=1.0)
    torch.testing.assert_close(stepped(V, weight=2.0, learning_rate=0.01), expected, rtol=1e-12, atol=1e-12)


def test_turning_is_the_gradient_of_the_angles_while_it_is_short():
    """∂/∂V of Σ cos² over pairs of vectors as long as each other: what is left of R's gradient beside the vectors."""
    V = (2.5 * torch.nn.functional.normalize(near_orthonormal(0.1), dim=-1)).requires_grad_()
    unit = torch.nn.functional.normalize(V, dim=-1)
    (slope,) = torch.autograd.grad(regularizer(unit, None).sum(), V)
    moved = (turned_by(V.detach(), weight=1e-3, learning_rate=1e-3) - V.detach()) / 1e-6
    torch.testing.assert_close(moved, -slope * 2.5**2, rtol=1e-4, atol=1e-4)


def test_no_step_takes_more_than_a_quarter_of_a_deviation():
    """Whatever γ and the learning rate."""
    V = near_orthonormal(0.001)
    longest = stepped(V, weight=1e6, learning_rate=1.0)
    torch.testing.assert_close(longest, stepped(V, weight=1.0, learning_rate=1 / 32))
    before, after = (deviation(W, squared_norm=1.0) for W in (V, longest))
    torch.testing.assert_close(after, 0.75 * before, rtol=0, atol=1e-4)
    unit = torch.nn.functional.normalize(V, dim=-1)
    torch.testing.assert_close(
        relative_error(turned_by(unit, weight=1e6, learning_rate=1.0)), 0.75 * relative_error(unit), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("step", [stepped, turned_by])
@pytest.mark.parametrize("rank", [2, 16, 64])
def test_parallel_vectors_come_apart_whatever_the_rate(rank, step):
    """A step of fixed length multiplies what they share by up to 1 - (r - 1)/2 and overshoots from rank 6 on."""
    torch.manual_seed(rank)
    V = torch.nn.functional.normalize(torch.randn(1, 256) + 0.01 * torch.randn(rank, 256), dim=-1)[None].double()
    sizes = []
    for _ in range(150):
        V = step(V, weight=10.0, learning_rate=0.1)
        sizes.append(float(V.norm()))
    assert max(sizes) < 1.5 * rank**0.5
    assert float(relative_error(V)) < 1e-3


def test_turning_leaves_lengths_and_zeros_alone():
    V = torch.randn(2, 4, 9) * torch.tensor([1.0, 0.0, 1e-8, 1e3])[:, None]
    moved = turned_by(V, weight=10.0, learning_rate=0.1)
    torch.testing.assert_close(moved.norm(dim=-1), V.norm(dim=-1), rtol=1e-5, atol=0)
    assert bool((moved[:, 1] == 0).all())
    torch.testing.assert_close(moved[:, 3], V[:, 3], rtol=1e-4, atol=1e-2)  # short ones do not turn long ones
    assert torch.equal(turned_by(torch.zeros(1, 3, 5), weight=10.0, learning_rate=0.1), torch.zeros(1, 3, 5))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_lengths_are_drawn_slowly_where_one_is_wanted(as_tensor):
    """A hundredth of γ: deviations in length fall by 8·lr·γ/100 a step, those in angle by 8·lr·γ."""
    V = (1.01 * torch.nn.functional.normalize(near_orthonormal(0.0), dim=-1)).float()
    lengths = Lengths(torch.tensor([[-1.0], [0.0], [-1.0]]), torch.tensor([[1.0], [0.0], [1.0]]))
    rate = torch.tensor(0.003) if as_tensor else 0.003
    moved = turned(V, least=least_divisor(10.0, rate), lengths=lengths, pull=length_pull(10.0, rate))
    expected = 1 + 0.01 * (1 - 8 * 0.003 * 10 / 100)
    torch.testing.assert_close(moved[0].norm(dim=-1), torch.full((4,), expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(moved[1], V[1])
    for far in (1e-3, 1e3):  # whatever the rate, from far away: nearer, and never beyond
        sizes = turned(far * V, least=1.0, lengths=lengths, pull=length_pull(10.0, 1.0)).norm(dim=-1)[0] / far
        assert bool((sizes > 1.01).all() if far < 1 else (sizes < 1.01).all())


def test_without_a_rate_nothing_moves():
    V = torch.randn(2, 4, 9)
    for rate in (0.0, torch.tensor(0.0)):
        assert torch.equal(stepped(V, weight=10.0, learning_rate=rate), V)
        torch.testing.assert_close(turned_by(V, weight=10.0, learning_rate=rate), V, rtol=1e-6, atol=0)
    assert torch.equal(stepped(V, weight=0.0, learning_rate=0.1), V)


@pytest.mark.parametrize("rate", [1e-6, 3e-3, 0.5])
def test_a_rate_on_a_device_acts_as_a_number_does(rate):
    assert float(least_divisor(10.0, torch.tensor(rate))) == pytest.approx(least_divisor(10.0, rate), rel=1e-6)


def test_relative_error_by_hand():
    parallel = torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    right_angle = torch.tensor([[0.0, 2.0], [7.0, 0.0]])
    sixty_degrees = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]])
    error = relative_error(torch.stack([parallel, right_angle, sixty_degrees]))
    torch.testing.assert_close(error, torch.tensor([1.0, 0.0, 0.5]))


def test_relative_error_leaves_zero_vectors_out():
    live = torch.randn(3, 6)
    with_pruned = torch.cat([live, torch.zeros(2, 6)])
    torch.testing.assert_close(relative_error(with_pruned[None]), relative_error(live[None]))
    assert relative_error(torch.zeros(1, 3, 4)).tolist() == [0.0]
    assert relative_error(torch.randn(1, 1, 4)).tolist() == [0.0]


@pytest.mark.parametrize("r", [1, 3, 6])
def test_the_released_gradient_is_autograds(r):
    V = torch.randn(2, r, 9, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(r, dtype=torch.float64)
    torch.linalg.matrix_norm(V @ V.transpose(1, 2) - eye).sum().backward()
    torch.testing.assert_close(released_gradient(V.detach()), V.grad, rtol=1e-10, atol=1e-12)


def test_the_released_gradient_of_orthonormal_vectors_is_zero():
    assert not bool(released_gradient(torch.eye(3, 5, dtype=torch.float64)[None]).any())
