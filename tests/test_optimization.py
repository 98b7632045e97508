import math

import pytest
import torch

from utils.cli import UserError
from utils.optimization import cosine_learning_rate, count_steps, make_optimizer, set_learning_rate


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


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
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
