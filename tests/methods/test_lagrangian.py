import pytest
import torch

from utils.methods.lagrangian import (
    Multiplier,
    augmented,
    dual_lagrangian,
    embedding_margin,
    entropy_margin,
    primal_lagrangian,
    violation,
)
from utils.methods.losses import squared_distance


class LinearProblem:
    """min over W of mean ||W(x + delta) - W0 x||^2, for fixed delta, subject to the constraint of LORE.

    The constraint: mean(||W x - W0 x||^2 - rho ||W0 x||^2) <= 0.
    For a given multiplier the best W solves a linear system; the optimal multiplier follows by bisection.
    """

    def __init__(self, rho: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rho = rho
        self.x = torch.randn(64, 6, generator=generator, dtype=torch.float64)
        self.delta = 0.7 * torch.randn(64, 6, generator=generator, dtype=torch.float64)
        self.w0 = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        self.z0 = self.x @ self.w0.T
        self.margin = self.z0.square().sum(1)

    def objective(self, w):
        return (((self.x + self.delta) @ w.T) - self.z0).square().sum(1)

    def violation(self, w):
        return violation((self.x @ w.T - self.z0).square().sum(1), self.margin, self.rho)

    def best_w(self, multiplier: float):
        x_adv = self.x + self.delta
        left = x_adv.T @ x_adv + multiplier * self.x.T @ self.x
        right = x_adv.T @ self.z0 + multiplier * self.x.T @ self.z0
        return torch.linalg.solve(left, right).T

    def solve(self):
        low, high = 0.0, 1e4
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if self.violation(self.best_w(middle)).mean() > 0 else (low, middle)
        return self.best_w(high), high

    def descend(self, multiplier, steps=4000, primal_steps=2, dual_rate=0.02):
        w = self.w0.clone().requires_grad_(True)
        primal = torch.optim.SGD([w], lr=0.02)
        dual = torch.optim.SGD(multiplier.parameters(), lr=dual_rate, maximize=True)
        history = []
        for _ in range(steps):
            for _ in range(primal_steps):
                loss = primal_lagrangian(self.objective(w), self.violation(w), multiplier(self.z0))
                primal.zero_grad()
                loss.backward()
                primal.step()
            dual.zero_grad()
            dual_lagrangian(self.violation(w), multiplier(self.z0)).backward()
            dual.step()
            history.append((multiplier(self.z0).mean().item(), squared_distance(self.x @ w.T, self.z0).mean().item()))
        return w.detach(), history


def test_primal_and_dual_converge_to_the_optimum():
    problem = LinearProblem(rho=0.01)
    best_w, best_multiplier = problem.solve()
    assert best_multiplier > 0.5  # the constraint is active
    multiplier = Multiplier("scalar", 4).double()
    w, history = problem.descend(multiplier, steps=6000)
    assert history[-1][0] == pytest.approx(best_multiplier, rel=1e-2)
    torch.testing.assert_close(w, best_w, rtol=0, atol=1e-3)
    assert problem.violation(w).mean() <= 1e-3 * problem.margin.mean()


def test_an_inactive_constraint_gets_a_multiplier_of_zero():
    problem = LinearProblem(rho=10.0)
    w, history = problem.descend(Multiplier("scalar", 4).double(), steps=1500)
    multipliers = [value for value, _ in history]
    assert all(later <= earlier for earlier, later in zip(multipliers, multipliers[1:]))
    assert multipliers[-1] < 0.02
    torch.testing.assert_close(w, problem.best_w(0.0), rtol=0, atol=0.02)


def test_without_tolerance_the_multiplier_never_falls_and_the_clean_distance_shrinks():
    _, history = LinearProblem(rho=0.0).descend(Multiplier("scalar", 4).double(), steps=3000)
    multipliers, distances = zip(*history)
    assert all(later >= earlier for earlier, later in zip(multipliers, multipliers[1:]))
    assert distances[-1] < 0.2 * max(distances)


def test_each_side_sees_the_other_as_a_constant():
    multiplier = Multiplier("network", 4)
    z0 = torch.randn(5, 4)
    objective, v = torch.rand(5, requires_grad=True), torch.rand(5, requires_grad=True)
    primal_lagrangian(objective, v, multiplier(z0)).backward()
    assert all(parameter.grad is None for parameter in multiplier.parameters())
    torch.testing.assert_close(v.grad, multiplier(z0).detach() / 5)
    v.grad = None
    dual_lagrangian(v, multiplier(z0)).backward()
    assert v.grad is None
    assert all(parameter.grad is not None for parameter in multiplier.parameters())


@pytest.mark.parametrize("kind", ["network", "linear", "scalar"])
def test_multiplier_is_positive_one_per_image_and_float32(kind):
    values = Multiplier(kind, 8)(20 * torch.randn(6, 8).bfloat16())
    assert values.shape == (6,)
    assert values.dtype == torch.float32
    assert (values >= 0).all()
    assert (kind == "scalar") == (values.unique().numel() == 1)


def test_margins():
    z0 = torch.randn(3, 8)
    torch.testing.assert_close(embedding_margin(z0, "relative"), z0.norm(dim=1) ** 2)
    assert embedding_margin(z0, "fixed").tolist() == [1, 1, 1]
    margins = entropy_margin(torch.tensor([[100.0, 0.0], [3.0, 3.0]]), "relative")
    assert entropy_margin(torch.zeros(2, 3), "fixed").tolist() == [1, 1]
    assert margins[0] < 1e-6
    assert margins[1] == pytest.approx(0.6931, abs=1e-4)


def test_the_augmented_lagrangian_weighs_violations_at_once_and_keeps_the_solutions():
    generator = torch.Generator().manual_seed(0)
    v, margin = torch.randn(64, generator=generator).double(), torch.rand(64, generator=generator).double() + 0.5
    multiplier, c = 3 * torch.rand(64, generator=generator).double(), 7.0
    v.requires_grad_(True)
    (slope,) = torch.autograd.grad(augmented(v, multiplier, c, margin).sum(), v)
    torch.testing.assert_close(slope, (multiplier + c * v / margin).clamp(min=0).detach())
    torch.testing.assert_close(augmented(v, multiplier, 1e-9, margin), multiplier * v, rtol=1e-6, atol=1e-6)
    # At a solution: equality with any multiplier, or room with a multiplier of 0.
    for at, weight in ((0 * v, multiplier), (-v.abs(), 0 * multiplier)):
        (slope,) = torch.autograd.grad(augmented(at, weight, c, margin).sum(), v, allow_unused=True)
        assert augmented(at, weight, c, margin).abs().max() == 0
    at = torch.zeros(64, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(augmented(at, multiplier, c, margin).sum(), at)
    torch.testing.assert_close(slope, multiplier)
    loss = primal_lagrangian(margin, v, multiplier, torch.tensor(16), augmentation=(c, margin))
    torch.testing.assert_close(loss, (margin + augmented(v, multiplier, c, margin)).sum() / 16)


@pytest.mark.parametrize("penalty", [0.5, 5.0])
def test_the_augmented_lagrangian_finds_every_image_s_solution(penalty):
    """min over z of sum (z - a)^2 subject to z^2 <= rho for every image: z = a, or the bound of the same sign."""
    a = torch.linspace(-2, 2, 21, dtype=torch.float64)
    margin, rho = torch.ones_like(a), 0.49
    z, multiplier = torch.zeros_like(a).requires_grad_(True), torch.zeros_like(a)
    for _ in range(400):
        optimizer = torch.optim.SGD([z], lr=0.02)
        for _ in range(40):
            loss = primal_lagrangian(
                (z - a).square(), violation(z.square(), margin, rho), multiplier, torch.tensor(1),
                augmentation=(penalty, margin),
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        multiplier = (multiplier + penalty * violation(z.detach().square(), margin, rho)).clamp(min=0)
    torch.testing.assert_close(z.detach(), a.clamp(-(rho**0.5), rho**0.5), rtol=1e-3, atol=1e-3)
    exact = (a.abs() / rho**0.5 - 1).clamp(min=0)  # 2 (z - a) + 2 lambda z = 0
    torch.testing.assert_close(multiplier, exact, rtol=1e-2, atol=1e-3)
