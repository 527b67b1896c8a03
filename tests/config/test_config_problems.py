"""Every problem of a config, where it is and in plain words."""

import resource
import sys
import time
from pathlib import Path

import pytest

from gptcli.config.load import load_config
from gptcli.config.presets import PRESETS
from gptcli.errors import ConfigError


def problems_of(tmp_path: Path, text: str | bytes, *sets: str) -> list[str]:
    """The problems of a file `c.yaml`, without its directory."""
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load_config(str(path), sets)
    assert error.value.exit_code == 2
    return [problem.replace(f"{tmp_path}/", "") for problem in error.value.problems]


def test_every_problem_at_once_in_line_order(tmp_path: Path) -> None:
    """Users corrected a file problem by problem, one run for each."""
    text = """\
name: 12
model:
  n_layers: 0
  n_embd: 255
  n_head: 4
  hidden_size: 3
optimizer: {lr: -1, kind: adam, learning_rate: 3}
training:
  max_steps: 10
  tokens_per_step: 1000
  micro_batch_size: -1
  precision: float16
  max_time: 8 hours
data:
  train:
    - {path: a.txt, txt_field: body}
    - {encoding: latin-1}
tokenizer: {kind: file}
schedule: {warmup_steps: 50, kind: wsd, kind: linear}
eval: {max_tokens: 1.5}
finetune: {fields: {question: q}}
modle: {}
"""
    assert problems_of(tmp_path, text, "seed=x", "generate.n=0") == [
        "c.yaml:1:7: name: expected text, got the number 12; quote it: '12'",
        "c.yaml:2:1: model: n_embd 255 is not divisible by n_head 4",
        "c.yaml:3:3: unknown key 'n_layers' in model; did you mean 'n_layer'?",
        "c.yaml:3:13: model.n_layer: must be above 0, got 0",
        "c.yaml:6:3: unknown key 'hidden_size' in model; did you mean 'n_embd'?",
        "c.yaml:7:17: optimizer.lr: must be above 0, got -1",
        "c.yaml:7:27: optimizer.kind: expected one of: muon, adamw; got 'adam';"
        " did you mean 'adamw'?",
        "c.yaml:7:33: unknown key 'learning_rate' in optimizer; did you mean 'lr'?",
        "c.yaml:11:21: training.micro_batch_size: must be above 0, got -1",
        "c.yaml:12:14: training.precision: expected one of: auto, fp32, bf16, fp16; got 'float16';"
        " did you mean 'fp16'?",
        "c.yaml:13:13: training.max_time: '8 hours' is not a duration; write 90s, 10m, 8h or 1h30m",
        "c.yaml:16:21: unknown key 'txt_field' in data.train[0]; did you mean 'text_field'?",
        "c.yaml:17:7: data.train[1]: needs the key 'path'",
        "c.yaml:18:1: tokenizer: kind is file, so path must name a saved tokenizer",
        "c.yaml:19:26: schedule.warmup_steps 50 is above training.max_steps 10",
        "c.yaml:19:41: repeated key 'kind'; it was given before on line 19",
        "c.yaml:20:20: eval.max_tokens: expected a whole number or null, got the number 1.5",
        "c.yaml:21:1: finetune: fields of task completion are prompt, response, not question",
        "c.yaml:22:1: unknown key 'modle'; did you mean 'model'?",
        "--set seed=x: expected a whole number, got the text 'x'",
        "--set generate.n=0: must be above 0, got 0",
    ]


def test_rules_of_sound_sections_despite_other_problems(tmp_path: Path) -> None:
    """pydantic skips rules between keys as soon as any field is wrong, anywhere."""
    text = (
        "model: {n_embd: 255}\noptimizer: {lr: 0}\n"
        "training: {max_steps: 10}\nschedule: {warmup_steps: 50}\n"
    )
    assert problems_of(tmp_path, text) == [
        "c.yaml:1:1: model: n_embd 255 is not divisible by n_head 4",
        "c.yaml:2:17: optimizer.lr: must be above 0, got 0",
        "c.yaml:4:26: schedule.warmup_steps 50 is above training.max_steps 10",
    ]


def test_no_rule_is_checked_against_a_default_that_was_replaced(tmp_path: Path) -> None:
    """A misread n_head must not be reported as `255 is not divisible by n_head 4` as well."""
    text = "model: {n_embd: 255, n_head: three}\ntraining: {tokens_per_step: 1000}\n"
    assert problems_of(tmp_path, text) == [
        "c.yaml:1:30: model.n_head: expected a whole number, got the text 'three'"
    ]


def test_a_misnamed_key_counts_as_the_one_that_was_meant(tmp_path: Path) -> None:
    """Only after n_heads was renamed did the user learn that its value does not fit."""
    text = "model: {n_embd: 256, n_heads: 5}\ntrainig: {log_every: 0}\n"
    assert problems_of(tmp_path, text) == [
        "c.yaml:1:1: model: n_embd 256 is not divisible by n_head 5",
        "c.yaml:1:22: unknown key 'n_heads' in model; did you mean 'n_head'?",
        "c.yaml:2:1: unknown key 'trainig'; did you mean 'training'?",
        "c.yaml:2:22: training.log_every: must be above 0, got 0",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("optimizer: {lr: nan}", "1:17: optimizer.lr: expected a number or auto; got 'nan'"),
        ("optimizer: {lr: .nan}", "1:17: optimizer.lr: must be a finite number, got .nan"),
        ("optimizer: {lr: .inf}", "1:17: optimizer.lr: must be a finite number, got .inf"),
        ("optimizer: {lr: 1e999}", "1:17: optimizer.lr: must be a finite number, got 1e999"),
        ("optimizer: {lr: -3e-4}", "1:17: optimizer.lr: must be above 0, got -3e-4"),
        ("optimizer: {lr:}", "1:16: optimizer.lr: expected a number or auto; got nothing"),
        ("optimizer: {lr: [1]}", "1:17: optimizer.lr: expected a number or auto; got a list"),
        ("optimizer: {lr: abc}", "1:17: optimizer.lr: expected a number or auto; got 'abc'"),
        ("model: {dropout: 1.5}", "1:18: model.dropout: must be below 1, got 1.5"),
        ("model: {block_size: 0}", "1:21: model.block_size: must be above 0, got 0"),
        ("model: {gated: 1}", "1:16: model.gated: expected true or false, got the number 1"),
        (
            "model: {n_layer: '6'}",
            "1:18: model.n_layer: expected a whole number, got the text '6'; remove the quotes",
        ),
        ("model: {n_layer: true}", "1:18: model.n_layer: expected a whole number, got true"),
        (
            "model: {n_layer: 2.5}",
            "1:18: model.n_layer: expected a whole number, got the number 2.5",
        ),
        ("model: 5", "1:8: model: expected a mapping of keys, got the number 5"),
        ("model: [a]", "1:8: model: expected a mapping of keys, got a list"),
        (
            "model: {preset: gtp2}",
            "1:17: model.preset: unknown preset 'gtp2'; did you mean 'gpt2'?",
        ),
        (
            "model: {preset: gpt3}",
            "1:17: model.preset: unknown preset 'gpt3'; one of: gpt3-small, gpt3-medium,"
            " gpt3-large, gpt3-xl, gpt3-2.7b, gpt3-6.7b, gpt3-13b, gpt3-175b",
        ),
        (
            "model: {preset: bloom}",
            f"1:17: model.preset: unknown preset 'bloom'; one of: {', '.join(PRESETS)}",
        ),
        ("model: {window: -1}", "1:17: model.window: must be at least 0, got -1"),
        ("model: {window: [0, -1]}", "1:21: model.window[1]: must be at least 0, got -1"),
        ("model: {window: []}", "1:17: model.window: needs at least this many entries: 1, got 0"),
        (
            "model: {window: 2.5}",
            "1:17: model.window: expected a whole number or a list of whole numbers or null, got"
            " the number 2.5",
        ),
        (
            "model: {window: '256'}",
            "1:17: model.window: expected a whole number or a list of whole numbers or null, got"
            " the text '256'; remove the quotes",
        ),
        (
            "model: {window: all}",
            "1:17: model.window: expected a whole number or a list of whole numbers or null, got"
            " the text 'all'",
        ),
        (
            "model: {window: true}",
            "1:17: model.window: expected a whole number or a list of whole numbers or null, got"
            " true",
        ),
        (
            "model: {n_layer: 2, window: [0, 8, 8]}",
            "1:29: model.window has 3 entries, but model.n_layer is 2",
        ),
        (
            "model: {rope_scaling: 2}",
            "1:23: model.rope_scaling: expected a mapping of keys or null, got the number 2",
        ),
        (
            "model: {rope_scaling: {kind: linear}}",
            "1:23: model.rope_scaling: needs the key 'factor'",
        ),
        (
            "model: {rope_scaling: {kind: ntk, factor: 2, original_block_size: 64}}",
            "1:30: model.rope_scaling.kind: expected one of: linear, dynamic, yarn, llama3; got"
            " 'ntk'; did you mean 'dynamic'?",
        ),
        (
            "model: {rope_scaling: {kind: linear, factor: 0.5}}",
            "1:46: model.rope_scaling.factor: must be at least 1, got 0.5",
        ),
        (
            "model: {rope_scaling: {kind: yarn, factor: 2}}",
            "1:23: model.rope_scaling: kind yarn needs original_block_size, the block_size that"
            " the model was trained with",
        ),
        (
            "model: {rope_scaling: {kind: yarn, factor: 2, original_block_size: 9, beta_slow: 32}}",
            "1:23: model.rope_scaling: kind yarn needs beta_fast 32 above beta_slow 32",
        ),
        (
            "model: {rope_scaling: {kind: llama3, factor: 2, original_block_size: 64,"
            " high_freq_factor: 1}}",
            "1:23: model.rope_scaling: kind llama3 needs high_freq_factor 1 above"
            " low_freq_factor 1",
        ),
        (
            "model: {rope_scaling: {kind: linear, factor: 2, beta_fast: 4}}",
            "1:49: model.rope_scaling.beta_fast has no effect with model.rope_scaling.kind linear;"
            " remove it",
        ),
        (
            "model: {position: learned, rope_theta: 1e5}",
            "1:28: model.rope_theta has no effect with model.position learned; remove it",
        ),
        (
            "model: {preset: gpt2, rope_scaling: {kind: linear, factor: 2}}",
            "1:1: model: rope_scaling stretches position rope, but position is learned",
        ),
        (
            "model: {n_embd: 12, n_head: 4}",
            "1:1: model: position rope needs an even head size (n_embd / n_head), not 3",
        ),
        (
            "model: {n_embd: 8, rope_scaling: {kind: dynamic, factor: 2, original_block_size: 64}}",
            "1:1: model: rope_scaling dynamic needs a head size above 2, not 2"
            " (its exponent is D / (D - 2))",
        ),
        (
            "model: {rope_theta: 1, rope_scaling: {kind: yarn, factor: 2, original_block_size: 9}}",
            "1:1: model: rope_scaling yarn needs rope_theta above 1 (its logarithm divides), not 1",
        ),
        (
            "init: runs/x\nmodel: {embedding_file: a.txt}",
            "2:25: model.embedding_file starts the token embeddings of a new model, but those come"
            " with the model that init names; remove one of them",
        ),
        (
            "init: runs/x\nmodel: {block_size: 100}\ntraining: {tokens_per_step: 4096}",
            "3:29: training.tokens_per_step 4096 is not a multiple of model.block_size 100",
        ),
        ("model: {preset: gpt2, n_head: 5}", "1:1: model: n_embd 768 is not divisible by n_head 5"),
        ("training: {eval_every: 0}", "1:24: training.eval_every: must be above 0, got 0"),
        ("training: {keep_last: 1}", "1:23: training.keep_last: must be at least 2, got 1"),
        (
            "training: {compile: true}",
            "1:21: training.compile: expected one of: auto, on, off; got true; did you mean 'on'?",
        ),
        (
            "training: {micro_batch_size: autoo}",
            "1:30: training.micro_batch_size: expected a whole number or auto; got 'autoo';"
            " did you mean 'auto'?",
        ),
        (
            "training: {device: gpu}",
            "1:20: training.device: expected auto, cpu, cuda, cuda:N or mps, got 'gpu'",
        ),
        ("seed: 017", "1:7: seed: '017' has a leading zero: write 17, or quote it for text"),
        ("name: 017", "1:7: name: '017' has a leading zero: write 17, or quote it for text"),
        ("name: true", "1:7: name: expected text, got true; quote it: 'true'"),
        ("name: 1e3", "1:7: name: expected text, got the number 1e3; quote it: '1e3'"),
        ("name: null", "1:7: name: expected text, got nothing"),
        ("seed: -1", "1:7: seed: must be at least 0, got -1"),
        (
            f"seed: {2**63}",
            f"1:7: seed: '{2**63}' is too large: whole numbers end at {2**63 - 1}",
        ),
        ("seed: 1e30", "1:7: seed: '1e30' is too large; write smaller ones in digits"),
        ("data: {train: []}", "1:15: data.train: name at least one source"),
        (
            "data: {train: [3]}",
            "1:16: data.train[0]: expected a source (text, or a mapping with a path),"
            " got the number 3",
        ),
        (
            "generate: {stop: END}",
            "1:18: generate.stop: expected a list of texts, got the text 'END'; write ['END']",
        ),
        (
            "finetune: {scores: false}",
            "1:20: finetune.scores: expected a list of exact_match, token_f1, bleu, chrf, rouge,"
            " code_runs, got false",
        ),
        (
            "optimizer: {betas: [0.9]}",
            "1:20: optimizer.betas: needs at least this many entries: 2, got 1",
        ),
        ("optimizer: {betas: [0.9, 1]}", "1:26: optimizer.betas[1]: must be below 1, got 1"),
        (
            "finetune: {fields: {prompt: 1, response: b}}",
            "1:29: finetune.fields.prompt: expected text, got the number 1; quote it: '1'",
        ),
        (
            "training: {tokens_per_step: 1000}",
            "1:29: training.tokens_per_step 1000 is not a multiple of model.block_size 128",
        ),
        ("eval: {stride: 200}", "1:16: eval.stride 200 is above model.block_size 128"),
        (
            'generate: {prompt: "\\ud800"}',
            "1:20: generate.prompt: '\\ud800' is not valid Unicode text",
        ),
    ],
)
def test_wrong_values_in_plain_words(tmp_path: Path, text: str, problem: str) -> None:
    """pydantic's own messages name union branches, its types and its web site."""
    assert problems_of(tmp_path, text) == [f"c.yaml:{problem}"]


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "a b", "-x", ".x", "a\x1b[31m", "é", "", "x" * 101]
)
def test_run_names_that_are_no_folder_names(tmp_path: Path, name: str) -> None:
    """A name goes into a path: it must not leave the runs directory or colour the terminal."""
    text = 'name: "' + name.replace("\x1b", "\\e") + '"'
    (problem,) = problems_of(tmp_path, text)
    assert problem.startswith("c.yaml:1:7: name: expected at most 100 letters, digits")
    assert "\x1b" not in problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1:1: expected a mapping of sections, got an empty file"),
        ("# nothing\n", "1:1: expected a mapping of sections, got an empty file"),
        (
            "\n- a\n",
            "2:1: expected a mapping of sections such as model: and training:, got a list",
        ),
        (
            "5",
            "1:1: expected a mapping of sections such as model: and training:, got a single value",
        ),
        ("model:\n\tn_layer: 3", "2:1: not valid YAML: found character '\\t' that cannot start"),
        ("a: b: c", "1:5: not valid YAML: mapping values are not allowed here"),
        ("data: {train: *.txt}", "1:16: not valid YAML: expected alphabetic or numeric character"),
        ("seed: 1\nname: 'abc\n\n", "4:1: not valid YAML: found unexpected end of stream"),
        ("name: {", "1:8: not valid YAML: expected the node content"),
        ("seed: 1\n---\nseed: 2", "2:1: not valid YAML: a second document starts here; keep one"),
        ("seed: 1\nname: \x1b[31m", "2:7: character U+001B is not allowed in YAML"),
        ('name: "\\UFFFFFFFF"', "1:10: not valid YAML: a character code"),
        ("? [a]\n: 1", "1:3: a key must be a plain word, not a list or mapping"),
        ("1: 2", "1:1: unknown key '1'; its keys: name, seed"),
        ("<<: {seed: 1}", "1:1: unknown key '<<'; merge keys are not supported"),
        ("seed: &a [*a]", "1:7: nested deeper than 20 levels"),
        ("seed: !!int 5", "1:7: tag '!!int' is not allowed; write the plain value"),
        ("seed: ! 5", "1:7: tag '!' is not allowed; write the plain value"),
    ],
)
def test_text_that_is_no_config(tmp_path: Path, text: str, problem: str) -> None:
    """Broken YAML ended in PyYAML's tracebacks, or, for a list, in one of ours."""
    assert problems_of(tmp_path, text)[0].startswith(f"c.yaml:{problem}")


def test_init_settles_tokenizer_and_shape(tmp_path: Path) -> None:
    """A shape beside init was dropped in silence; dropout has none and may change."""
    text = "init: runs/x\nmodel:\n  dropout: 0.1\n  n_layer: 2\ntokenizer: {kind: bytes}\nseed: x\n"
    refused = "comes with the model that init names; remove it"
    assert problems_of(tmp_path, text, "model.n_head=2") == [
        f"c.yaml:4:3: model.n_layer: {refused}",
        f"c.yaml:5:1: tokenizer: {refused}",
        "c.yaml:6:7: seed: expected a whole number, got the text 'x'",
        f"--set model.n_head=2: model.n_head: {refused}",
    ]


def test_some_keys_may_stand_beside_init(tmp_path: Path) -> None:
    """The rules for a new model's sizes must not be held against a shape that is not yet known."""
    path = tmp_path / "c.yaml"
    path.write_text("init: runs/x\nmodel: {window: [0, 1, 2, 3, 4, 5], rope_theta: 5e5}\n")
    scaling = "model.rope_scaling={kind: dynamic, factor: 2, original_block_size: 9999}"
    model = load_config(str(path), [scaling, "eval.stride=500"]).config.model
    assert model.window == [0, 1, 2, 3, 4, 5]
    assert model.rope_theta == 5e5
    refused = "model.n_layer: comes with the model that init names; remove it"
    text = "init: runs/x\nmodel: {window: 8, n_layer: 3}\n"
    assert problems_of(tmp_path, text) == [f"c.yaml:2:20: {refused}"]


def test_scaling_that_never_begins(tmp_path: Path) -> None:
    """Dynamic scaling acts beyond original_block_size only: in a shorter block it is no option."""
    text = "model: {rope_scaling: {kind: dynamic, factor: 2, original_block_size: 128}}"
    (problem,) = problems_of(tmp_path, text)
    assert problem.startswith(
        "c.yaml: model.rope_scaling dynamic changes nothing up to original_block_size 128, and"
        " model.block_size is 128"
    )
    # llama3 and yarn change the frequencies in short blocks, too.
    path = tmp_path / "c.yaml"
    path.write_text(text.replace("dynamic", "llama3"))
    assert load_config(str(path)).config.model.idle_scaling is None


def test_misspelt_keys_of_a_mapping_in_the_model(tmp_path: Path) -> None:
    """Keys of rope_scaling are one level deeper than the suggestions used to look."""
    text = "model:\n  rope_scaling: {rope_type: linear, factr: 2}\n  sliding_window: 4\n"
    assert problems_of(tmp_path, text, "model.rope_scaling.knd=yarn") == [
        "c.yaml:2:18: unknown key 'rope_type' in model.rope_scaling; did you mean 'kind'?",
        "c.yaml:2:37: unknown key 'factr' in model.rope_scaling; did you mean 'factor'?",
        "c.yaml:3:3: unknown key 'sliding_window' in model; did you mean 'window'?",
        "--set model.rope_scaling.knd=yarn: unknown key 'knd' in model.rope_scaling; did you mean"
        " 'kind'?",
    ]


def test_repeated_keys_name_both_lines(tmp_path: Path) -> None:
    """PyYAML lets the last one win in silence; keys of both halves of a section count."""
    text = "model: {n_layer: 1}\nseed: 1\nmodel:\n  n_layer: 2\n  n_head: x\nseed: 2\n"
    assert problems_of(tmp_path, text) == [
        "c.yaml:3:1: repeated key 'model'; it was given before on line 1",
        "c.yaml:5:11: model.n_head: expected a whole number, got the text 'x'",
        "c.yaml:6:1: repeated key 'seed'; it was given before on line 2",
    ]


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (bomb(), "more than 10000 values, with aliases written out"),
        ("\n".join(f"k{i}: 1" for i in range(20_000)), "more than 10000 values"),
        ("[" * 50_000, "nested deeper than 20 levels"),
        ("{" * 50_000, "nested deeper than 20 levels"),
        ("- " * 50_000, "nested deeper than 20 levels"),
        ("a" * 1_000_001, "too large for a config"),
        ("a: " + "9" * 100_000, "unknown key 'a'"),
        ("a" * 1000 + ": 1", "unknown key 'aaa"),
        ("\n".join(f"n_layr{i}: 1" for i in range(4000)), "unknown key"),
    ],
)
def test_hostile_files_are_refused_quickly(tmp_path: Path, text: str, problem: str) -> None:
    """Nine lines of aliases expand to gigabytes; deep nesting overflows the stack."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    found = problems_of(tmp_path, text)
    assert time.process_time() - start < 2.0
    assert problem in found[0]
    assert len(found) <= 101
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 200e6


def test_nothing_of_pydantic_shows(tmp_path: Path) -> None:
    """Union branches (`constrained-int`) and its link to errors.pydantic.dev leaked."""
    text = "training: {micro_batch_size: [a]}\ngenerate: {seed: []}\ndata: {train: {path: [x]}}"
    found = problems_of(tmp_path, text)
    assert len(found) == 3
    assert not any(
        word in "".join(found) for word in ("constrained", "pydantic", "literal", "Input")
    )


def test_window_beyond_the_block(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A window that bounds nothing is said to, and no reason to read texts without end: distances
    beyond the block were never trained."""
    path = tmp_path / "c.yaml"
    path.write_text("model: {preset: llama, window: 500, block_size: 128}\n")
    assert not load_config(str(path)).config.model.rolls
    assert "model.window 500 reaches beyond model.block_size 128" in caplog.text
    assert load_config(str(path), ["model.window=128"]).config.model.rolls
    assert not load_config(str(path), ["model.window=[128, 0]"]).config.model.rolls
