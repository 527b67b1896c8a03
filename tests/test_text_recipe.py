"""The choices for a text alone, on machines of made-up speed."""

import time
from pathlib import Path

import pytest

from gptcli import text_recipe
from gptcli.config.load import LoadedConfig, load_config
from gptcli.text_recipe import _expect, _fitting, _models, _prompt, _Run
from gptcli.training.unit_costs import UnitCosts

SLOW, FAST = 6e10, 1e14  # operations a second


def choice(
    tokens: int, seconds: float, speed: float = SLOW, asked: LoadedConfig | None = None
) -> _Run:
    asked = asked or load_config(None)
    costs = UnitCosts(1 / speed, 24 / speed)
    return _fitting(
        [_expect(asked, m, 1024, tokens, costs, seconds) for m in _models(asked, tokens)]
    )


@pytest.mark.parametrize("tokens", [3000, 300_000, 30_000_000])
def test_more_time_and_speed_never_give_a_smaller_model(tokens: int) -> None:
    """A sign the wrong way round gives the most patient user the worst model."""
    for speed in (SLOW, FAST):
        weights = [choice(tokens, 10.0**n, speed).weights for n in range(6)]
        assert weights == sorted(weights)
    assert choice(tokens, 60, SLOW).weights <= choice(tokens, 60, FAST).weights


def test_more_text_never_gives_a_smaller_model() -> None:
    """A small text read a hundred times is learned by heart by a large model."""
    weights = [choice(10**n, 3600, FAST).weights for n in range(3, 9)]
    assert weights == sorted(weights)
    assert weights[0] < weights[-1]


def test_runs_end_when_the_text_is_read_enough() -> None:
    """Five minutes on ten thousand tokens are thousands of epochs."""
    run = choice(10_000, 3600)
    assert 0.8 * text_recipe.MOST_EPOCHS < run.epochs <= text_recipe.MOST_EPOCHS
    assert run.tokens == run.steps * run.tokens_per_step
    assert run.steps > 100


def test_repeated_tokens_count_less() -> None:
    """Counted in full, a small text seems to be enough for any model."""
    few, many = choice(100_000, 3600), choice(10**9, 3600)
    assert few.tokens_per_weight < few.tokens / few.weights
    assert many.tokens_per_weight == pytest.approx(many.tokens / many.weights)


def test_blocks_fit_short_texts() -> None:
    """A block longer than the text is refused later, by a message about a number not chosen."""
    for tokens in (1500, 5000, 100_000):
        for model in _models(load_config(None), tokens):
            assert model.block_size <= max(16, tokens // 4)


def test_written_sizes_stay() -> None:
    """The ladder must not offer shapes that contradict --set, nor crash on them."""
    asked = load_config(None, ["model.n_head=8", "model.block_size=48"])
    models = _models(asked, 10**6)
    assert {m.n_head for m in models} == {8}
    assert len(models) > 3
    assert {m.block_size for m in models} == {48}
    assert len(_models(load_config(None, ["model.preset=gpt2"]), 10**6)) == 1
    odd = load_config(None, ["model.n_head=7", "model.n_embd=70"])
    assert [m.n_embd for m in _models(odd, 10**6)] == [70] * len(_models(odd, 10**6))


def test_limits_of_the_user_shorten_the_run() -> None:
    limited = load_config(None, ["training.max_steps=50", "training.max_tokens=70000"])
    run = choice(10**6, 3600, asked=limited)
    assert run.steps <= 50
    assert run.tokens <= 70_000


@pytest.mark.parametrize(
    ("limit", "max_time", "shown"),
    [
        (None, "5m", "until 5m"),
        ("max_time=30s", "30s", "until 30s"),
        ("max_steps=20", None, "until 20 steps"),
        ("max_tokens=70000", None, "until 70,000 tokens"),
        ("max_epochs=3", None, "until 3 epochs"),
    ],
)
def test_the_usual_time_is_no_limit_beside_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str | None,
    max_time: str | None,
    shown: str,
) -> None:
    """A run of 20,000 steps that the user asked for must not end after five minutes."""
    costs = UnitCosts(1 / SLOW, 24 / SLOW)
    monkeypatch.setattr(text_recipe, "unit_costs", lambda *_, **__: costs)
    (tmp_path / "book.txt").write_text("the sun and the moon sing of a river\n" * 1000)
    given = [f"data.train={tmp_path / 'book.txt'}", "schedule.warmup_steps=0"]
    given += [] if limit is None else [f"training.{limit}"]
    plan = text_recipe.plan_text(load_config(None, given), given, time.monotonic())
    assert plan.config.training.max_time == max_time
    assert shown in plan.lines[3]


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("\n\n  First Citizen:\nBefore we", "First Citizen:"),
        ("It is a truth universally acknowledged, that", "It is a truth"),
        ("EMMA\n\nCHAPTER I\n\nEmma Woodhouse, handsome, clever", "Emma Woodhouse,"),
        ("Abc\nDef", "Abc"),
        ("\u6625" * 40, "\u6625" * 25),
    ],
)
def test_prompts(text: str, prompt: str) -> None:
    """A prompt that ends inside a word makes every sample begin with a riddle."""
    assert _prompt(text) == prompt
