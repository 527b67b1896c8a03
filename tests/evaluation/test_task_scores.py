"""Scores of a task with models whose answers are known."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from gptcli import stop
from gptcli.config.finetune_schema import FinetuneConfig
from gptcli.config.model_schema import ModelConfig
from gptcli.data.examples import Example, HeadExample, PreferencePair
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import resolve_device
from gptcli.errors import ConfigError
from gptcli.evaluation import task_scores
from gptcli.evaluation.task_result import TaskScores
from gptcli.evaluation.task_scores import check_scores, score_task
from gptcli.model.gpt import GPT, initialise
from gptcli.model.heads import attach_head

BYTES = Tokenizer.of_bytes()
EOT = 256


def speller(successors: dict[int, int]) -> GPT:
    """A model that always continues token a with successors[a]: one-hot embeddings, blocks that
    add nothing (their output projections are zero), and a head that is the table."""
    config = ModelConfig(n_layer=1, n_head=1, n_embd=258, block_size=16)
    made = GPT(config, BYTES.vocab_size)
    initialise(made, torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.wte.weight.copy_(torch.eye(257, 258))
        made.head.weight.zero_()
        for token, successor in successors.items():
            made.head.weight[successor, token] = 1.0
    return made


# ln p of a speller's successor, and of another token. Its logit is what the norm makes of a one.
LOGIT = (1 / 258 + 1e-6) ** -0.5
NATS = (-math.log1p(256 * math.exp(-LOGIT)), -LOGIT - math.log1p(256 * math.exp(-LOGIT)))


def example(prompt: str, *references: str, choices: tuple[str, ...] = ()) -> Example:
    tokens = [EOT, *prompt.encode(), *references[0].encode(), EOT]
    start = 1 + len(prompt.encode())
    trained = [i >= start for i in range(len(tokens))]
    compared = [[*choice.encode(), EOT] for choice in choices]
    texts = list(references), "f:1", list(choices), compared
    return Example(tokens, trained, start, prompt, *texts)


def score(
    model: GPT, held_out: Any, labels: tuple[str, ...] = (), reference: Any = None, **settings: Any
) -> TaskScores:
    config = FinetuneConfig.model_validate(settings)
    device = resolve_device("cpu")
    return score_task(
        model, BYTES, config.task, held_out, config, labels, device, "fp32", reference=reference
    )


@pytest.mark.parametrize(
    ("response", "most", "right"),
    [
        ("bc", 64, 1.0),
        ("b", 64, 0.0),  # the answer goes on
        ("bcd", 64, 0.0),  # it ends before
        ("bx", 64, 0.0),
        (" bc\n", 64, 1.0),  # blanks around it do not count
        ("bc", 2, 1.0),  # the limit ends it exactly there
        ("bc", 1, 0.0),
    ],
)
def test_one_answer(response: str, most: int, right: float) -> None:
    """Bug: an answer that only begins with the response, or never ends, counts as right."""
    model = speller({ord("a"): ord("b"), ord("b"): ord("c"), ord("c"): EOT})
    assert (
        score(model, [example("a", response)], max_new_tokens=most).values["exact_match"] == right
    )


def test_scores_of_answers() -> None:
    """Bug: answers are paired with other rows, the share is of the wrong whole, or the rows listed
    as the worst are not."""
    model = speller({ord("a"): ord("b"), ord("b"): EOT})
    rows = [example("a", "b"), example("xa", "c", "b"), example("a", "c"), example("b", "b")]
    found = score(model, rows)
    assert found.values == {"exact_match": 0.5, "token_f1": 0.5}
    assert (found.headline, found.rows) == ("exact_match", 4)
    low, high = found.ci95["exact_match"]
    assert 0 <= low < 0.5 < high <= 1
    assert [row["answer"] for row in found.predictions] == ["b", "b", "b", ""]
    assert [row["exact_match"] for row in found.predictions] == [1.0, 1.0, 0.0, 0.0]
    assert found.worst[:2] == found.predictions[2:]
    assert found.predictions[1]["references"] == ["c", "b"]
    json.dumps([found.predictions, found.to_json()])
    entry = found.entries("after")["exact_match"]
    assert entry == {"after": 0.5, "rows": 4, "after_ci95": [low, high]}


def test_corpus_scores() -> None:
    """Bug: a score that is asked for is not taken, or the headline is not the first one."""
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    model = speller({ord("a"): ord("b"), ord("b"): EOT})
    found = score(model, [example("a", "b"), example("a", "c")], scores=["rouge", "chrf", "bleu"])
    assert set(found.values) == {"rouge_1", "rouge_2", "rouge_l", "chrf", "bleu"}
    assert found.headline == "rouge_l"
    assert found.values["rouge_l"] == 0.5
    assert found.predictions[0]["chrf"] == pytest.approx(100)
    assert "chrF" in found.signatures["chrf"] or "nrefs" in found.signatures["chrf"]


def test_programs_run_only_where_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: what a model wrote is run without anybody having allowed it."""
    ran: list[str] = []
    monkeypatch.setattr(task_scores, "code_runs", lambda text: ran.append(text) or "SyntaxError: x")
    settings = FinetuneConfig.model_validate({"scores": ["code_runs"]})
    with pytest.raises(ConfigError) as caught:
        score(speller({}), [example("a", "b")], scores=["code_runs"])
    assert "--allow-code-execution" in (caught.value.hint or "")
    assert ran == []
    check_scores(settings, allow_code=True)
    found = score_task(
        speller({ord("a"): EOT}),
        BYTES,
        "completion",
        [example("a", "b")],
        settings,
        [],
        resolve_device("cpu"),
        "fp32",
        allow_code=True,
    )
    assert ran == [""]
    assert found.values == {"code_runs": 0.0}
    assert found.worst[0]["error"] == "SyntaxError: x"


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"scores": ["exact_match", "bleu"]}, "sacrebleu"),
        ({"scores": ["chrf"]}, "sacrebleu"),
        ({"scores": ["rouge"]}, "rouge_score"),
        ({"task": "classification"}, "sklearn"),
        ({"task": "pairs", "head": False}, "sklearn"),
        ({}, None),
        ({"task": "preference", "scores": ["bleu"]}, None),  # not scored by it
        ({"task": "multiple_choice"}, None),
    ],
)
def test_missing_packages(
    settings: dict[str, Any], package: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a package is found missing after hours of training, or wanted where none is needed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = FinetuneConfig.model_validate(settings)
    if package is None:
        check_scores(config, False)
        return
    with pytest.raises(ConfigError, match=package) as caught:
        check_scores(config, False)
    assert "gptcli[tasks]" in (caught.value.hint or "")


def test_labels_by_a_head() -> None:
    """Bug: probabilities belong to other labels, or the interval and baseline to other rows."""
    pytest.importorskip("sklearn")
    model = speller({})
    attach_head(model, 2)
    with torch.no_grad():
        model.task_head.weight.zero_()
        model.task_head.weight[0, ord("n")] = 1.0  # what the last token says
        model.task_head.weight[1, ord("y")] = 1.0
    texts = [("an", 0), ("by", 1), ("cy", 0), ("dn", 0)]
    rows = [HeadExample([[EOT, *t.encode()]], label, t, t) for t, label in texts]
    found = score(model, rows, ("no", "yes"), task="classification")
    assert found.values["accuracy"] == 0.75
    assert found.baseline == {"accuracy": 0.75}
    assert found.confusion == [[2, 1], [0, 1]]
    assert found.worst[0]["where"] == "cy"
    assert (found.worst[0]["label"], found.worst[0]["predicted"]) == ("no", "yes")
    assert found.predictions[0]["probabilities"]["no"] > 0.5
    assert sum(found.predictions[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    json.dumps([found.predictions, found.to_json()])


def test_choices_by_a_head() -> None:
    """Bug: a choice that a row lacks is taken, or chance is that of the row with the most."""
    model = speller({})
    attach_head(model, 1)
    with torch.no_grad():
        model.task_head.weight.zero_()
        model.task_head.weight[0, ord("y")] = 1.0
    rows = [
        HeadExample([[EOT, ord("n")], [EOT, ord("y")]], 1, "q", "1"),
        HeadExample([[EOT, ord("n")], [EOT, ord("n")], [EOT, ord("y")]], 0, "q", "2"),
    ]
    found = score(model, rows, task="multiple_choice")
    assert found.values == {"accuracy": 0.5}
    assert found.baseline["accuracy"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert [len(row["probabilities"]) for row in found.predictions] == [2, 3]
    assert (found.predictions[1]["label"], found.predictions[1]["predicted"]) == (0, 2)


def test_labels_as_text() -> None:
    """Bug: labels without a head are generated, so that an answer may be none of them, or a label
    that begins another wins always."""
    pytest.importorskip("sklearn")
    # After "a" comes "b" and then eot; after "x" comes "c", and then "c" or eot.
    model = speller({ord("a"): ord("b"), ord("b"): EOT, ord("x"): ord("c"), ord("c"): ord("c")})
    with torch.no_grad():
        model.head.weight[EOT, ord("c")] = 1.0
    labels = ("b", "bc", "ccc")
    rows = [
        example("a", "b", choices=labels),
        example("x", "ccc", choices=labels),
        example("xx", "bc", choices=labels),
        example("y" * 11 + "a", "b", choices=labels),
    ]
    found = score(model, rows, labels, task="classification", head=False)
    assert found.labels == list(labels)
    assert [row["predicted"] for row in found.predictions] == ["b", "ccc", "ccc", "b"]
    assert found.values["accuracy"] == 0.75
    choices = score(model, rows, (), task="multiple_choice", head=False)
    assert choices.values["accuracy"] == 0.75
    assert choices.baseline["accuracy"] == pytest.approx(1 / 3)


def test_choices_by_byte() -> None:
    """Bug: longer choices lose for their length alone where they are compared per byte, or the
    blank before them counts."""
    model = speller({ord("a"): ord(" "), ord(" "): ord("b"), ord("b"): ord("b")})
    choices = (" b", " bbbb", " bc")
    row = example("a", " bbbb", choices=choices)
    tokens = [list(choice.encode()) for choice in choices]
    row = replace(row, choice_tokens=tokens)
    found = score(model, [row, row], task="continuation")
    right, wrong = NATS  # of each token; of c
    nats = [2 * right, 5 * right, 2 * right + wrong]
    assert found.predictions[0]["log_likelihoods"] == pytest.approx(nats, abs=1e-4)
    assert found.values == {"accuracy": 0.0, "accuracy_per_byte": 1.0}
    assert (found.headline, found.predictions[0]["predicted"]) == ("accuracy_per_byte", 1)
    assert found.baseline["accuracy_per_byte"] == pytest.approx(1 / 3)
    json.dumps([found.predictions, found.to_json()])


def test_last_words() -> None:
    """Bug: a word counts as right when its first token is, eot is part of it, or the perplexity is
    by token."""
    model = speller({ord("a"): ord(" "), ord(" "): ord("b"), ord("b"): ord("c")})
    found = score(model, [example("a", " bc"), example("a", " bd")], task="last_word")
    right, wrong = NATS
    nats = [3 * right, 2 * right + wrong]
    assert [row["log_likelihood"] for row in found.predictions] == pytest.approx(nats, abs=1e-4)
    assert [row["answer"] for row in found.predictions] == ["bc", "bc"]
    assert found.values["accuracy"] == 0.5
    expected = math.exp(-sum(nats) / 2)
    assert found.values["last_word_perplexity"] == pytest.approx(expected, rel=1e-4)
    low, high = found.ci95["last_word_perplexity"]
    assert low <= expected * 1.0001
    assert high >= expected * 0.9999


def test_answers_among_examples_end_at_a_blank_line() -> None:
    """Bug: what a model writes behind its answer, the next example, counts as the answer."""
    model = speller({ord("a"): ord("b"), ord("b"): ord("\n"), ord("\n"): ord("\n")})
    assert score(model, [example("a", "b")], shots=1).predictions[0]["answer"] == "b"
    found = score(model, [example("a", "b")], max_new_tokens=2, shots=0)
    assert found.values["exact_match"] == 1.0


def test_preferences() -> None:
    """Bug: the rejected answer wins, the reference has the wrong sign, or ties count as right."""
    model = speller({ord("a"): ord("b")})
    wins = PreferencePair(example("a", "b"), example("a", "c"), 1, "1")
    loses = PreferencePair(example("a", "c"), example("a", "b"), 2, "2")
    ties = PreferencePair(example("a", "c"), example("a", "d"), 3, "3")
    found = score(model, [wins, loses, ties], task="preference")
    assert found.values == {"preference_accuracy": 0.5}
    assert [row["where"] for row in found.worst] == ["2", "3", "1"]
    nats = {row["where"]: -row["chosen_nats"] for row in found.predictions}
    assert nats["1"] > nats["2"]
    # The model before found "b" much likelier still: so all that changed is for the worse.
    reference = {1: (0.0, -40.0), 2: (-40.0, 0.0), 3: (0.0, 0.0)}
    found = score(model, [wins, loses, ties], reference=reference, task="preference")
    assert found.headline == "reward_accuracy"
    assert found.values == {"preference_accuracy": 0.5, "reward_accuracy": 0.5}
    assert [row["where"] for row in found.worst] == ["1", "3", "2"]


def test_text_has_the_share_of_tokens() -> None:
    """Bug: continued pretraining has no score that early stopping can look at."""
    model = speller({ord("a"): ord("b"), ord("b"): ord("a")})
    row = Example([EOT, *b"abac", EOT], [False] + [True] * 5, 1, "", ["abac"], "f:1")
    found = score(model, [row], task="text")
    assert found.values[found.headline] == 0.5  # of a, b, a, c the second and third
    assert not math.isnan(found.values[found.headline])


def test_stop() -> None:
    """Bug: Ctrl-C waits until all answers are generated."""
    stop.request(2)
    with pytest.raises(stop.Stopped):
        score(speller({}), [example("a", "b")])
