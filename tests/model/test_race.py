"""Races between ways to compute the same."""

from collections.abc import Callable

import pytest

from gptcli.model.race import race


class Clock:
    """Stands still but for what `spend` adds, in milliseconds. Nobody else runs."""

    def __init__(self) -> None:
        self.clock = self.processor = 0.0
        self.switches = 0

    def perf_counter(self) -> float:
        return self.clock

    def process_time(self) -> float:
        return self.processor

    def spend(self, clock: float, processor: float | None = None) -> Callable[[], None]:
        def work() -> None:
            self.clock += clock / 1000
            self.processor += (clock if processor is None else processor) / 1000

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("gptcli.model.race.time", made)
    monkeypatch.setattr("gptcli.model.race._switches", lambda: made.switches)
    return made


def test_only_a_clear_winner_beats_the_default(clock: Clock) -> None:
    """Bug: noise decides, and two fresh runs choose differently."""

    def winner(default: float, other: float, processor: float | None = None) -> str:
        contestants = {"default": clock.spend(default), "other": clock.spend(other, processor)}
        return race(contestants, "default").winner

    assert winner(1.0, 0.8) == "other"
    assert winner(1.0, 0.85) == "default"
    assert winner(1.0, 2.0) == "default"
    assert winner(1.0, 0.5, processor=0.9) == "default"  # faster by others' leave only


def test_the_least_time_counts(clock: Clock) -> None:
    """Bug: one slow turn on a busy machine loses the race."""
    turns = iter([5.0, 1.0, 5.0])
    found = race({"a": lambda: clock.spend(next(turns))(), "b": clock.spend(2.0)}, "b")
    assert found.seconds == pytest.approx({"a": 0.001, "b": 0.002})
    assert (found.winner, found.fair) == ("a", True)


def test_turns(clock: Clock) -> None:
    """Bug: one contestant runs all its rounds before the next, and so in other weather."""
    turns: list[str] = []
    contestants = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}
    race(contestants, "a", rounds=2)
    assert turns == ["a", "b", "a", "b"]


def test_calls_that_others_disturbed_do_not_count(clock: Clock) -> None:
    """Bug: what a busy machine showed is taken for the kernels' speed, and remembered for ever."""
    turns = iter([30.0, 1.0, 1.0, 1.0])

    def disturbed_once() -> None:
        milliseconds = next(turns)
        clock.switches += 9 if milliseconds == 30.0 else 1
        clock.spend(milliseconds)()

    found = race({"a": clock.spend(2.0), "b": disturbed_once}, "a")
    assert (found.winner, found.fair) == ("b", True)

    def always_disturbed() -> None:
        clock.switches += 9
        clock.spend(1.0)()

    found = race({"a": clock.spend(2.0), "b": always_disturbed}, "a")
    assert (found.winner, found.fair) == ("a", False)


def test_time_is_bounded(clock: Clock) -> None:
    """Bug: a large model waits for a race longer than the winner can ever save."""
    calls: list[str] = []

    def slow(name: str) -> Callable[[], None]:
        return lambda: (calls.append(name), clock.spend(2000.0)())[1]

    race({"a": slow("a"), "b": slow("b")}, "a")
    assert calls == ["a", "b"]
