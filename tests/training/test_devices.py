"""A step on a device of its own: nothing in it is made on the CPU, and nothing waits.

The device is torch's "meta": tensors without data. An operation that mixes it with the CPU fails or is caught, and what
needs a value on the CPU raises. So this needs no GPU to find what would fail or wait on one.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.small_models import KINDS, save_small_clip, save_small_model, small_encoder
from utils.methods import attacks
from utils.methods.attacks import attack_seeds
from utils.methods.lagrangian import Multiplier
from utils.methods.lore import MicroBatch, Problem, attack
from utils.methods.preferences import (
    PREFERENCES,
    BatchLogits,
    PreferenceBatch,
    PreferenceProblem,
    candidate_logits,
    kto_baseline,
)

DEVICE = torch.device("meta")
N, TEXTS = 4, 6
FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.from_numpy}


class OnDevice(TorchDispatchMode):
    """Refuses every operation that reads or makes a tensor elsewhere than on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        places = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        assert places <= {DEVICE.type}, f"{func} has tensors on {places}"
        return result


class NothingFromPython(TorchFunctionMode):
    """Refuses tensors made of Python's numbers: their copy to the device waits for all work before it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in FROM_PYTHON, f"{func.__name__} copies to the device and waits"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_small_clip(folder)
    return small_encoder(folder).to(DEVICE).train()


@contextlib.contextmanager
def a_device_alone(monkeypatch):
    # There is no random generator of this device; a CPU's serves it as well, because nothing is drawn.
    monkeypatch.setattr(attacks.torch, "Generator", lambda device=None: torch._C.Generator())
    monkeypatch.setattr(torch, "autocast", lambda *words, **flags: contextlib.nullcontext())  # nor has it autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *words: False)
    with OnDevice(), NothingFromPython():
        yield


@pytest.fixture
def on_device(monkeypatch):
    with a_device_alone(monkeypatch):
        yield


def pixels():
    return torch.empty(N, 3, 32, 32, device=DEVICE)


def indices(*shape):
    return torch.empty(shape, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"penalty": 10.0},
        {"margin_kind": "fixed"},
        {"constraint": "none"},
        {"constraint": "none", "clean_weight": 1.0},
        {"objective": "tecoa", "constraint": "none"},
        {"objective": "tecoa", "constraint": "kl"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["network", "scalar"])
def test_a_step_of_lore_stays_on_its_device(encoder, on_device, settings, kind):
    weight = torch.empty(encoder.embed_dim, 5, device=DEVICE)
    problem = Problem(**settings, classifier=lambda z: z @ weight)
    with torch.device(DEVICE):
        multiplier = Multiplier(kind, encoder.embed_dim)
    batch = MicroBatch(pixels(), labels=indices(N))
    problem.refer(encoder, batch)
    batch.delta = attack(
        encoder, problem, batch, attack_seeds(0, 1, range(N)), eps=4 / 255, step_size=1 / 255, num_steps=2, momentum=0.9
    )
    batch.image_embeds = batch.ref_image_embeds
    primal = problem.primal(encoder, batch, multiplier)
    primal.loss.backward()
    problem.measure(primal, batch, multiplier)
    if problem.constrained:
        problem.dual(encoder, batch, multiplier).backward()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_encoder_stays_on_the_device_of_its_pixels(tmp_path, monkeypatch, kind):
    save_small_model(tmp_path / kind, kind)
    of_kind = small_encoder(tmp_path / kind)
    size = of_kind.image_size
    of_kind.to(DEVICE).train()
    with a_device_alone(monkeypatch):
        of_kind(torch.empty(N, 3, size, size, device=DEVICE)).square().sum().backward()


@pytest.mark.parametrize("held", [Problem(constraint="none"), Problem(penalty=1.0)], ids=["free", "held"])
@pytest.mark.parametrize("preference", PREFERENCES)
def test_a_step_of_preference_optimisation_stays_on_its_device(encoder, on_device, preference, held):
    problem = PreferenceProblem(preference, held=held)
    with torch.device(DEVICE):
        multiplier = Multiplier("network", encoder.embed_dim)
    texts, candidates = torch.empty(TEXTS, encoder.embed_dim, device=DEVICE), indices(N // 2, TEXTS) > 0

    def logits(image_embeds):
        whole = image_embeds @ texts.T
        return BatchLogits(candidate_logits(whole[: N // 2], candidates), candidate_logits(whole[N // 2 :], None))

    inputs = pixels()
    with torch.no_grad():
        reference = encoder(inputs)
        ref_logits = logits(reference)
    batch = PreferenceBatch(inputs, indices(N // 2), indices(N // 2, 2), reference, ref_logits)
    image_embeds = encoder(inputs)
    of_policy = logits(image_embeds)
    totals = torch.empty(2, device=DEVICE)
    baseline = kto_baseline(batch, of_policy, lambda value: value) if preference == "kto" else None
    primal = problem.primal(batch, image_embeds, of_policy, totals, baseline=baseline, multiplier=multiplier)
    primal.loss.backward()
    problem.measure(primal, batch, of_policy)
    if problem.constrained:
        problem.held.dual(encoder, primal.clean, multiplier, totals[1].clamp_min(1)).backward()


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x + torch.ones(3, 32, 32),
        lambda x: x.flatten(1) @ torch.ones(3 * 32 * 32, 2),
        lambda x: x * torch.tensor(2.0, device=DEVICE),
        lambda x: x.new_tensor(2.0),
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x if (x > 0).any() else -x,
        lambda x: x.cpu(),
    ],
    ids=["made on the CPU", "product", "from Python", "new_tensor", "item", "mask", "branch", "copy"],
)
def test_a_fault_would_be_seen(on_device, fault):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        fault(pixels())
