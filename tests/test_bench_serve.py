"""The load test itself: it must see what is lost, and say what it measured."""

import argparse
import asyncio
from pathlib import Path

import bench_serve
import pytest
from serving import ENDLESS, FOR_EVER, make_model, places, serving

pytest.importorskip("fastapi", reason="the extra serve is not installed")


def test_what_is_lost_is_seen(tmp_path: Path) -> None:
    """Guards: refused requests, and streams without an end, that count as answered."""
    model = make_model(tmp_path / "model")
    arguments = ("--model", str(model), "--max-queue", "0", "--max-tokens", str(ENDLESS))
    with serving(*arguments, before=places(2)) as server:
        well = asyncio.run(bench_serve.load(server.address, 2, 0.4, 10))
        assert well.lost == []
        assert len(well.first) == well.requests >= 2
        assert 0 < well.tokens <= 10 * well.requests
        connections = [server.streaming(**FOR_EVER) for _ in range(2)]
        while server.health()["growing"] < 2:
            pass
        refused = asyncio.run(bench_serve.load(server.address, 2, 0.2, 10))
        assert len(refused.lost) == refused.requests >= 2
        assert "429" in refused.lost[0]
        for connection in connections:
            connection.close()
    given = argparse.Namespace(clients=2, tokens=10)
    text = bench_serve.shown(given, well, well, {"whole": [1.0, 1.25, 1.5]})
    assert "| lost | 0 |" in text
    assert "| together against one by one | 1.0 (asked 4) |" in text
    assert "1.25 (1.00 to 1.50; asked 1.1)" in text


def test_the_engine_that_it_compares_with(tmp_path: Path) -> None:
    """Guards: a ratio of different texts."""
    model = make_model(tmp_path / "model")
    given = argparse.Namespace(model=str(model), tokens=20, rounds=2)
    with serving("--model", str(model)) as server:
        ratios = bench_serve.overhead(given, server.address, stream=True)
    assert len(ratios) == 2
    assert all(0.05 < ratio < 200 for ratio in ratios)
