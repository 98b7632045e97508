"""Records of the samples that could not be read, and the counter that ends a run if too many are lost."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from utils.errors import UserError
from utils.redaction import printable, without_addresses, without_secrets

logger = logging.getLogger(__name__)

LONGEST_PLACE, LONGEST_DETAIL = 1000, 300  # characters


@dataclass(frozen=True)
class Skipped:
    """A record of lost samples. ``where`` is a shard, or shard#sample. A notice is a record with 0 ``samples``.

    The texts are safe to show and store, whatever a shard holds: tokens are removed, control characters escaped, long
    texts cut. Addresses of objects are removed, so two runs over the same data leave the same records.
    """

    kind: str  # such as "missing shard" or "bad label"
    where: str
    detail: str
    samples: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", without_addresses(self.detail))
        for name, longest in (("where", LONGEST_PLACE), ("detail", LONGEST_DETAIL)):
            text = printable(without_secrets(getattr(self, name)))
            object.__setattr__(self, name, text if len(text) <= longest else f"{text[:longest]} ...")


class BadSample(Exception):
    """A sample that cannot be used: raised while it is read, caught by the data set, which skips it."""

    def __init__(self, kind: str, where: str, detail: str) -> None:
        super().__init__(f"{kind}: {where}: {detail}")
        self.skipped = Skipped(kind, where, detail)


def count_skipped(batches: Iterable[dict[str, Any]], skips: SkipCounter) -> Iterator[dict[str, Any]]:
    """Yields the batches of a loader and adds their samples and losses to ``skips``."""
    for batch in batches:
        skips.add(batch["skipped"])
        skips.seen += len(batch["keys"])
        yield batch


@dataclass(eq=False)
class SkipCounter:
    """Counts skipped samples, reports each kind once, and ends the run if too many are lost.

    Losses found by the index are divided by all of its samples. Losses while reading are divided by the samples
    ``seen``, but by at least 1000, so that one early loss does not end a run. A sample that comes again counts once.
    index: a ``ShardIndex``. num_samples: how many of its samples are read, if not all. report: takes one line; None to
    report nothing.
    """

    index: Any
    max_bad_fraction: float
    report: Callable[[str], None] | None = logger.warning
    num_samples: int | None = None
    seen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._records: dict[tuple[str, str], Skipped] = {}
        self._before = {(record.kind, record.where) for record in self.index.skipped}  # to skip repeats on reopening
        self._reported: set[str] = set()
        for record in self.index.skipped:
            self._report(record)

    def add(self, skipped: Sequence[Skipped]) -> None:
        for record in skipped:
            if (record.kind, record.where) not in self._before:
                self._records.setdefault((record.kind, record.where), record)
                self._report(record)

    def state(self) -> dict[str, Any]:
        """The counts as plain numbers and strings, for ``merge``, an all-gather or a checkpoint."""
        return {"seen": self.seen, "records": [list(astuple(record)) for record in self._records.values()]}

    def merge(self, states: Sequence[dict[str, Any]]) -> SkipCounter:
        """A new counter over all ranks, from the ``state()`` of every rank, this one's included."""
        merged = copy.copy(self)
        merged.seen, merged._records = 0, {}
        for state in states:
            merged.seen += state["seen"]
            merged.add([Skipped(*record) for record in state["records"]])
        return merged

    @property
    def bad_fraction(self) -> float:
        lost_before = sum(record.samples for record in self.index.skipped)
        lost_reading = sum(record.samples for record in self._records.values())
        available = self.index.num_samples
        wanted = available if self.num_samples is None else min(available, self.num_samples)
        return lost_before / max(1, available + lost_before) + lost_reading / max(1, self.seen, min(wanted, 1000))

    def summary(self) -> str:
        """One line per kind; empty if nothing was skipped."""
        lines = []
        for kind, samples, records in self._by_kind():
            more = f" and {len(records) - 1} more" if len(records) > 1 else ""
            count = f"{samples} samples" if samples else f"noted {len(records)} x"
            lines.append(f"{kind}: {count}, {records[0].where}{more} ({records[0].detail})")
        return "\n".join(lines)

    def check(self) -> None:
        """Raises UserError if more than ``max_bad_fraction`` of the samples are lost."""
        if self.bad_fraction <= self.max_bad_fraction:
            return
        parts = []
        for kind, samples, records in self._by_kind():
            first = "; ".join(f"{record.where} ({record.detail})" for record in records[:3])
            more = f"; and {len(records) - 3} more" if len(records) > 3 else ""
            parts.append(f"{samples} samples for {kind}: {first}{more}")
        raise UserError(
            f"--max_bad_fraction {self.max_bad_fraction:g}: {100 * self.bad_fraction:.2f} % of the samples could not "
            f"be used: {' | '.join(parts)}; mend the shards or raise the limit"
        )

    def _by_kind(self) -> Iterator[tuple[str, int, list[Skipped]]]:
        """Yields each kind, the number of samples it cost, and its records."""
        everything = [*self.index.skipped, *self._records.values()]
        for kind in dict.fromkeys(record.kind for record in everything):
            records = [record for record in everything if record.kind == kind]
            yield kind, sum(record.samples for record in records), records

    def _report(self, record: Skipped) -> None:
        if self.report is not None and record.kind not in self._reported:
            self._reported.add(record.kind)
            what = f"{record.kind}: {record.where}: {record.detail}"
            self.report(f"skipped: {what} (said once per kind, all are counted)")
