"""APGD (Croce and Hein 2020): the attack of an evaluation, with restarts, targets and a step size that adapts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.methods.attacks import Logits, seed_from

NUM_TARGETS = 9


def targeted_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The targeted difference of logits ratio, maximised: (B, C), (B,) int64, (B,) int64 -> (B,), dtype of the logits.

    -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12) with z sorted downwards: blind to the scale of the logits. With
    fewer than 4 classes, where it is undefined, the margin z_t - z_y.
    Source: Croce and Hein 2020 (arXiv 2003.01690), equation 7.
    """
    margin = (logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None]))[:, 0]
    if logits.shape[1] < 4:
        return -margin
    top = logits.topk(4, dim=1).values
    return -margin / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def attack_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy where ``targets`` is -1, the targeted loss elsewhere: (B, C), (B,), (B,) -> (B,). Maximised."""
    plain = F.cross_entropy(logits, labels, reduction="none")
    # Both for every row: they cost nothing beside a forward, and asking which is needed would wait for the device.
    return torch.where(targets < 0, plain, targeted_loss(logits, labels, targets.clamp_min(0)))


def sphere_start(pixel_values: Tensor, eps: float, seeds: Sequence[int]) -> Tensor:
    """x + eps * u / max|u| with u uniform in [-1, 1], clamped to [0,1]; row i is drawn from its own ``seeds[i]``.

    Drawn on the CPU, so that every device starts from the same points. (B, 3, H, W) -> the same.
    """
    noise = torch.empty(pixel_values.shape)
    generator = torch.Generator()
    for sample, seed in zip(noise, seeds, strict=True):
        sample.uniform_(-1, 1, generator=generator.manual_seed(seed))
    noise = (noise / (noise.abs().amax(dim=(1, 2, 3), keepdim=True) + 1e-12)).to(pixel_values)
    return (pixel_values + eps * noise).clamp(0.0, 1.0)


def into_ball(adversarial: Tensor, pixel_values: Tensor, eps: float) -> Tensor:
    """The nearest allowed image: adversarial clamped to [x - eps, x + eps], then to [0,1]."""
    return adversarial.clamp(pixel_values - eps, pixel_values + eps).clamp_(0.0, 1.0)


@dataclass
class Runs:
    """Runs of APGD side by side, a row each; every row is at a step of its own, so that one may leave and another enter.

    Tensors (B, 3, H, W) of images and gradients in the pixels' dtype, and (B,) of numbers.
    """

    pixel_values: Tensor
    labels: Tensor  # int64
    targets: Tensor  # int64, -1: cross-entropy
    adversarial: Tensor  # where the next forward looks
    previous: Tensor  # where the one before looked
    gradient: Tensor  # at ``adversarial``
    best: Tensor  # of the highest loss so far
    best_gradient: Tensor
    best_loss: Tensor
    best_loss_at_check: Tensor
    last_loss: Tensor  # float32, zero before the first step: the first check compares with that
    rises: Tensor  # steps since the last check that raised the loss
    halved: Tensor  # bool, at the last check; true before the first
    step: Tensor  # int64, gradient steps made
    step_size: Tensor  # float32

    @classmethod
    def begin(cls, pixel_values: Tensor, labels: Tensor, targets: Tensor, start: Tensor, eps: float) -> Runs:
        zeros = torch.zeros(len(labels), device=labels.device)
        return cls(
            pixel_values=pixel_values,
            labels=labels,
            targets=targets,
            adversarial=start,
            previous=start.clone(),
            gradient=torch.zeros_like(pixel_values),
            best=start.clone(),
            best_gradient=torch.zeros_like(pixel_values),
            best_loss=zeros.to(pixel_values.dtype),
            best_loss_at_check=zeros.to(pixel_values.dtype),
            last_loss=zeros,
            rises=zeros.clone(),
            halved=torch.ones_like(labels, dtype=torch.bool),
            step=torch.zeros_like(labels),
            step_size=torch.full_like(zeros, 2 * eps),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def select(self, rows: Tensor) -> Runs:
        return Runs(*(tensor[rows] for tensor in self.tensors()))

    def join(self, others: Runs) -> Runs:
        return Runs(*map(torch.cat, zip(self.tensors(), others.tensors())))

    def replace(self, rows: Tensor, others: Runs) -> None:
        for tensor, new in zip(self.tensors(), others.tensors()):
            tensor[rows] = new

    def observe(self, loss: Tensor, gradient: Tensor) -> None:
        """Takes in what the forward at ``adversarial`` found: (B,) losses and their gradients (B, 3, H, W)."""
        first = self.step == 0
        better = first | (loss > self.best_loss)
        image = better.view(-1, 1, 1, 1)
        self.gradient = gradient
        self.best = torch.where(image, self.adversarial, self.best)
        self.best_gradient = torch.where(image, gradient, self.best_gradient)
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_loss_at_check = torch.where(first, loss, self.best_loss_at_check)
        rounded = loss.float()  # the reference keeps the losses of the steps in float32
        self.rises = self.rises + (~first & (rounded > self.last_loss))
        self.last_loss = torch.where(first, self.last_loss, rounded)

    def advance(self, eps: float, periods: Tensor) -> None:
        """One gradient step of every row, after the check of its step size where one is due.

        ``periods``: (num_steps + 1,), the steps since the last check where step i is followed by one, else 0. The step is
        halved, from the best point on, where at most 3/4 of the steps rose, or where nothing was found since the last check
        and the step was not halved then.
        """
        period = periods[self.step]
        due = period > 0
        idle = ~self.halved & (self.best_loss_at_check >= self.best_loss)
        halve = due & ((self.rises <= 0.75 * period) | idle)
        self.halved = torch.where(due, halve, self.halved)
        self.best_loss_at_check = torch.where(due, self.best_loss, self.best_loss_at_check)
        self.rises = self.rises.masked_fill(due, 0)
        self.step_size = torch.where(halve, self.step_size / 2, self.step_size)
        image = halve.view(-1, 1, 1, 1)
        now = torch.where(image, self.best, self.adversarial)
        gradient = torch.where(image, self.best_gradient, self.gradient)
        climbed = into_ball(now + self.step_size.view(-1, 1, 1, 1) * gradient.sign(), self.pixel_values, eps)
        # 0.75 of the step and 0.25 of the movement before it; the first step has none before it.
        keep = torch.where(self.step == 0, 1.0, 0.75).to(now).view(-1, 1, 1, 1)
        moved = now + (climbed - now) * keep + (now - self.previous) * (1 - keep)
        self.previous, self.adversarial = now, into_ball(moved, self.pixel_values, eps)
        self.step = self.step + 1


def check_periods(num_steps: int) -> Tensor:
    """Where APGD checks its step size: 0.22 n steps after the start, then every 0.03 n fewer, at least 0.06 n.

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
    """Logits (B, C), losses (B,) and the gradient of the losses' sum, at the runs' ``adversarial``. One forward."""
    adversarial = runs.adversarial.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_fn(adversarial)
        loss = attack_loss(logits, runs.labels, runs.targets)
        (gradient,) = torch.autograd.grad(loss.sum(), adversarial)
    return logits.detach(), loss.detach(), gradient


class Attacked(NamedTuple):
    """What ``apgd`` found, all (B, ...)."""

    delta: Tensor  # of the highest loss
    loss: Tensor  # there
    broken: Tensor  # bool: some iterate was classified wrongly
    broken_delta: Tensor  # the last such iterate; of the start where there is none


@torch.no_grad()
def apgd(
    logits_fn: Logits,
    pixel_values: Tensor,
    labels: Tensor,
    *,
    eps: float,
    start: Tensor,
    num_steps: int = 100,
    targets: Tensor | None = None,
) -> Attacked:
    """Auto-PGD under an l_inf bound, one run, every image until the last step: the attack as published.

    Gradient ascent with momentum from ``start`` = x + delta; the step begins at 2 eps and is halved where progress stalls.

    Args:
        logits_fn: x -> logits. Call it inside ``frozen(module)``.
        pixel_values: x, (B, 3, H, W), in [0,1], float32 or float64. labels: (B,) int64.
        eps: radius, as a share of the pixel range. start: (B, 3, H, W) in [0,1], inside the ball; ``sphere_start``.
        targets: (B,) int64, the class of the targeted loss; -1 or None: cross-entropy.

    Source: Croce and Hein 2020 (arXiv 2003.01690), algorithm 1; equal to their code step by step (tests).
    """
    targets = torch.full_like(labels, -1) if targets is None else targets
    runs = Runs.begin(pixel_values.detach(), labels, targets, start.clone(), eps)
    periods = check_periods(num_steps).to(labels.device)
    broken, broken_at = torch.zeros_like(labels, dtype=torch.bool), start.clone()
    for step in range(num_steps + 1):
        logits, loss, gradient = loss_and_gradient(logits_fn, runs)
        runs.observe(loss, gradient)
        wrong = logits.argmax(dim=1) != labels
        broken = broken | wrong
        broken_at = torch.where(wrong.view(-1, 1, 1, 1), runs.adversarial, broken_at)
        if step < num_steps:
            runs.advance(eps, periods)
    return Attacked(runs.best - pixel_values, runs.best_loss, broken, broken_at - pixel_values)


@dataclass
class Point:
    """An image under attack, and its way through the runs: they begin in order, and the first that breaks it counts."""

    position: int
    pixel_values: Tensor  # (3, H, W)
    label: int
    targets: list[int]  # of the runs in turn: -1 for cross-entropy, then classes, the likeliest first
    begun: int = 0  # runs that have begun
    open: set[int] = field(default_factory=set)  # of them those that go on
    spent: list[int] = field(default_factory=list)  # forwards of each
    flat: set[int] = field(default_factory=set)  # targeted runs whose start had no gradient at all
    broken_by: int | None = None  # the first run that broke it
    predicted: int = -1
    adversarial: Tensor | None = None  # what broke it, or the best try of the last run, (3, H, W)

    @property
    def forwards(self) -> int:
        """Up to the wrong answer that counts, or of all runs."""
        return sum(self.spent if self.broken_by is None else self.spent[: self.broken_by + 1])

    @property
    def zero_gradient(self) -> bool:
        return any(self.broken_by is None or run <= self.broken_by for run in self.flat)

    @property
    def decided(self) -> bool:
        return not self.open and (self.broken_by is not None or self.begun == len(self.targets))

    def begin_run(self) -> tuple[Point, int]:
        run = self.begun
        self.begun += 1
        self.open.add(run)
        self.spent.append(0)
        return self, run


def make_points(
    positions: Sequence[int], pixel_values: Tensor, labels: Tensor, logits: Tensor, num_targets: int = NUM_TARGETS
) -> list[Point]:
    """Points for ``run_apgd`` from correctly classified images and their clean logits (B, C).

    APGD-CE, then APGD-T towards the ``num_targets`` likeliest other classes; fewer where the set has fewer.
    """
    likeliest = logits.scatter(1, labels[:, None], float("-inf")).argsort(dim=1, descending=True, stable=True)
    targets = likeliest[:, : min(num_targets, logits.shape[1] - 1)].tolist()
    rows = zip(positions, pixel_values, labels.tolist(), targets, strict=True)
    # Copies: a view would keep its whole batch in memory for as long as the point lives.
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
    """APGD-CE and APGD-T on a stream of points, in full batches: who is broken leaves at once, and the next one enters.

    Rows of one batch may be in different runs at different steps. When no new point is left, the free places go to
    further runs of those that have outlasted the first two: nearly all of them will need every run. Of several runs side
    by side the first in order decides, so that nothing depends on the batch: what a point meets depends on (seed, its
    position, run) alone, up to the rounding of other batch shapes.

    Args:
        points: taken as places get free; ``Point.pixel_values`` on the device of the model.
        logits_fn: attacked, in whatever precision. Call within ``frozen(module)``.
        eps: radius, as a share of the pixel range.
        batch_size: forwards at a time.
        judge: float32 logits, where ``logits_fn`` is not float32: a point counts as broken, and leaves, once ``judge``
            agrees; the best try of every run is judged too. Without it ``logits_fn`` itself is the judge.

    Yields:
        the points, in the order in which they are decided.
    """
    points = iter(points)
    under_attack: list[Point] = []
    runs: Runs | None = None
    owners: list[tuple[Point, int]] = []  # point and run of every row
    free: list[int] = []  # rows whose run is over
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
        # One synchronisation with the device per forward: who leaves is decided on the host.
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
        # A later run of a point that is broken is not needed; an earlier one may still show that it breaks first.
        leaving = set(free)
        free += [
            row
            for row, (point, run) in enumerate(owners)
            if row not in leaving and point.broken_by is not None and run > point.broken_by
        ]
        for row in free:
            point, run = owners[row]
            point.open.discard(run)
        decided = [point for point in under_attack if point.decided]
        if decided:
            under_attack = [point for point in under_attack if not point.decided]
            yield from decided
        if len(free) < len(owners):
            periods = periods.to(runs.labels.device)
            runs.advance(eps, periods)


def _next_runs(points: Iterator[Point], under_attack: list[Point], places: int) -> list[tuple[Point, int]]:
    """The runs that fill free places: of points between two runs, of new points, then of points further runs ahead."""
    waiting = [point for point in under_attack if not point.open][:places]
    new = list(itertools.islice(points, places - len(waiting)))
    under_attack += new
    entering = [point.begin_run() for point in (*waiting, *new)]
    while len(entering) < places:
        ahead = [
            point
            for point in under_attack
            if 1 < point.begun < len(point.targets) and not {0, 1} & point.open and point.broken_by is None
        ]
        if not ahead:
            break
        entering += [point.begin_run() for point in ahead[: places - len(entering)]]
    return entering


def _exchange(
    runs: Runs | None,
    owners: list[tuple[Point, int]],
    free: list[int],
    entering: list[tuple[Point, int]],
    eps: float,
    seed: int,
) -> tuple[Runs | None, list[tuple[Point, int]]]:
    """Puts ``entering`` in the ``free`` rows, or behind the others; rows that stay free are taken out. None: no row."""
    if entering:
        begun = _begin_runs(entering, eps, seed)
        device, taken = begun.labels.device, min(len(free), len(entering))
        if runs is not None and taken:
            runs.replace(torch.tensor(free[:taken], device=device), begun.select(torch.arange(taken, device=device)))
            for row, owner in zip(free, entering):
                owners[row] = owner
        if taken < len(entering):
            added = begun.select(torch.arange(taken, len(entering), device=device))
            runs = added if runs is None else runs.join(added)
            owners = owners + entering[taken:]
        free = free[taken:]
    if runs is not None and free:
        left = sorted(set(range(len(owners))) - set(free))
        owners = [owners[row] for row in left]
        runs = runs.select(torch.tensor(left, dtype=torch.int64, device=runs.labels.device)) if left else None
    return runs, owners


def _begin_runs(entering: Sequence[tuple[Point, int]], eps: float, seed: int) -> Runs:
    pixel_values = torch.stack([point.pixel_values for point, _ in entering])
    device = pixel_values.device
    labels = torch.tensor([point.label for point, _ in entering], device=device)
    targets = torch.tensor([point.targets[run] for point, run in entering], device=device)
    seeds = [seed_from("apgd", seed, point.position, run) for point, run in entering]
    return Runs.begin(pixel_values, labels, targets, sphere_start(pixel_values, eps, seeds), eps)


def _judged(judge: Logits, runs: Runs, predicted: Tensor, ended: Tensor, owners: Sequence[tuple[Point, int]]) -> Tensor:
    """``predicted`` as the judge sees it: asked where the attack thinks that it won, and of the best try at a run's end."""
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
    runs.adversarial = torch.where(last.view(-1, 1, 1, 1), runs.best, runs.adversarial)
    ask(last)
    return found
