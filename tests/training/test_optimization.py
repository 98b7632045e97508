import itertools
import math
import re

import pytest
import torch
from scipy.stats import beta

from utils.errors import UserError
from utils.training.optimization import (
    BetaAverage,
    accumulation_steps,
    cosine_learning_rate,
    count_steps,
    make_optimizer,
    set_learning_rate,
)


def test_the_rate_warms_up_linearly_and_falls_as_torchs_cosine():
    rates = [cosine_learning_rate(step, 2.0, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    for rate in rates[10:]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        cosine.step()
    set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_steps_of_a_run():
    sizes = {"samples_per_epoch": 103, "num_samples": 103, "global_batch_size": 10, "epochs": 3}
    assert count_steps(**sizes, max_steps=None) == 30
    assert count_steps(**sizes, max_steps=7) == 7
    with pytest.raises(UserError, match="--train_num_samples 104: the shards hold 103"):
        count_steps(**sizes | {"samples_per_epoch": 104}, max_steps=None)
    with pytest.raises(UserError, match="global batch of 200"):
        count_steps(**sizes | {"global_batch_size": 200}, max_steps=None)


def test_a_global_batch_is_reached_exactly_or_refused_with_what_would_fit():
    """Over all small cases: the product is N, and each of the two ways out that a refusal names is accepted."""
    assert accumulation_steps(None, 8, 2) == 1
    assert accumulation_steps(None, 8, 2, given=3) == 3
    assert accumulation_steps(3584, 448, 8) == 1
    assert accumulation_steps(3584, 448, 1, given=8) == 8
    refused = 0
    for total, per_device, processes in itertools.product(range(1, 25), range(1, 13), range(1, 7)):
        if total % (per_device * processes) == 0:
            assert accumulation_steps(total, per_device, processes) * per_device * processes == total
            continue
        refused += 1
        with pytest.raises(UserError, match=f"--global_batch_size {total}: ") as error:
            accumulation_steps(total, per_device, processes)
        smaller = re.search(r"; --per_device_train_batch_size (\d+) would fit", str(error.value))
        assert bool(smaller) == (total % processes == 0)
        if smaller:
            assert int(smaller[1]) < per_device
            accumulation_steps(total, int(smaller[1]), processes)
        for batch in re.search(r"--global_batch_size ([\d or]+)$", str(error.value))[1].split(" or "):
            accumulation_steps(int(batch), per_device, processes)
    assert refused > 1000
    with pytest.raises(
        UserError, match=r"--gradient_accumulation_steps 3 with --global_batch_size 32: that is 2 times 2 x 8"
    ) as error:
        accumulation_steps(32, 8, 2, given=3)
    assert "--global_batch_size 48" in str(error.value)
    accumulation_steps(48, 8, 2, given=3)
    with pytest.raises(UserError, match="would fit"):  # an answer, not a search without end
        accumulation_steps(2**62 + 2, 2**61, 2)


@pytest.mark.parametrize("name", ["adamw", "adamax", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore")
def test_optimizers_minimise(name):
    torch.manual_seed(0)
    module = torch.nn.Linear(64, 96)
    optimizer = make_optimizer(name, module, learning_rate=0.05, weight_decay=0.0)
    x = torch.randn(32, 64)
    losses = []
    for _ in range(20):
        loss = module(x).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert math.isfinite(losses[-1])


def test_the_running_average_is_the_weighted_mean_and_goes_on_after_a_resume():
    """Against the weighted mean of all the weights that were, with SciPy's density."""
    module = torch.nn.Linear(3, 2)
    steps = 7
    history = [[parameter.detach().clone() for parameter in module.parameters()]]
    average = BetaAverage(module, steps)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        history.append([parameter.detach().clone() for parameter in module.parameters()])
        if step == 4:
            state, average = average.state_dict(), BetaAverage(module, steps)
            average.load_state_dict(state)
        average.update(module, step)
    weights = [float(beta.pdf((step + 0.5) / (steps + 1), 0.7, 0.7)) for step in range(steps + 1)]
    assert weights[0] == pytest.approx(weights[-1])
    assert weights[0] > weights[4]
    expected = [sum(w * p for w, p in zip(weights, moments)) / sum(weights) for moments in zip(*history)]
    with average.applied(module):
        for parameter, mean in zip(module.parameters(), expected):
            torch.testing.assert_close(parameter.detach(), mean)
    for parameter, last in zip(module.parameters(), history[-1]):
        assert torch.equal(parameter, last)
