"""Rows of every task as tokens: which carry loss, what is cut, skipped or refused."""

from typing import Any

import pytest

from gptcli.config.schema import FinetuneConfig
from gptcli.data.examples import Example, HeadExample, PreferencePair
from gptcli.data.row_fields import RowFields, value_at
from gptcli.data.task_formats import TaskEncoder, row_fields
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError, DataError

EOT = 256  # of the byte tokenizer
ROW = {"prompt": "ab", "response": "xyz"}
BYTES = Tokenizer.of_bytes()


def encoder(block_size: int = 200, labels: tuple[str, ...] = (), **config: Any) -> TaskEncoder:
    return TaskEncoder(FinetuneConfig(**config), BYTES, block_size, labels)


def example(row: dict[str, Any], block_size: int = 200, **config: Any) -> Example:
    """The row as the task has it, after the check that a corpus makes."""
    subject = encoder(block_size, **config)
    assert row_fields(FinetuneConfig(**config)).problem(row) is None
    made = subject.encode(row, "here")
    assert isinstance(made, Example)
    return made


def marked(made: Example) -> str:
    """The tokens as text, ~ for eot, those with loss between brackets."""
    text, inside = "", False
    for token, trained in zip(made.tokens, made.trained, strict=True):
        text += "[" if trained and not inside else "]" if inside and not trained else ""
        text += "~" if token == EOT else chr(token)
        inside = trained
    return text + ("]" if inside else "")


def prompt_of(template: str, row: dict[str, Any]) -> str:
    made = example(row, template=template)
    assert bytes(made.tokens[1 : made.prompt]).decode() == made.prompt_text
    return made.prompt_text


def test_loss_is_on_the_response_and_eot_and_nothing_else():
    """Guards against loss on the prompt, none on the first token of the answer, and a model that
    never learns to stop. The expectation is written by hand."""
    made = example(ROW)
    assert made.tokens == [EOT, *b"abxyz", EOT]
    assert made.trained == [False, False, False, True, True, True, True]
    assert (made.prompt, made.prompt_text, made.references) == (3, "ab", ["xyz"])
    assert marked(example({"prompt": "", "response": "x"})) == "~[x~]"
    assert marked(example(ROW, loss_on="all")) == "~[abxyz~]"


@pytest.mark.parametrize("block_size", range(4, 14))
def test_a_long_prompt_loses_its_beginning(block_size: int):
    """Guards against a cut answer, a cut at the wrong end, a lost start token, and an example that
    is longer or shorter than the model's window allows."""
    subject = encoder(block_size)
    made = subject.encode({"prompt": "abcdefgh", "response": "xyz"}, "here")
    assert isinstance(made, Example)
    kept = max(0, min(8, block_size - 1 - 3))
    assert made.tokens == [EOT, *b"abcdefgh"[8 - kept :], *b"xyz", EOT]
    assert made.prompt == 1 + kept
    assert len(made.tokens) - 1 == min(block_size, 1 + 8 + 3)
    assert subject.counts.shortened == (kept < 8)
    strict = encoder(block_size, too_long="skip")
    assert (strict.encode({"prompt": "abcdefgh", "response": "xyz"}, "here") is None) == (kept < 8)
    assert (strict.counts.shortened, strict.counts.skipped_long) == (0, int(kept < 8))


def test_responses_that_are_empty_or_do_not_fit_are_skipped_and_counted():
    """Guards against answers cut in the middle, empty ones whose loss is 0 / 0, rows that vanish
    without a word, and a limit in characters."""
    subject = encoder(4)
    kept = [
        r
        for r in ("xyz", "wxyz", "", " \n", "x" * 100, "é!", "🙂")
        if subject.encode({"prompt": "a", "response": r}, "here") is not None
    ]
    assert kept == ["xyz", "é!"]
    assert subject.counts.rows == 7
    assert (subject.counts.skipped_empty, subject.counts.skipped_long) == (2, 3)


def test_end_of_text_in_a_row_is_ordinary_text():
    """Guards against a row that can end its own prompt."""
    made = example({"prompt": "<|endoftext|>", "response": "<|endoftext|>"})
    assert made.tokens.count(EOT) == 2


def test_the_template_makes_the_prompt_exactly():
    """Guards against escaped HTML and a lost line end at the template's end."""
    row = {"prompt": "1 < 2 & 'x'", "response": "yes", "context": ["a", "b"]}
    assert prompt_of("Q: {{ prompt }}\nA:\n", row) == "Q: 1 < 2 & 'x'\nA:\n"
    assert prompt_of("{% for c in context %}[{{ c }}]{% endfor %} {{ prompt }}", row) == (
        "[a][b] 1 < 2 & 'x'"
    )


def test_shipped_templates_are_named():
    """Guards against a name that becomes the prompt itself, and a context that is lost."""
    row = {"prompt": "Where?", "response": "here", "context": "It is here."}
    assert prompt_of("question_answering", row) == "It is here.\n\nQuestion: Where?\nAnswer:\n"
    del row["context"]
    assert prompt_of("question_answering_zh", row) == "问题：Where?\n回答：\n"
    with pytest.raises(ConfigError, match="no template is called 'summarization'") as caught:
        encoder(template="summarization")
    assert "summarisation" in str(caught.value.hint)


def test_fields_rename_columns_and_reach_into_them():
    """Guards against fixed column names; the row's own names stay usable beside them."""
    fields = {"prompt": "question", "response": "answers.text"}
    row = {"question": "1+1", "answers": {"text": ["2", "two"]}}
    made = example(row, fields=fields, template="{{ prompt }}={{ question }}?")
    assert (made.prompt_text, made.references) == ("1+1=1+1?", ["2", "two"])
    assert marked(made) == "~1+1=1+1?[2~]"


def test_an_undefined_variable_is_named_with_the_row():
    """Guards against an empty string where a misspelt name stands in the template."""
    with pytest.raises(DataError, match="'promt' is undefined") as caught:
        encoder(template="{{ promt }}").encode({**ROW, "id": 3}, "rows.jsonl:17")
    assert caught.value.message.startswith("rows.jsonl:17: finetune.template: ")
    assert "(has: prompt, response, id)" in caught.value.message


@pytest.mark.parametrize("template", ["{{ prompt", "{% if %}", "{{ prompt|nofilter }}"])
def test_a_wrong_template_is_refused_before_any_row(template: str):
    """Guards against a syntax error found after the model has been loaded and scored."""
    with pytest.raises(ConfigError, match=r"finetune\.template"):
        encoder(template=template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ prompt.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ extra.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ prompt + 1 }}",
    ],
)
def test_a_template_runs_in_a_sandbox(template: str):
    """Guards against a config from the internet that runs code or changes rows, and against its
    errors arriving as a traceback."""
    row = {**ROW, "extra": [0]}
    with pytest.raises(DataError, match=r"here: finetune\.template"):
        encoder(template=template).encode(row, "here")
    assert row["extra"] == [0]


def test_instructions_with_and_without_input():
    """Guards against an empty heading where a row has no input, null or none at all."""
    with_input = example(
        {"instruction": "Add.", "input": "1, 2", "output": "3"}, task="instruction"
    )
    assert with_input.prompt_text.endswith("### Task\nAdd.\n\n### Text\n1, 2\n\n### Answer\n")
    rows: list[dict[str, Any]] = [{"input": ""}, {"input": None}, {}]
    texts = {
        example({"instruction": "Add.", "output": "3", **row}, task="instruction").prompt_text
        for row in rows
    }
    assert texts == {"Below is a task. Do what it asks.\n\n### Task\nAdd.\n\n### Answer\n"}


def test_a_text_is_learned_whole():
    """Guards against loss on the document start, and an end that the model is not shown."""
    assert marked(example({"text": "abc"}, task="text")) == "~[abc~]"
    strict = encoder(4, task="text", too_long="skip")
    assert (strict.encode({"text": "abcdef"}, "here"), strict.counts.skipped_long) == (None, 1)
    assert encoder(task="text").encode({"text": " "}, "here") is None


def test_labels_as_text():
    """Guards against a label that is lost as a number or a truth value in JSON."""
    config: dict[str, Any] = {"task": "classification", "head": False, "template": "{{ text }}:"}
    for value, text in ((3, "3"), (True, "true"), ("yes", "yes"), (2.0, "2")):
        assert marked(example({"text": "a", "label": value}, **config)) == f"~a:[{text}~]"
    subject = encoder(labels=("no", "yes"), **config)
    made = subject.encode({"text": "a", "label": "yes"}, "here")
    assert isinstance(made, Example)
    assert (made.references, made.choices) == (["yes"], ["no", "yes"])
    assert subject.counts.labels == {"no": 0, "yes": 1}
    with pytest.raises(DataError, match=r"f:3: unknown label 'Yes' \(known: no, yes\)"):
        subject.encode({"text": "a", "label": "Yes"}, "f:3")


def head(row: dict[str, Any], block_size: int = 99, **config: Any) -> HeadExample | None:
    made = encoder(block_size, labels=("no", "yes"), **config).encode(row, "here")
    assert made is None or isinstance(made, HeadExample)
    return made


def texts(made: HeadExample | None) -> list[str]:
    assert made is not None
    return [bytes(126 if i == EOT else i for i in s).decode() for s in made.sequences]


def test_sequences_of_a_head():
    """Guards against sequences that are not those of Radford et al. 2018, figure 1. Expectations by
    hand; ~ is the start of a document at the beginning and what the head reads at the end."""
    one = head({"text": "abc", "label": "yes"}, task="classification")
    assert (texts(one), one and one.label) == (["~abc~"], 1)
    pair = {"text1": "ab", "text2": "c", "label": "no"}
    assert texts(head(pair, task="pairs")) == ["~ab\nc~"]
    assert texts(head(pair, task="pairs", pair_order="both")) == ["~ab\nc~", "~c\nab~"]
    row = {"prompt": "p", "choices": ["x", "yy"], "label": 1}
    choice = head(row, task="multiple_choice")
    assert (texts(choice), choice and choice.label) == (["~p\nx~", "~p\nyy~"], 1)
    assert texts(head({"text": "abc", "label": "no"}, task="classification", template="<{{text}}"))[
        0
    ] == ("~<abc~")


@pytest.mark.parametrize("block_size", range(6, 14))
def test_texts_of_a_head_lose_their_beginnings(block_size: int):
    """Guards against a sequence longer than the window, one whose end the head does not see, and a
    short text that is cut because the other one is long."""
    one = head({"text": "abcdefgh", "label": "no"}, block_size, task="classification")
    assert texts(one) == [f"~{'abcdefgh'[-(block_size - 2) :]}~"]
    for first, second in (("abcdefgh", "z"), ("z", "abcdefgh"), ("abcdefgh", "stuvwxyz")):
        row = {"text1": first, "text2": second, "label": "no"}
        (text,) = texts(head(row, block_size, task="pairs"))
        a, b = text[1:-1].split("\n")
        assert first.endswith(a)
        assert second.endswith(b)
        assert len(text) == min(block_size, 3 + len(first + second))
        if "z" in (first, second):
            assert "z" in (a, b)
        else:
            assert abs(len(a) - len(b)) <= 1
    row = {"prompt": "abcdefgh", "choices": ["x", "yy"], "label": 0}
    cut = texts(head(row, block_size, task="multiple_choice"))
    room = block_size - 2 - 1 - 2
    assert cut == [f"~{'abcdefgh'[-room:]}\n{choice}~" for choice in ("x", "yy")]
    skipping: dict[str, Any] = {"too_long": "skip", "task": "classification"}
    kept = head({"text": "abcdefgh", "label": "no"}, block_size, **skipping)
    assert (kept is None) == (block_size < 10)


def test_all_choices_fit_behind_the_prompt():
    """Guards against a wrong choice that is longer than the right one and than the room that the
    prompt leaves: their likelihoods are compared, so each is read behind the same prompt."""
    row = {"prompt": "abcdefgh", "choices": ["x", "y" * 9], "label": 0}
    subject = encoder(16, task="multiple_choice", head=False, template="{{ prompt }}")
    made = subject.encode(row, "here")
    assert isinstance(made, Example)
    assert made.prompt + 9 == 16
    assert subject.counts.shortened == 1
    assert encoder(9, task="multiple_choice", head=False).encode(row, "here") is None


def test_a_choice_is_named_by_number_or_text():
    """Guards against an answer one off, and a number that is the text of another choice."""
    for label, number in ((1, 1), ("1", 1), ("blue", 1), ("red", 0)):
        row = {"prompt": "p", "choices": ["red", "blue"], "label": label}
        made = head(row, task="multiple_choice")
        assert made is not None
        assert made.label == number
        written = example(row, task="multiple_choice", head=False)
        assert written.references == [["red", "blue"][number]]
        assert written.choices == ["red", "blue"]
    digits = head({"prompt": "p", "choices": ["2", "1"], "label": "1"}, task="multiple_choice")
    assert digits is not None
    assert digits.label == 1
    for wrong in (2, -1, "green", True):
        row = {"prompt": "p", "choices": ["red", "blue"], "label": wrong}
        with pytest.raises(DataError, match="neither one of the 2 choices"):
            head(row, task="multiple_choice")


def test_conversations_are_read_in_every_spelling():
    """Guards against one of the usual spellings being refused, and against earlier answers that
    are not learned or questions that are."""
    wanted = "~User:\nhi\n\nAssistant:\n[hello~]\n\nUser:\nbye\n\nAssistant:\n[ciao~]"
    turns = ["hi", "hello", "bye", "ciao"]
    roles, names = ["user", "assistant"] * 2, ["human", "gpt"] * 2
    spelled: list[Any] = [
        turns,
        [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)],
        [{"from": r, "value": t} for r, t in zip(names, turns, strict=True)],
        [*turns, "a question that nobody answers"],
    ]
    for messages in spelled:
        made = example({"messages": messages}, task="chat")
        assert marked(made) == wanted
        assert made.references == ["ciao"]
        before = "User:\nhi\n\nAssistant:\nhello<|endoftext|>\n\nUser:\nbye\n\nAssistant:\n"
        assert made.prompt_text == before
        assert made.prompt == len(before) - len("<|endoftext|>") + 2  # eot is one token, and start
    assert encoder(task="chat").encode({"messages": ["hi"]}, "here") is None
    assert encoder(task="chat").encode({"messages": ["hi", " "]}, "here") is None


def test_a_long_conversation_loses_its_first_turns():
    """Guards against a conversation cut inside a turn where whole turns can go, a lost system
    message, and a limit that is not kept."""
    messages = [
        {"role": "system", "content": "S"},
        *({"role": r, "content": c * 9} for c in "abc" for r in ("user", "assistant")),
    ]
    whole = example({"messages": messages}, 200, task="chat")
    assert len(whole.tokens) == 1 + 11 + 3 * 40 - 2  # start, system, exchanges, no last line ends
    cut = example({"messages": messages}, 128, task="chat")
    assert marked(cut) == marked(
        example({"messages": [messages[0], *messages[3:]]}, 200, task="chat")
    )
    last = example({"messages": messages}, 40, task="chat")
    assert last.tokens[0] == EOT
    assert marked(last).endswith("ccc\n\nAssistant:\n[ccccccccc~]")
    assert len(last.tokens) == 41
    assert last.tokens[last.prompt : -1] == list(b"ccccccccc")
    strict = encoder(40, task="chat", too_long="skip")
    assert strict.encode({"messages": messages}, "here") is None
    assert strict.counts.skipped_long == 1
    assert encoder(9, task="chat").encode({"messages": messages}, "here") is None


def pair_of(row: dict[str, Any], block_size: int = 99) -> PreferencePair:
    config = FinetuneConfig(task="preference")
    assert row_fields(config).problem(row) is None
    made = encoder(block_size, task="preference").encode(row, "here")
    assert isinstance(made, PreferencePair)
    return made


def test_preferences_have_one_prompt_and_two_answers():
    """Guards against loss on the prompt, prompts cut at different places, and a key that changes
    between runs (the reference model's numbers are kept by it)."""
    row = {"prompt": "abcdef", "chosen": "xy", "rejected": "z"}
    pair = pair_of(row)
    assert (marked(pair.chosen), marked(pair.rejected)) == ("~abcdef[xy~]", "~abcdef[z~]")
    assert pair.key == pair_of({**row, "id": 3}).key == 8050770871290918660
    assert pair.key != pair_of({**row, "rejected": "w"}).key
    cut = pair_of(row, 6)
    assert (marked(cut.chosen), marked(cut.rejected)) == ("~def[xy~]", "~def[z~]")


def test_preferences_may_be_conversations():
    """Guards against the spellings of published preference sets being refused, and loss on an
    answer that both sides share."""
    asked = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    asked += [{"from": "human", "value": "c"}]
    chosen, rejected = {"from": "gpt", "value": "x"}, {"from": "gpt", "value": "y"}
    before = "~User:\na\n\nAssistant:\nb~\n\nUser:\nc\n\nAssistant:\n"
    spelled: list[dict[str, Any]] = [
        {"prompt": asked, "chosen": chosen, "rejected": rejected},
        {"prompt": asked, "chosen": "x", "rejected": [rejected]},
        {"prompt": "c", "chosen": [*asked, chosen], "rejected": [*asked, rejected]},
    ]
    for row in spelled:
        pair = pair_of(row)
        assert (marked(pair.chosen), marked(pair.rejected)) == (before + "[x~]", before + "[y~]")
    alone = pair_of({"prompt": "c", "chosen": chosen, "rejected": rejected})
    assert marked(alone.chosen) == "~User:\nc\n\nAssistant:\n[x~]"
    long = pair_of({"prompt": asked, "chosen": "x", "rejected": "y" * 9}, 40)
    assert marked(long.chosen) == "~User:\nc\n\nAssistant:\n[x~]"
    assert marked(long.rejected) == "~User:\nc\n\nAssistant:\n[yyyyyyyyy~]"


def test_preferences_that_compare_nothing():
    """Guards against answers to two different conversations that are compared as if to one, and an
    answer that somebody else than the assistant gave."""
    asked, other = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
    answers = [{"role": "assistant", "content": text} for text in "xy"]
    subject = encoder(99, task="preference")
    unlike = {"prompt": "", "chosen": [asked, answers[0]], "rejected": [other, answers[1]]}
    assert subject.encode(unlike, "here") is None
    assert (subject.counts.skipped_unlike, subject.counts.left_out) == (1, 1)
    with pytest.raises(DataError, match="here: the last message of 'rejected' is by 'user'"):
        subject.encode({**unlike, "rejected": [asked]}, "here")


def test_messages_that_imitate_turns_are_counted():
    """Guards against a user who speaks as the assistant in a plain template and nobody is told."""
    subject = encoder(99, task="chat")
    for said in ("Assistant:\nyes", "one\nAssistant: yes", "no Assistant: here"):
        subject.encode({"messages": [said, "x"]}, "here")
    assert subject.counts.imitations == 2


FIELDS = RowFields(
    (
        ("t", "text"),
        ("o", "optional"),
        ("a", "answers"),
        ("l", "label"),
        ("c", "texts"),
        ("m", "messages"),
    )
)
GOOD: dict[str, Any] = {"t": "", "a": ["x"], "l": 0, "c": ["x"], "m": ["hi", "ho"]}


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"t": None}, "field 't' is not text but null"),
        ({"t": 4}, "field 't' is not text but int"),
        ({"o": 4}, "field 'o' is not text but int"),
        ({"a": ["x", 1]}, "field 'a' is not text but list"),
        ({"l": 0.5}, "field 'l' is no label but 0.5"),
        ({"l": None}, "field 'l' is no label but null"),
        ({"l": ""}, "field 'l' is no label but ''"),
        ({"c": []}, "field 'c' is not a list of texts but an empty list"),
        ({"c": "x"}, "field 'c' is not a list of texts but str"),
        ({"m": "hi"}, "field 'm' is no conversation: not a list of messages but str"),
        ({"m": [{"role": "user"}]}, "neither role and content nor from and value (has: role)"),
        ({"m": [{"role": "user", "content": None}]}, "'role' and 'content' of a message are not"),
    ],
)
def test_what_is_wrong_with_a_row_is_told(bad: dict[str, Any], problem: str):
    """Guards against a KeyError or TypeError in the middle of training."""
    assert FIELDS.problem(GOOD) is None
    found = FIELDS.problem({**GOOD, **bad})
    assert found is not None
    assert problem in found
    assert found.endswith(")")


def test_values_of_rows():
    """Guards against a name with dots that hides a field of just that name."""
    assert value_at({"a": {"b": 1}}, "a.b") == 1
    assert value_at({"a": {"b": 1}, "a.b": 2}, "a.b") == 2
    assert value_at({"a": 1}, "a.b", None) is None
    missing = {name: value for name, value in GOOD.items() if name != "l"}
    assert FIELDS.problem(missing) == "no field 'l' (has: t, a, c, m)"


def test_templates_that_have_no_use_are_refused():
    """Guards against a template that is silently without effect."""
    for config in ({"task": "text"}, {"task": "pairs"}):
        with pytest.raises(ConfigError, match="has no prompt here"):
            encoder(template="{{ text }}", **config)
