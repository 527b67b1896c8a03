"""Many texts in one batch: the same as one by one, whatever enters, leaves or is guessed."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_engine import GREEDY, ROLLING, SHAPES, TOKENIZER, random_model

from gptcli import stop
from gptcli.config.model_schema import ModelConfig
from gptcli.generation import engine, reader, recorded
from gptcli.generation.engine import Batch, BatchSize, Request, decode, generate_samples
from gptcli.generation.lookup import Lookup
from gptcli.generation.reader import Reader, shared_prefixes
from gptcli.generation.row import Generated, Row
from gptcli.generation.sampling import Sampling
from gptcli.model import band
from gptcli.model.batch_cache import BatchCache
from gptcli.model.gpt import GPT, initialise
from gptcli.model.packed import OneDnnLinear, quantize

SAMPLED = Sampling(temperature=0.9, top_p=0.9, seed=5, max_new_tokens=30)


@pytest.fixture(autouse=True)
def _no_stop_request() -> Any:
    stop.reset()
    yield
    stop.reset()


def requests_for(model: GPT) -> list[Request]:
    """Prompts of all lengths, some alike, some alike at the start, each with its own settings."""
    block = model.config.block_size
    start = [256, 72, 105, 32, 116]
    prompts = [start, start[:1], [*start, 7, 8, 9], start, [*start, 7, 8, 10, 11], [256] * 30]
    settings = [
        SAMPLED,
        GREEDY,
        replace(SAMPLED, temperature=1.5, top_k=9, top_p=1.0, max_new_tokens=3),
        replace(SAMPLED, repetition_penalty=1.3, seed=6),
        replace(GREEDY, frequency_penalty=0.5, max_new_tokens=17),
        replace(SAMPLED, stop=("e",), max_new_tokens=50),
    ]
    return [
        Request(f"{i}", prompt[:block], sampling, n=1 + i % 3)
        for i, (prompt, sampling) in enumerate(zip(prompts, settings, strict=True))
    ]


def one_by_one(model: GPT, requests: Sequence[Request]) -> list[list[Generated]]:
    return [
        generate_samples(model, TOKENIZER, r.tokens, r.n, r.sampling, prompt=r.prompt)
        for r in requests
    ]


def together(model: GPT, requests: Sequence[Request], **how: Any) -> list[list[Generated]]:
    found = list(decode(model, TOKENIZER, requests, **how))
    assert [number for number, _ in found] == list(range(len(requests)))
    return [samples for _, samples in found]


@pytest.mark.parametrize("shape", [*SHAPES, *ROLLING])
def test_a_batch_equals_one_by_one(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: keys of another row, positions of the longest row, a row that moved or entered
    half-way, settings that spill over. With places for all, and for few."""
    model = random_model(shape)
    requests = requests_for(model)
    expected = one_by_one(model, requests)
    assert together(model, requests) == expected
    monkeypatch.setattr(engine, "MOST_ROWS", 3)
    assert together(model, requests) == expected


def without_counts(found: list[list[Generated]]) -> list[list[Generated]]:
    return [[replace(sample, drafted=0, accepted=0) for sample in samples] for samples in found]


@pytest.mark.parametrize("shape", [*SHAPES, *ROLLING])
def test_speculation_changes_no_text(shape: str) -> None:
    """Guards: keys of refused guesses that stay, a guess taken for a token, a window overrun by
    guesses, sampling that draws another number for a guessed token."""
    model = random_model(shape, std=0.3)  # narrower: it repeats itself, so guesses are right
    requests = requests_for(model)
    found = together(model, requests, speculate=True)
    assert without_counts(found) == one_by_one(model, requests)
    samples = [sample for part in found for sample in part]
    assert all(sample.accepted <= sample.drafted for sample in samples)


@pytest.mark.parametrize("shape", ["rolling", "rolling-linear", "dynamic", "modern"])
def test_guesses_beyond_the_last_token(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a short row filled up to another's guesses past the cache's end or past the length
    from which rotations change, where that overwrites or spoils its keys."""

    def draft(self: Lookup, most: int) -> list[int]:  # many for some rows, few or none for others
        return [7] * (most if self._tokens[0] % 2 else min(most, 1))

    monkeypatch.setattr(Lookup, "draft", draft)
    model = random_model(shape, std=0.3)
    requests = [
        Request("", [start, 5, 9], replace(SAMPLED, max_new_tokens=9 + start % 7), n=2)
        for start in range(70, 76)
    ]
    found = together(model, requests, speculate=True)
    assert without_counts(found) == one_by_one(model, requests)


def test_speculation_leaves_the_distribution_as_it_is() -> None:
    """Guards: guesses that are accepted more, or less, often than they are likely."""
    shape = {**SHAPES["modern"], "block_size": 64, "n_layer": 1}
    model = GPT(ModelConfig(**shape), 4).eval()
    initialise(model, torch.Generator().manual_seed(1))
    model.head.weight.data *= 20.0
    prompt, draws = [0, 1, 0, 1, 0, 1], 3000
    settings = Sampling(seed=3, max_new_tokens=3)
    request = Request("", prompt, settings, n=draws)
    [(_, samples)] = decode(model, TOKENIZER, [request], speculate=True)
    assert sum(sample.accepted for sample in samples) > draws / 20
    with torch.no_grad():
        texts = [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
        logits = model(torch.tensor([[*prompt, *text] for text in texts]))[..., :4]
    steps = logits.double().log_softmax(dim=-1)[:, len(prompt) - 1 : -1]
    expected = steps.gather(2, torch.tensor(texts)[..., None]).sum((1, 2)).exp() * draws
    counts = Counter(tuple(sample.tokens) for sample in samples)
    found = torch.tensor([float(counts[text]) for text in texts])
    common = expected >= 5
    chi_square = float(((found - expected)[common] ** 2 / expected[common]).sum())
    degrees = int(common.sum())
    assert degrees >= 8
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5  # four deviations above its mean


def test_speculation_takes_fewer_steps() -> None:
    """Guards: guesses that are computed and never used."""
    shape = {**SHAPES["modern"], "block_size": 128, "tie_embeddings": True}  # repeats itself
    model = GPT(ModelConfig(**shape), 257).eval()
    initialise(model, torch.Generator().manual_seed(1))
    steps = 0

    def counted(*_: Any) -> None:
        nonlocal steps
        steps += 1

    model.register_forward_hook(counted)
    settings = replace(GREEDY, max_new_tokens=100)
    [[sample]] = together(model, [Request("", [256, 1, 2], settings)], speculate=True)
    assert sample.accepted > 30
    assert steps <= 100 - sample.accepted
    row = sample.to_json()
    assert (row["drafted"], row["accepted"]) == (sample.drafted, sample.accepted)


def test_what_prompts_begin_with_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a prompt read again for each sample, a common beginning for each prompt."""
    model = random_model("modern")
    read = 0
    plain = GPT.hidden

    def counted(self: GPT, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal read
        read += tokens.numel()
        return plain(self, tokens, *rest)

    monkeypatch.setattr(GPT, "hidden", counted)
    beginning = list(range(18))
    settings = replace(GREEDY, max_new_tokens=1)
    prompts = [[*beginning, 40 + i, 60 + i] for i in range(4)]
    monkeypatch.setattr(engine, "MOST_ROWS", 2)  # they enter one after another
    together(model, [Request("", prompt, settings, n=3) for prompt in prompts])
    # The beginning, each prompt's own next to last token, and the last of every sample.
    assert read <= 18 + 4 + 4 * 3
    read = 0
    together(model, [Request("", prompts[0], settings, n=7)])
    assert read <= 19 + 7


def test_a_sample_is_handed_over_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the first of a thousand samples that waits for the last, one that is told twice or
    before those in front of it, one that a stop cut off told as a whole one."""
    model = random_model("modern")
    monkeypatch.setattr(engine, "MOST_ROWS", 3)
    requests = [Request(name, [1, 2], replace(SAMPLED, stop=("e",)), n=8) for name in "ab"]
    told: list[Generated] = []
    first = 0

    def note(sample: Generated) -> None:
        nonlocal first
        told.append(sample)
        if len(told) == 1:
            first = rows

    rows = 0
    step = engine.Batch.step

    def counted(batch: Any) -> bool:
        nonlocal rows
        rows += 1
        if rows == 40:
            stop.request(2)
        return step(batch)

    monkeypatch.setattr(engine.Batch, "step", counted)
    found = list(decode(model, TOKENIZER, requests, on_sample=note))
    done = [s for _, samples in found for s in samples if s.finish_reason != "interrupted"]
    assert told == done
    assert first < 40 <= rows
    assert 1 <= len(done) < 16


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("shape", ["modern-gqa", "gpt2", "banded", "dynamic", "rolling"])
def test_recorded_steps(shape: str, speculate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: work recorded with the lengths, rows or keys of the step that it was made from."""
    model = random_model(shape, std=0.3)
    requests = requests_for(model)[::2]
    expected = one_by_one(model, requests)
    monkeypatch.setitem(recorded._LEAST_STEPS, "cpu", 1)
    monkeypatch.setattr(recorded, "_FIRST_STEPS", 0)
    monkeypatch.setitem(recorded._ROOM_TOKENS, "cpu", 10)
    found = together(model, requests, speculate=speculate, decoder=model)
    assert without_counts(found) == expected
    assert recorded._traced[model]
    again = together(model, requests, speculate=speculate, decoder=model)
    assert again == found  # with the keys of another cache


@pytest.mark.parametrize("kind", ["int8", "fp16", "onednn"])
def test_recorded_packed_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: packed weights that a recorded step cannot hold, or that give other numbers there."""
    model = random_model("gpt2", std=0.3)
    if kind == "onednn":
        for block in model.blocks:
            block.mlp.up = OneDnnLinear(block.mlp.up.weight, block.mlp.up.bias, rows=2)
    else:
        quantize(model, kind)
    request = Request("", [1, 2, 3], replace(SAMPLED, max_new_tokens=12), n=2)
    expected = together(model, [request])
    monkeypatch.setitem(recorded._LEAST_STEPS, "cpu", 1)
    monkeypatch.setattr(recorded, "_FIRST_STEPS", 0)
    assert together(model, [request], decoder=model) == expected
    assert list(recorded._traced[model]) == [(2, 1, 0, False)]  # one program for every length


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("shape", ["modern", "modern-gqa", "gpt2", "sinusoidal-post"])
def test_a_shared_beginning(shape: str, record: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: samples of one prompt that attend to another row's own tokens, to the beginning of a
    prompt that came before, or to one that a window which started again no longer has."""
    model = random_model(shape, std=0.3)
    start, block = [256, 72, 105, 32, 116, 104, 101], model.config.block_size
    settings = replace(SAMPLED, stop=("e",), max_new_tokens=3 * block)
    prompts = [[*start, *range(40, 40 + block // 3)], [*start, 7, 8], [9, 8, 7, 6, 5], [3]]
    requests = [Request("", prompt, settings, n=3) for prompt in prompts]
    expected = one_by_one(model, requests)
    used: list[int] = []
    attend = band._attend_shared
    monkeypatch.setattr(
        band, "_attend_shared", lambda q, k, v, n: used.append(int(n)) or attend(q, k, v, n)
    )
    monkeypatch.setattr(reader, "_LEAST_SHARED_KEYS", 3)
    if record:
        monkeypatch.setitem(recorded._LEAST_STEPS, "cpu", 1)
        monkeypatch.setattr(recorded, "_FIRST_STEPS", 0)
    decoder = model if record else None
    monkeypatch.setattr(engine, "MOST_ROWS", 3)  # they enter one after another
    assert together(model, requests, decoder=decoder) == expected
    for request, right in zip(requests, expected, strict=True):
        used.clear()
        assert together(model, [request], decoder=decoder) == [right]
        assert record or set(used) <= {len(request.tokens) - 1}
        assert record or bool(used) == (len(request.tokens) > 3)
    if record:  # with any number of them
        assert {(3, 1, 0, False), (3, 1, 0, True)} <= set(recorded._traced[model])


def test_a_process_that_runs_for_long_records_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: 30 MB for every number of rows that a server ever has; a single row, for which a
    recorded step gains the most, that comes too late to be recorded."""
    model = random_model("gpt2")
    monkeypatch.setitem(recorded._LEAST_STEPS, "cpu", 1)
    monkeypatch.setattr(recorded, "_FIRST_STEPS", 0)
    monkeypatch.setattr(recorded, "_MOST_TRACED", 3)
    settings = replace(GREEDY, max_new_tokens=5)
    for rows in (2, 3, 4, 5, 6):
        requests = [Request("", [1, 2], settings) for _ in range(rows)]
        assert together(model, requests, decoder=model) == together(model, requests)
    assert [shape[0] for shape in recorded._traced[model]] == [2, 3, 4]
    together(model, [Request("", [1, 2], settings)], decoder=model)
    assert [shape[0] for shape in recorded._traced[model]] == [2, 3, 4, 1]


def test_few_steps_are_not_recorded() -> None:
    """Guards: a short text that waits for a recording which it cannot earn back."""
    model = random_model("gpt2")
    together(model, [Request("", [1, 2], replace(SAMPLED, max_new_tokens=60))], decoder=model)
    assert model not in recorded._traced


def test_a_changing_batch_is_not_recorded() -> None:
    """Guards: a recording for each number of rows, where texts end one after another."""
    model = random_model("gpt2")
    settings = [replace(SAMPLED, max_new_tokens=100 + 4 * i) for i in range(12)]
    together(model, [Request("", [1, 2], s) for s in settings], decoder=model)
    assert len(recorded._traced.get(model, {})) <= 1  # of the first hundred steps


def test_a_model_in_training_is_not_recorded() -> None:
    """Guards: compiled blocks, which a recording does not go through."""
    model = random_model("gpt2")
    generate_samples(model, TOKENIZER, [1, 2], 1, replace(SAMPLED, max_new_tokens=130))
    assert model not in recorded._traced


def test_shared_prefixes() -> None:
    """Guards: groups of prompts with different beginnings share none, or one too long."""
    a, b = tuple(range(10)), tuple(range(50, 60))
    texts = [[*a, 1, 2], [*b, 1], [*a, 1, 3], [*b, 2, 5], [*a[:6], 99, 99], [7]]
    assert shared_prefixes(texts, 4, 100) == [a[:6], b]
    assert shared_prefixes(texts, 4, 5) == [a[:5], b[:5]]
    assert shared_prefixes(texts, 8, 100) == [(*a, 1), b]
    long = (*a[:4], *b, *b)
    others = [[*a, 1], [*a, 2], [*long, 1], [*long, 2]]
    assert {a, long} <= set(shared_prefixes(others, 4, 100))
    assert shared_prefixes([], 1, 5) == shared_prefixes([[1, 2]], 1, 5) == []


def test_streamed_pieces_of_a_batch_join_to_the_texts() -> None:
    """Guards: pieces of one text told as another's."""
    model = random_model("gpt2")
    requests = requests_for(model)
    told: dict[tuple[int, int], str] = {}

    def on_text(request: int, sample: int, piece: str) -> None:
        told[request, sample] = told.get((request, sample), "") + piece

    for number, samples in decode(model, TOKENIZER, requests, on_text=on_text):
        for sample in samples:
            assert told.get((number, sample.sample), "") == sample.text


def test_results_come_as_soon_as_they_are_done() -> None:
    """Guards: the first prompt's texts wait for the last prompt's."""
    model = random_model("gpt2")
    short, long = (replace(GREEDY, max_new_tokens=n) for n in (2, 40))
    seen: list[int] = []
    requests = [Request("", [1], short), Request("", [2], long)]
    results = decode(model, TOKENIZER, requests, on_text=lambda *told: seen.append(told[0]))
    next(results)
    assert seen.count(1) < 10
    assert len(list(results)) == 1


def test_a_stop_request_keeps_what_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: finished texts lost, texts that never began told as empty ones."""
    monkeypatch.setattr(engine, "MOST_ROWS", 2)
    model = random_model("gpt2")
    settings = [replace(GREEDY, max_new_tokens=n) for n in (3, 100, 100)]

    def on_text(request: int, sample: int, piece: str) -> None:
        if request == 1 and len(seen) > 10:
            stop.request(2)
        seen.append(piece)

    seen: list[str] = []
    requests = [Request("", [65 + i], s) for i, s in enumerate(settings)]
    found = dict(decode(model, TOKENIZER, requests, on_text=on_text))
    assert found[0][0].finish_reason == "length"
    assert found[1][0].finish_reason == "interrupted"
    assert found[1][0].tokens
    stop.reset()
    monkeypatch.setattr(engine, "MOST_ROWS", 1)
    seen.clear()
    requests = [requests[0], requests[2], requests[1]]
    found = dict(decode(model, TOKENIZER, requests, on_text=on_text))
    assert set(found) == {0, 1}  # the third had no place


def test_the_cache_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: keys that are copied into a larger cache as texts grow."""
    places: list[int] = []
    plain = BatchCache.begin

    def noted(self: BatchCache, *rest: Any) -> None:
        places.append(self.k[1].data_ptr())
        assert [kept.size(2) for kept in self.k] == [5, 9]  # the windows
        plain(self, *rest)

    monkeypatch.setattr(BatchCache, "begin", noted)
    model = random_model("rolling")
    together(model, [Request("", [1, 2], replace(GREEDY, max_new_tokens=60), 2)])
    assert len(places) == 60
    assert len(set(places)) == 1


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, *ROLLING])
def test_texts_that_come_later_and_texts_that_are_cancelled(shape: str, speculate: bool) -> None:
    """Guards: a batch that ends for good when nothing waits, a cancelled row whose keys or place
    another one gets, a late row that sees the tokens of one before it."""
    model = random_model(shape, std=0.3)
    requests = [replace(request, n=1) for request in requests_for(model)] * 2
    expected = [samples[0] for samples in one_by_one(model, requests)]
    rows = [Row(0, TOKENIZER, r.tokens, r.sampling, None, speculate) for r in requests]
    size = replace(BatchSize.of(model, requests, speculate), rows=4)
    waiting = deque(rows[:3])
    with torch.inference_mode():
        reader = Reader(model, None, size.rows, size.capacity, size.most_new, {})
        batch = Batch(
            model, TOKENIZER, reader, lambda: waiting.popleft() if waiting else None, size
        )
        for step in range(300):
            if step < 90 and step % 10 == 0:
                waiting.extend(rows[3 + step // 10 :][:1])
            if step in (15, 45):
                batch.cancel(rows[(step - 5) // 10])
            batch.step()
        assert not batch.step()
        waiting.append(Row(0, TOKENIZER, requests[0].tokens, requests[0].sampling, None))
        last = waiting[0]
        while batch.step():
            pass
    assert last.result("").text == expected[0].text
    found = [
        without_counts([[row.result(r.prompt)]])[0][0]
        for row, r in zip(rows, requests, strict=True)
    ]
    cancelled = [i for i, sample in enumerate(found) if sample.finish_reason == "interrupted"]
    assert set(cancelled) <= {1, 4}
    assert cancelled
    for i, (sample, whole) in enumerate(zip(found, expected, strict=True)):
        assert sample == whole or (i in cancelled and whole.text.startswith(sample.text))
