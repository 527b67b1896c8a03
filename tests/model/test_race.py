"""Races between ways to compute the same."""

from collections.abc import Callable

from gptcli.model.race import race


def busy(count: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(count):
            pass

    return work


def test_only_a_clear_winner_beats_the_default() -> None:
    """Bug: noise decides, and two fresh runs choose differently."""
    found = race({"slow": busy(400_000), "fast": busy(100_000)}, "slow")
    assert found.winner == "fast"
    assert found.seconds["fast"] < found.seconds["slow"]
    assert race({"a": busy(200_000), "b": busy(190_000)}, "a").winner == "a"
    assert race({"a": busy(100_000), "b": busy(400_000)}, "a").winner == "a"


def test_turns() -> None:
    """Bug: one contestant runs all its rounds before the next, and so in other weather."""
    turns: list[str] = []
    contestants = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}
    race(contestants, "a", rounds=2)
    assert turns == ["a", "b", "a", "b"]
