"""`--set KEY=VALUE`: the same path as the file."""

from pathlib import Path
from typing import Any

import pytest

from gptcli.config.load import LoadedConfig, load_config
from gptcli.config.model_schema import RopeScaling
from gptcli.errors import ConfigError

BASE = "model: {n_layer: 2, n_head: 2}\ndata: {train: a.txt}\n"


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "c.yaml"
    file.write_text(BASE)
    return str(file)


def value(loaded: LoadedConfig, key: str) -> Any:
    found: Any = loaded.config
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.n_layer=6", 6),
        ("model.n_layer = 6", 6),
        ("training.max_steps=4e3", 4000),
        ("training.max_steps=null", None),
        ("training.max_steps=", None),
        ("training.compile=on", "on"),
        ("training.max_time=600", "600"),
        ("training.micro_batch_size=8", 8),
        ("optimizer.lr=3e-4", 3e-4),
        ("optimizer.betas=[0.8, 0.99]", [0.8, 0.99]),
        ("model.gated=false", False),
        ("model.window=256", [256]),
        ("model.window=2e2", [200]),
        ("model.window=[0,256]", [0, 256]),
        ("model.window=null", None),
        ("name=2024", "2024"),
        ("name=no", "no"),
        ("generate.model=null", None),
        ("generate.model=*.x", "*.x"),
        ("generate.prompt=Yes: 3 # [x]", "Yes: 3 # [x]"),
        ("generate.prompt= two words ", " two words "),
        ("generate.prompt=[1, 2", "[1, 2"),
        ("generate.prompt={a: 1}", "{a: 1}"),
        ("generate.prompt='tis the season", "'tis the season"),
        ("generate.prompt=a=b", "a=b"),
        ('generate.prompt="a\\nb"', "a\nb"),
        ("generate.prompt=''", ""),
        ('generate.stop=[END, "\\n"]', ["END", "\n"]),
        ("finetune.fields.prompt=question", {"prompt": "question"}),
    ],
)
def test_values(path: str, override: str, expected: Any) -> None:
    """On a command line text needs no second pair of quotes, and numbers stay numbers."""
    key = override.partition("=")[0].strip().replace("fields.prompt", "fields")
    assert value(load_config(path, [override]), key) == expected
    assert value(load_config(None, [override]), key) == expected


def test_the_last_one_wins_and_the_rest_of_the_file_stays(path: str) -> None:
    """A section named in a --set lost the keys of the file."""
    loaded = load_config(path, ["model.n_layer=4", "model.n_layer=6", "seed=3"])
    model = loaded.config.model
    assert (model.n_layer, model.n_head, loaded.config.seed) == (6, 2, 3)


@pytest.mark.parametrize(
    ("overrides", "paths", "fields"),
    [
        (["data.train=*.txt"], ["*.txt"], ["text"]),
        (["data.train=hub:owner/name:config"], ["hub:owner/name:config"], ["text"]),
        (["data.train=[b, c]"], ["b", "c"], ["text", "text"]),
        (["data.train={path: b, text_field: x}"], ["b"], ["x"]),
        (["data.train[0].text_field=body"], ["a.txt"], ["body"]),
        (["data.train.text_field=body"], ["a.txt"], ["body"]),
        (["data.train[1]=b", "data.train[1].text_field=body"], ["a.txt", "b"], ["text", "body"]),
    ],
)
def test_sources(path: str, overrides: list[str], paths: list[str], fields: list[str]) -> None:
    """A glob is an alias to YAML; a source written as text has no keys to set."""
    train = load_config(path, overrides).config.data.train
    assert [source.path for source in train] == paths
    assert [source.text_field for source in train] == fields


def test_one_entry_of_a_default_list() -> None:
    """Setting betas[1] without a file left a list of one."""
    assert load_config(None, ["optimizer.betas[1]=0.99"]).config.optimizer.betas == [0.9, 0.99]
    train = load_config(None, ["data.train[0].encoding=latin-1"]).config.data.train
    assert [(s.path, s.encoding) for s in train] == [("builtin:web-bible", "latin-1")]


def test_preset_by_set_leaves_given_keys(path: str) -> None:
    """A preset on the command line must not undo what the file says."""
    sets = ["model.preset=gpt2", "model.n_embd=64", "training.tokens_per_step=2048"]
    model = load_config(path, sets).config.model
    assert (model.n_layer, model.n_head, model.n_embd) == (2, 2, 64)
    assert (model.norm, model.block_size, model.bias) == ("layernorm", 1024, True)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.n_layer=x", "expected a whole number, got the text 'x'"),
        ("model.n_layer=0", "must be above 0, got 0"),
        ("model.n_layers=6", "unknown key 'n_layers' in model; did you mean 'n_layer'?"),
        ("n_layer=6", "unknown key 'n_layer'; it belongs to model"),
        ("d_model=6", "unknown key 'd_model'; did you mean 'model.n_embd'?"),
        ("model.n_head=3", "model: n_embd 256 is not divisible by n_head 3"),
        (
            "training.tokens_per_step=100",
            "training.tokens_per_step 100 is not a multiple of model.block_size 128",
        ),
        ("foo", "write KEY=VALUE, such as model.n_layer=6"),
        ("=3", "write KEY=VALUE, such as model.n_layer=6"),
        ("model..x=3", "write KEY=VALUE, such as model.n_layer=6"),
        ("model.n_layer.x=3", "model.n_layer is not a mapping of keys"),
        ("model[0]=3", "model is not a list"),
        ("model=5", "expected a mapping of keys, got the number 5"),
        ("data.train[5]=b", "data.train has no entry 5 (entries: 1, counted from 0)"),
        ("data.val=[a", "not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("data.val=[!!python/none a]", "tag '!!python/none' is not allowed; write the plain value"),
        ("seed=017", "'017' has a leading zero: write 17, or quote it for text"),
        ("training.max_time=soon", "'soon' is not a duration; write 90s, 10m, 8h or 1h30m"),
    ],
)
def test_problems_show_the_set(path: str, override: str, problem: str) -> None:
    """Without the --set in front, a user looks for the problem in the file."""
    with pytest.raises(ConfigError) as error:
        load_config(path, [override])
    assert error.value.problems == [f"--set {override}: {problem}"]
    assert error.value.exit_code == 2


def test_problems_of_file_and_sets_together(tmp_path: Path) -> None:
    """A wrong --set hid the file's problems; the file's come first, then each set in order."""
    file = tmp_path / "c.yaml"
    file.write_text("seed: x\nmodel: {n_head: 2}\n")
    with pytest.raises(ConfigError) as error:
        load_config(str(file), ["name=/", "foo", "model.n_embd=255"])
    starts = [f"{file}:1:7: seed", "--set name=/: ", "--set foo: ", "--set model.n_embd=255: model"]
    for problem, start in zip(error.value.problems, starts, strict=True):
        assert problem.startswith(start)


def test_control_characters_are_escaped(path: str) -> None:
    """An argument with escape codes must not reach the terminal raw, nor break the line."""
    with pytest.raises(ConfigError) as error:
        load_config(path, ["name=\x1b[31m\nerror: fake"])
    assert "\x1b" not in error.value.message
    assert "\n" not in error.value.message


def test_one_key_of_a_mapping_that_is_not_there(path: str) -> None:
    """`rope_scaling` is null by default, which has no room for keys of its own."""
    sets = ["model.rope_scaling.kind=linear", "model.rope_scaling.factor=4"]
    scaling = load_config(path, sets).config.model.rope_scaling
    assert scaling == RopeScaling(kind="linear", factor=4.0)
    assert load_config(path, ["model.rope_scaling={kind: linear, factor: 4}"]).config == (
        load_config(path, sets).config
    )
    assert load_config(path, ["model.window[0]=8"]).config.model.window == [8]
    with pytest.raises(ConfigError) as error:
        load_config(path, sets[1:])
    assert error.value.problems == [
        "--set model.rope_scaling.factor=4: model.rope_scaling: needs the key 'kind'"
    ]
