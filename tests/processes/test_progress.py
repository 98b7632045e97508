"""utils/processes/progress.py without a terminal: a line per report, and never a long silence."""

from __future__ import annotations

import time

import pytest

from utils.processes.progress import RunProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one: a test moves it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_the_reports_and_no_long_silence(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    with RunProgress("LORE", 2000) as progress:
        for done in range(1, 2001):
            clock[0] += 1.0
            progress.update(done, {"loss": 0.5} if done % 500 == 0 else None, report=done % 500 == 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "LORE 5/2000  left 0:33:15"
    assert [line for line in lines if "loss" in line] == [
        "LORE 500/2000  loss 0.5  left 0:25:00",
        "LORE 1000/2000  loss 0.5  left 0:16:40",
        "LORE 1500/2000  loss 0.5  left 0:08:20",
        "LORE 2000/2000  loss 0.5",
    ]
    spoken = [0, *(int(line.split()[1].split("/")[0]) for line in lines)]
    silences = [after - before for before, after in zip(spoken, spoken[1:])]
    assert all(silence <= max(5, done / 20 + 1) for silence, done in zip(silences, spoken[1:]))
    assert len(lines) < 100
    with RunProgress("LORE", 2, enabled=False) as progress:
        clock[0] += 100
        progress.update(2, report=True)
    assert not capsys.readouterr().err


def test_an_evaluation_within_a_run_shows_its_batches(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    with RunProgress("LORE", 10) as progress:
        for _ in progress.within("evaluating pgd", range(4), 4):
            clock[0] += 3.0
        assert progress.fields == {}
    assert capsys.readouterr().err.splitlines() == ["LORE 0/10  evaluating pgd 2/4", "LORE 0/10  evaluating pgd 4/4"]
