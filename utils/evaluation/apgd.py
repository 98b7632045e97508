"""APGD (Croce and Hein 2020): PGD with an adaptive step size, run with cross-entropy and with targets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.methods.attacks import Logits, seed_from

NUM_TARGETS = 9


def targeted_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The targeted difference of logits ratio, maximised: (B, C), (B,) int64, (B,) int64 -> (B,), dtype of the logits.

    -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12), z in descending order: independent of the logits' scale. Needs
    4 classes; with fewer the loss is the margin z_t - z_y. Source: Croce and Hein 2020 (arXiv 2003.01690), eq. 7.
    """
    margin = (logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None]))[:, 0]
    if logits.shape[1] < 4:
        return -margin
    top = logits.topk(4, dim=1).values
    return -margin / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def sphere_start(pixel_values: Tensor, eps: float, seeds: Sequence[int]) -> Tensor:
    """x + eps * u / max|u|, u uniform in [-1, 1], clamped to [0,1]: (B, 3, H, W) -> the same. Row i has ``seeds[i]``.

    Drawn on the CPU, so that all devices start from the same points.
    """
    noise = torch.empty(pixel_values.shape)
    generator = torch.Generator()
    for sample, seed in zip(noise, seeds, strict=True):
        sample.uniform_(-1, 1, generator=generator.manual_seed(seed))
    noise = (noise / (noise.abs().amax(dim=(1, 2, 3), keepdim=True) + 1e-12)).to(pixel_values)
    return (pixel_values + eps * noise).clamp(0.0, 1.0)


def into_ball(adversarial: Tensor, pixel_values: Tensor, eps: float) -> Tensor:
    """The nearest allowed image: clamps to [x - eps, x + eps], then to [0,1]."""
    return adversarial.clamp(pixel_values - eps, pixel_values + eps).clamp_(0.0, 1.0)


def per_image(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


@dataclass
class Runs:
    """Parallel runs of APGD, one per row. Each row is at its own step, so that runs can end and begin at any time.

    Images and gradients are (B, 3, H, W) in the pixels' dtype, all others (B,).
    """

    pixel_values: Tensor
    labels: Tensor  # int64
    targets: Tensor  # int64, -1: cross-entropy
    adversarial: Tensor  # image of the next forward pass
    previous: Tensor  # image of the forward pass before
    gradient: Tensor  # at ``adversarial``
    best: Tensor  # image with the highest loss so far
    best_gradient: Tensor
    best_loss: Tensor
    best_loss_at_check: Tensor
    last_loss: Tensor  # float32, zero before the first step, as the first check needs it
    rises: Tensor  # number of steps since the last check that raised the loss
    halved: Tensor  # bool, whether the last check halved the step; true before the first check
    step: Tensor  # int64, number of gradient steps made
    step_size: Tensor  # float32

    @classmethod
    def begin(cls, pixel_values: Tensor, labels: Tensor, targets: Tensor, start: Tensor, eps: float) -> Runs:
        """Runs before their first forward pass; ``start``: (B, 3, H, W) in [0,1], inside the ball."""
        zeros, no_gradient = torch.zeros(len(labels), device=labels.device), torch.zeros_like(pixel_values)
        no_loss, halved = zeros.to(pixel_values.dtype), torch.ones_like(labels, dtype=torch.bool)
        # No method changes a tensor in place, so several fields may start as the same tensor.
        return cls(
            *(pixel_values, labels, targets, start, start, no_gradient, start, no_gradient, no_loss, no_loss),
            *(zeros, zeros, halved, torch.zeros_like(labels), torch.full_like(zeros, 2 * eps)),
        )

    def observe(self, loss: Tensor, gradient: Tensor) -> None:
        """Records the forward pass at ``adversarial``: losses (B,) and their gradients (B, 3, H, W)."""
        first = self.step == 0
        better = first | (loss > self.best_loss)
        self.gradient = gradient
        self.best = torch.where(per_image(better), self.adversarial, self.best)
        self.best_gradient = torch.where(per_image(better), gradient, self.best_gradient)
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_loss_at_check = torch.where(first, loss, self.best_loss_at_check)
        rounded = loss.float()  # the reference code keeps the losses in float32
        self.rises = self.rises + (~first & (rounded > self.last_loss))
        self.last_loss = torch.where(first, self.last_loss, rounded)

    def advance(self, eps: float, periods: Tensor) -> None:
        """One gradient step of every row. Before it, checks the step size of each row that is due (``check_periods``).

        The step size is halved, and the row continues from its best image, if at most 3/4 of the period's steps raised
        the loss, or if the best loss did not rise in the period and the step size was not halved before it.
        """
        period = periods[self.step]
        due = period > 0
        idle = ~self.halved & (self.best_loss_at_check >= self.best_loss)
        halve = due & ((self.rises <= 0.75 * period) | idle)
        self.halved = torch.where(due, halve, self.halved)
        self.best_loss_at_check = torch.where(due, self.best_loss, self.best_loss_at_check)
        self.rises = self.rises.masked_fill(due, 0)
        self.step_size = torch.where(halve, self.step_size / 2, self.step_size)
        now = torch.where(per_image(halve), self.best, self.adversarial)
        gradient = torch.where(per_image(halve), self.best_gradient, self.gradient)
        climbed = into_ball(now + per_image(self.step_size) * gradient.sign(), self.pixel_values, eps)
        # 0.75 of the gradient step plus 0.25 of the previous movement; the first step has no previous one.
        keep = per_image(torch.where(self.step == 0, 1.0, 0.75).to(now))
        moved = now + (climbed - now) * keep + (now - self.previous) * (1 - keep)
        self.previous, self.adversarial = now, into_ball(moved, self.pixel_values, eps)
        self.step = self.step + 1


def check_periods(num_steps: int) -> Tensor:
    """When APGD checks its step size: first after 0.22 n steps; each period is 0.03 n shorter, but at least 0.06 n.

    -> (n + 1,) int64: the length of the period that ends at step i, else 0.
    """
    periods = torch.zeros(num_steps + 1, dtype=torch.int64)
    period, shorter, shortest = (max(int(share * num_steps), 1) for share in (0.22, 0.03, 0.06))
    step = period
    while step <= num_steps:
        periods[step] = period
        period = max(period - shorter, shortest)
        step += period
    return periods


def loss_and_gradient(logits_fn: Logits, runs: Runs) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, C), losses (B,) and the gradient of the losses' sum, at the runs' ``adversarial``. One forward pass.

    The loss is maximised: the cross-entropy if the target is -1, else the targeted loss.
    """
    adversarial = runs.adversarial.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_fn(adversarial)
        plain = F.cross_entropy(logits, runs.labels, reduction="none")
        # Compute both losses for every row: they cost little, and asking which is needed would wait for the device.
        loss = torch.where(runs.targets < 0, plain, targeted_loss(logits, runs.labels, runs.targets.clamp_min(0)))
        (gradient,) = torch.autograd.grad(loss.sum(), adversarial)
    return logits.detach(), loss.detach(), gradient


@dataclass
class Point:
    """An image under attack and the state of its runs. Runs begin in order, and the first one to break it counts."""

    position: int
    pixel_values: Tensor  # (3, H, W)
    label: int
    targets: list[int]  # one per run: -1 for cross-entropy, then classes, the likeliest first
    open: set[int] = field(default_factory=set)  # runs in progress
    spent: list[int] = field(default_factory=list)  # forward passes of each run that has begun
    flat: set[int] = field(default_factory=set)  # targeted runs with a zero gradient at the start
    broken_by: int | None = None  # the first run that broke it
    predicted: int = -1
    adversarial: Tensor | None = None  # the image that broke it, or the last run's best, (3, H, W)

    @property
    def forwards(self) -> int:
        """Forward passes up to the run that broke the image, or of all runs."""
        return sum(self.spent if self.broken_by is None else self.spent[: self.broken_by + 1])

    @property
    def zero_gradient(self) -> bool:
        return any(self.broken_by is None or run <= self.broken_by for run in self.flat)

    @property
    def decided(self) -> bool:
        return not self.open and (self.broken_by is not None or len(self.spent) == len(self.targets))

    @property
    def may_run_ahead(self) -> bool:
        """Whether the next run may begin early: an image that withstood the first two will likely need all runs."""
        return 1 < len(self.spent) < len(self.targets) and not {0, 1} & self.open and self.broken_by is None

    def begin_run(self) -> Owner:
        self.open.add(len(self.spent))
        self.spent.append(0)
        return self, len(self.spent) - 1


Owner = tuple[Point, int]  # the point and the run in a row


def make_points(
    positions: Sequence[int], pixel_values: Tensor, labels: Tensor, logits: Tensor, num_targets: int = NUM_TARGETS
) -> list[Point]:
    """Points for ``run_apgd`` from correctly classified images and their clean logits (B, C).

    First APGD-CE, then APGD-T towards the ``num_targets`` likeliest other classes, or all others if there are fewer.
    """
    likeliest = logits.scatter(1, labels[:, None], float("-inf")).argsort(dim=1, descending=True, stable=True)
    targets = likeliest[:, : min(num_targets, logits.shape[1] - 1)].tolist()
    rows = zip(positions, pixel_values, labels.tolist(), targets, strict=True)
    # Copy: a view would keep its whole batch in memory as long as the point exists.
    return [Point(position, x.clone(), label, [-1, *classes]) for position, x, label, classes in rows]


@torch.no_grad()
def run_apgd(
    points: Iterable[Point],
    logits_fn: Logits,
    *,
    eps: float,
    num_steps: int = 100,
    batch_size: int,
    seed: int = 0,
    judge: Logits | None = None,
) -> Iterator[Point]:
    """APGD-CE and APGD-T on a stream of points, in full batches: a broken point leaves at once and a new one enters.

    Rows of one batch may be in different runs at different steps. When no new point is left, free rows take further
    runs of points that withstood the first two. If several runs of a point go on in parallel, the first in order
    decides. Up to rounding, nothing depends on the batch: a run depends only on (seed, the point's position, run).

    Args:
        points: taken when rows become free; ``Point.pixel_values`` on the device of the model.
        logits_fn: the attacked function, in any precision. Call within ``frozen(module)``.
        eps: radius, as a fraction of the pixel range.
        batch_size: rows per forward pass.
        judge: float32 logits, if ``logits_fn`` is not float32. A point is broken only if ``judge`` agrees; the best
            image of every run is judged too. By default ``logits_fn`` is the judge.

    Yields the points in the order in which they are decided.
    Source: Croce and Hein 2020 (arXiv 2003.01690), algorithm 1; tests compare it with their code step by step.
    """
    points = iter(points)
    under_attack: list[Point] = []
    runs: Runs | None = None
    owners: list[Owner] = []
    free: list[int] = []  # rows whose run has ended
    periods = check_periods(num_steps)
    while True:
        entering = _next_runs(points, under_attack, batch_size - len(owners) + len(free))
        runs, owners = _exchange(runs, owners, free, entering, eps, seed)
        if runs is None:
            return
        logits, loss, gradient = loss_and_gradient(logits_fn, runs)
        runs.observe(loss, gradient)
        flat = (runs.step == 0) & (runs.targets >= 0) & (gradient.flatten(1).abs().amax(dim=1) == 0)
        predicted = logits.argmax(dim=1)
        ended = runs.step == num_steps
        if judge is not None:
            predicted = _judged(judge, runs, predicted, ended, owners)
        # One synchronisation with the device per forward pass: the host decides which rows end.
        table = torch.stack([predicted, (predicted != runs.labels).long(), ended.long(), flat.long()]).tolist()
        free = []
        for row, ((point, run), guess, broken, over, zero) in enumerate(zip(owners, *table)):
            point.spent[run] += 1
            if zero:
                point.flat.add(run)
            if broken and (point.broken_by is None or run < point.broken_by):
                point.broken_by, point.predicted, point.adversarial = run, guess, runs.adversarial[row].clone()
            elif over and run + 1 == len(point.targets) and point.broken_by is None:
                point.predicted, point.adversarial = guess, runs.best[row].clone()
            if broken or over:
                free.append(row)
        # A broken point needs no later runs. Earlier ones go on: if one of them breaks the point too, it counts.
        for row, (point, run) in enumerate(owners):
            if point.broken_by is not None and run > point.broken_by and row not in free:
                free.append(row)
        for row in free:
            point, run = owners[row]
            point.open.discard(run)
        yield from [point for point in under_attack if point.decided]
        under_attack = [point for point in under_attack if not point.decided]
        periods = periods.to(runs.labels.device)
        runs.advance(eps, periods)


def _next_runs(points: Iterator[Point], under_attack: list[Point], places: int) -> list[Owner]:
    """Runs for the free rows: next runs of points between two runs, then new points, then runs that begin early."""
    waiting = [point for point in under_attack if not point.open][:places]
    new = list(itertools.islice(points, places - len(waiting)))
    under_attack += new
    entering = [point.begin_run() for point in (*waiting, *new)]
    while len(entering) < places and (ahead := [point for point in under_attack if point.may_run_ahead]):
        entering += [point.begin_run() for point in ahead[: places - len(entering)]]
    return entering


def _exchange(
    runs: Runs | None, owners: list[Owner], free: Sequence[int], entering: list[Owner], eps: float, seed: int
) -> tuple[Runs | None, list[Owner]]:
    """Puts ``entering`` into the ``free`` rows, then at the end; removes rows that stay free. None if none is left."""
    if not (free or entering):
        return runs, owners
    everyone = owners + entering
    new = range(len(owners), len(everyone))
    taken = dict(zip(free, new))
    rows = [taken.get(row, row) for row in range(len(owners)) if row in taken or row not in free]
    rows += new[len(taken) :]
    if not rows:
        return None, []
    parts = [] if runs is None else [runs]
    if entering:
        pixel_values = torch.stack([point.pixel_values for point, _ in entering])
        labels = torch.tensor([point.label for point, _ in entering], device=pixel_values.device)
        targets = torch.tensor([point.targets[run] for point, run in entering], device=pixel_values.device)
        seeds = [seed_from("apgd", seed, point.position, run) for point, run in entering]
        parts.append(Runs.begin(pixel_values, labels, targets, sphere_start(pixel_values, eps, seeds), eps))
    columns = [torch.cat([getattr(part, column.name) for part in parts]) for column in fields(Runs)]
    index = torch.tensor(rows, device=columns[0].device)
    return Runs(*(column[index] for column in columns)), [everyone[row] for row in rows]


def _judged(judge: Logits, runs: Runs, predicted: Tensor, ended: Tensor, owners: list[Owner]) -> Tensor:
    """The judge's predictions, only for rows that the attack calls broken and for the best images of ended runs."""
    found = runs.labels.clone()

    def ask(rows: Tensor) -> None:
        rows = rows.nonzero()[:, 0]
        if len(rows):
            found[rows] = judge(runs.adversarial[rows]).argmax(dim=1)
        for row in rows.tolist():
            point, run = owners[row]
            point.spent[run] += 1

    ask(predicted != runs.labels)
    last = ended & (found == runs.labels)
    runs.adversarial = torch.where(per_image(last), runs.best, runs.adversarial)
    ask(last)
    return found
