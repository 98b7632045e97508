"""APGD (Croce and Hein 2020): the attack of an evaluation, with restarts, targets and a step size that adapts."""

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

    -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12) with z sorted downwards: blind to the scale of the logits. It
    needs 4 classes; with fewer the loss is the margin z_t - z_y. Source: Croce and Hein 2020 (arXiv 2003.01690), eq. 7.
    """
    margin = (logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None]))[:, 0]
    if logits.shape[1] < 4:
        return -margin
    top = logits.topk(4, dim=1).values
    return -margin / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def sphere_start(pixel_values: Tensor, eps: float, seeds: Sequence[int]) -> Tensor:
    """x + eps * u / max|u|, u uniform in [-1, 1], clamped to [0,1]: (B, 3, H, W) -> the same. Row i has ``seeds[i]``.

    Drawn on the CPU, so that every device starts from the same points.
    """
    noise = torch.empty(pixel_values.shape)
    generator = torch.Generator()
    for sample, seed in zip(noise, seeds, strict=True):
        sample.uniform_(-1, 1, generator=generator.manual_seed(seed))
    noise = (noise / (noise.abs().amax(dim=(1, 2, 3), keepdim=True) + 1e-12)).to(pixel_values)
    return (pixel_values + eps * noise).clamp(0.0, 1.0)


def into_ball(adversarial: Tensor, pixel_values: Tensor, eps: float) -> Tensor:
    """The nearest allowed image: clamped to [x - eps, x + eps], then to [0,1]."""
    return adversarial.clamp(pixel_values - eps, pixel_values + eps).clamp_(0.0, 1.0)


def per_image(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


@dataclass
class Runs:
    """Runs of APGD side by side, a row each, every row at its own step, so that one may leave and another enter.

    Images and gradients are (B, 3, H, W) in the pixels' dtype, numbers (B,).
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
        """Runs before their first forward; ``start``: (B, 3, H, W) in [0,1], inside the ball."""
        zeros, no_gradient = torch.zeros(len(labels), device=labels.device), torch.zeros_like(pixel_values)
        no_loss, halved = zeros.to(pixel_values.dtype), torch.ones_like(labels, dtype=torch.bool)
        # Nothing below changes a tensor in place, so that rows may begin with the same one.
        return cls(
            *(pixel_values, labels, targets, start, start, no_gradient, start, no_gradient, no_loss, no_loss),
            *(zeros, zeros, halved, torch.zeros_like(labels), torch.full_like(zeros, 2 * eps)),
        )

    def observe(self, loss: Tensor, gradient: Tensor) -> None:
        """Takes in what the forward at ``adversarial`` found: losses (B,) and their gradients (B, 3, H, W)."""
        first = self.step == 0
        better = first | (loss > self.best_loss)
        self.gradient = gradient
        self.best = torch.where(per_image(better), self.adversarial, self.best)
        self.best_gradient = torch.where(per_image(better), gradient, self.best_gradient)
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_loss_at_check = torch.where(first, loss, self.best_loss_at_check)
        rounded = loss.float()  # the reference keeps the losses of the steps in float32
        self.rises = self.rises + (~first & (rounded > self.last_loss))
        self.last_loss = torch.where(first, self.last_loss, rounded)

    def advance(self, eps: float, periods: Tensor) -> None:
        """One gradient step of every row, after the check of its step size where one is due.

        ``periods``: of ``check_periods``. The step is halved, and goes on from the best point, where at most 3/4 of the
        period's steps rose, or where the period found nothing better and the step was not halved before it.
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
        # 0.75 of the step and 0.25 of the movement before it; the first step has none before it.
        keep = per_image(torch.where(self.step == 0, 1.0, 0.75).to(now))
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
    """Logits (B, C), losses (B,) and the gradient of the losses' sum, at the runs' ``adversarial``. One forward.

    The loss, maximised, is the cross-entropy where ``targets`` is -1, else the targeted one.
    """
    adversarial = runs.adversarial.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_fn(adversarial)
        plain = F.cross_entropy(logits, runs.labels, reduction="none")
        # Both for every row: they cost nothing beside a forward, and asking which is needed would wait for the device.
        loss = torch.where(runs.targets < 0, plain, targeted_loss(logits, runs.labels, runs.targets.clamp_min(0)))
        (gradient,) = torch.autograd.grad(loss.sum(), adversarial)
    return logits.detach(), loss.detach(), gradient


@dataclass
class Point:
    """An image under attack, and its way through the runs: they begin in order, and the first that breaks it counts."""

    position: int
    pixel_values: Tensor  # (3, H, W)
    label: int
    targets: list[int]  # of the runs in turn: -1 for cross-entropy, then classes, the likeliest first
    open: set[int] = field(default_factory=set)  # runs that have begun and go on
    spent: list[int] = field(default_factory=list)  # forwards of each run that has begun
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
        return not self.open and (self.broken_by is not None or len(self.spent) == len(self.targets))

    @property
    def may_run_ahead(self) -> bool:
        """Outlasted the first two runs, so that nearly surely every run is needed: the next may begin beside others."""
        return 1 < len(self.spent) < len(self.targets) and not {0, 1} & self.open and self.broken_by is None

    def begin_run(self) -> Owner:
        self.open.add(len(self.spent))
        self.spent.append(0)
        return self, len(self.spent) - 1


Owner = tuple[Point, int]  # point and run of a row


def make_points(
    positions: Sequence[int], pixel_values: Tensor, labels: Tensor, logits: Tensor, num_targets: int = NUM_TARGETS
) -> list[Point]:
    """Points for ``run_apgd`` from correctly classified images and their clean logits (B, C).

    APGD-CE, then APGD-T towards the ``num_targets`` likeliest other classes, or all others where there are fewer.
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

    Rows of one batch may be in different runs at different steps. When no new point is left, free places go to further
    runs of points that have outlasted the first two. Of several runs side by side the first in order decides, so that
    nothing depends on the batch, up to rounding: what a point meets depends on (seed, its position, run) alone.

    Args:
        points: taken as places get free; ``Point.pixel_values`` on the device of the model.
        logits_fn: attacked, in whatever precision. Call within ``frozen(module)``.
        eps: radius, as a share of the pixel range.
        batch_size: forwards at a time.
        judge: float32 logits, where ``logits_fn`` is not float32: a point is broken once ``judge`` agrees; the best
            try of every run is judged too. Without it ``logits_fn`` is the judge.

    Yields the points, in the order in which they are decided.
    Source: Croce and Hein 2020 (arXiv 2003.01690), algorithm 1; equal to their code step by step (tests).
    """
    points = iter(points)
    under_attack: list[Point] = []
    runs: Runs | None = None
    owners: list[Owner] = []
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
    """The runs that fill free places: of points between two runs, of new points, then of points further runs ahead."""
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
    """Puts ``entering`` in the ``free`` rows, then behind the others; takes out rows that stay free. None: no row."""
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
    """``predicted`` by the judge, who is asked where the attack claims to have won, and of the best try of a run."""
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
