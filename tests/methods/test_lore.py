"""utils/methods/lore.py: the problem and the attack, without a launcher, against formulas written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils.methods.lagrangian import Multiplier
from utils.methods.lore import CONSTRAINTS, OBJECTIVES, MicroBatch, Problem, attack

EPS = 8 / 255


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 6), nn.Tanh(), nn.Linear(6, 5))


@pytest.fixture
def batch():
    """Images, a perturbation, and a reference that is somewhere else."""
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.rand(3, 3, 4, 4, generator=generator)
    z0 = torch.randn(3, 5, generator=generator)
    delta = EPS * (2 * torch.rand(pixel_values.shape, generator=generator) - 1)
    return MicroBatch(pixel_values, torch.tensor([0, 1, 3]), z0, z0.square().sum(dim=1), delta)


def classifier(z):
    return 3 * z[:, :4]


def distances(encoder, batch):
    """||phi(x) - z0||^2 of the clean and of the perturbed images."""
    z0 = batch.ref_image_embeds
    return [(encoder(x) - z0).square().sum(dim=1) for x in (batch.pixel_values, batch.pixel_values + batch.delta)]


def test_the_primal_of_lore_is_its_formula(encoder, batch):
    multiplier, (clean, attacked) = Multiplier("network", 5), distances(encoder, batch)
    expected = (attacked + multiplier(batch.ref_image_embeds).detach() * (clean - 0.1 * batch.margin)).mean()
    primal = Problem(rho=0.1).primal(encoder, batch, multiplier)
    torch.testing.assert_close(primal.loss, expected)
    torch.testing.assert_close(primal.terms, torch.stack([expected, attacked.mean(), clean.mean()]))
    primal.loss.backward()
    assert all(parameter.grad is None for parameter in multiplier.parameters())


def test_the_clean_weight_weighs_the_clean_distance(encoder, batch):
    clean, attacked = distances(encoder, batch)
    primal = Problem(constraint="none", clean_weight=0.5).primal(encoder, batch)
    torch.testing.assert_close(primal.loss, (attacked + 0.5 * clean).mean())
    torch.testing.assert_close(Problem(constraint="none").primal(encoder, batch).loss, attacked.mean())


def test_margins_are_what_they_are_called(batch):
    z0 = batch.ref_image_embeds
    torch.testing.assert_close(Problem(margin_kind="relative").margin(z0), z0.square().sum(dim=1))
    torch.testing.assert_close(Problem(margin_kind="fixed").margin(z0), torch.ones(3))
    p = classifier(z0).softmax(dim=1)
    kl = Problem(constraint="kl", margin_kind="relative", classifier=classifier)
    torch.testing.assert_close(kl.margin(z0), -(p * p.log()).sum(dim=1))


def test_the_dual_ascends_on_the_violation_alone(encoder, batch):
    multiplier, (clean, _) = Multiplier("linear", 5), distances(encoder, batch)
    violation = (clean - 0.2 * batch.margin).detach()
    dual = Problem(rho=0.2).dual(encoder, batch, multiplier)
    torch.testing.assert_close(dual, (multiplier(batch.ref_image_embeds) * violation).mean())
    dual.backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert multiplier.raw.weight.grad.abs().max() > 0


def test_a_batch_without_images_is_a_forward_and_nothing_to_ascend_on(encoder):
    nothing = MicroBatch(torch.zeros(0, 3, 4, 4), ref_image_embeds=torch.zeros(0, 5), margin=torch.zeros(0))
    forwards = []
    encoder.register_forward_hook(lambda *words: forwards.append(1))
    assert Problem().dual(encoder, nothing, Multiplier("scalar", 5), torch.tensor(1.0)) == 0
    assert forwards == [1]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_every_combination_attacks_and_descends(encoder, batch, objective, constraint):
    problem = Problem(objective, constraint, classifier=classifier)
    batch.delta = attack(encoder, problem, batch, [1, 2, 3], eps=EPS, step_size=EPS / 4, num_steps=10)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in encoder.parameters())
    assert batch.delta.abs().max() <= EPS + 1e-6
    before = problem.loss(encoder(batch.pixel_values), batch)
    assert (problem.loss(encoder(batch.pixel_values + batch.delta), batch) > before).all()

    batch.margin = problem.margin(batch.ref_image_embeds)
    optimizer, multiplier, losses = torch.optim.SGD(encoder.parameters(), lr=1e-3), Multiplier("scalar", 5), []
    for _ in range(5):
        losses.append(problem.primal(encoder, batch, multiplier).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert problem.needs_labels == (objective == "tecoa" or constraint == "kl")


def test_names():
    names = {
        ("embedding", "embedding"): "LORE",
        ("embedding", "none"): "FARE",
        ("embedding", "kl"): "embedding + KL",
        ("tecoa", "none"): "TeCoA",
        ("tecoa", "embedding"): "TeCoA + l2",
        ("tecoa", "kl"): "TeCoA + KL",
    }
    assert {pair: Problem(*pair).name for pair in names} == names
    assert Problem("embedding", "none", clean_weight=1).name == "FARE + clean distance"
