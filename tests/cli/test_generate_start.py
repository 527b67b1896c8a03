"""How soon `gpt generate` has its first text: what it loads, and that nothing is left switched off.

The seconds themselves are measured by scripts/bench_generate.py --case start.
"""

import gc
import json
import sys

import pytest

from gptcli.cli.starting import starting
from gptcli.errors import ConfigError

# Each takes a second or more, and no text needs it.
HEAVY = (
    *("datasets", "transformers", "pyarrow", "pandas", "huggingface_hub", "tokenizers", "jinja2"),
    *("matplotlib", "scipy", "sympy", "torch._dynamo", "torch._inductor"),
)


def test_nothing_is_imported_that_is_not_needed(shell, tmp_path):
    """One import in a module that another needs for one function made the start 4 s longer."""
    (tmp_path / "seen.py").write_text(
        "import json, sys\n"
        "from gptcli.config.load import dump_config\n"
        "from gptcli.config.schema import Config\n"
        "from gptcli.cli.main import main\n"
        "import torch\n"
        "from gptcli.data.tokenizer import Tokenizer\n"
        "from gptcli.model.gpt import GPT, initialise\n"
        "from gptcli.runs.checkpoint import Contents, publish\n"
        "from gptcli.runs.run_dir import new_run_dir\n"
        "shape = {'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'block_size': 32}\n"
        "config = Config.model_validate({'name': 'tiny', 'model': shape})\n"
        "tokenizer = Tokenizer.of_bytes()\n"
        "model = GPT(config.model, tokenizer.vocab_size)\n"
        "initialise(model, torch.Generator().manual_seed(0))\n"
        "made = new_run_dir('tiny', None, overwrite=False)\n"
        "contents = Contents(model.state_dict(), {}, {}, dump_config(config), tokenizer)\n"
        "publish(made, 10, contents)\n"
        "code = main(['generate', '--prompt', 'x', '--max-new-tokens', '80', '--seed', '1'])\n"
        f"print(json.dumps([code, [name for name in {HEAVY} if name in sys.modules]]))\n"
    )
    done = shell(f"{sys.executable} seen.py")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]


def test_garbage_is_collected_again_after_the_start():
    """A process that never collects grows for as long as it runs."""
    with starting():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ConfigError), starting():
        raise ConfigError("no")
    assert gc.isenabled()


def test_garbage_of_a_long_life_is_no_start():
    """Who calls `main` often, as these tests do, would keep all garbage for ever."""
    before = gc.get_freeze_count()
    with starting():
        pass
    assert gc.get_freeze_count() == before
