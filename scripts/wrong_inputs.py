"""Makes docs/errors.md: wrong inputs, typed into `gpt`, and what comes.

    python scripts/wrong_inputs.py [--check]

Every line is run in this process, in a folder with a run of `tiny` and some files that are at
fault. `--check` writes nothing: exit code 1 if the file is old.
"""

import argparse
import io
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
_OPENING = """\
# Errors

What is at fault, where, and what to do: wrong inputs and what `gpt` says to them. Made by
`python scripts/wrong_inputs.py`, which types every line; a test keeps this page. `run` is a run of
`tiny`, `rows.jsonl` has the field `content` only, `latin1.txt` is in Latin-1, and nothing answers
at the hub's address.
"""
LINES = {
    "The command line": """
gpt pretrian small
gpt pretrain
gpt pretrain smal
gpt pretrain small --max-step 10
gpt pretrain small --learning-rate 1e-3
gpt pretrain small --device cuda
gpt generate Once upon a time
gpt generate --prompt Once --max_new_tokens 5
gpt generate --prompt Once --model run --temperature hot
gpt generate --prompt Once --model run -n -3
gpt generate --prompt Once --model run --top-p 2
gpt generate --prompt Once --model run --quantize int4
gpt generate --prompt Once --model run --logprobs 3
gpt generate --prompt Once --model run --regex '('
gpt generate --prompt Once --model run --choices yes --regex no
gpt generate --model run
gpt generate --prompt-file nosuch.txt --model run
gpt eval --model run --stride 0
gpt export --model run --to onnx out
gpt serve --model run --port 99999
gpt tokenizer train
gpt runs compare run
gpt config copy small nowhere/mine.yaml
gpt completion tcsh
""",
    "Configs": """
gpt pretrain small --set model.n_layers=4
gpt pretrain small --set model.n_layer=four
gpt pretrain small --set model.n_layer
gpt pretrain small --set model.n_head=5
gpt pretrain small --set model.preset=gpt5
gpt pretrain small --set training.max_steps=0
gpt pretrain small --set training.max_time=soon
gpt pretrain small --set training.precision=int4
gpt pretrain nanogpt.yaml
gpt pretrain tabs.yaml
gpt pretrain list.yaml
gpt pretrain twice.yaml
gpt config check broken.yaml
""",
    "Data": """
gpt pretrain small --set data.train=nosuch.txt
gpt pretrain small --set data.train=folder
gpt pretrain empty.txt
gpt pretrain binary.txt
gpt pretrain latin1.txt
gpt pretrain short.txt
gpt pretrain rows.jsonl
gpt finetune sentiment-en --model run
gpt finetune sentiment-en --model run --set data.train=rows.jsonl
gpt eval --model run --data empty.txt
gpt generate --prompt Once --model run --prompt-file rows.jsonl
""",
    "Models and runs": """
gpt generate --prompt Once --model nosuch/model
gpt generate --prompt Once --model folder
gpt generate --prompt Once --model weights.bin
gpt finetune finetune
gpt pretrain tiny --run-dir run
gpt pretrain tiny --run-dir nowhere --resume
gpt runs show nosuch
gpt import nosuch/model out
gpt export --model run --to hf run
""",
}


@dataclass(frozen=True)
class Typed:
    """A line, its exit code, and what it printed on both streams."""

    line: str
    code: int
    printed: str


def prepare(folder: Path) -> None:
    """The files that the lines name, and a run."""
    (folder / "folder").mkdir()
    files: dict[str, bytes] = {
        "empty.txt": b"",
        "binary.txt": bytes(range(256)) * 40,
        "latin1.txt": "Ein Kn\xe4uel f\xfcr die K\xf6nigin. ".encode("latin-1") * 200,
        "short.txt": b"To be or not.\n",
        "rows.jsonl": b'{"content": "a"}\n' * 50,
        "weights.bin": b"\x80\x02ccollections\n",
        "nanogpt.yaml": b"n_layer: 12\nlearning_rate: 6e-4\nbatch_size: 12\nout_dir: out\n",
        "tabs.yaml": b"name: x\nmodel:\n\tn_layer: 4\n",
        "list.yaml": b"- model\n- data\n",
        "twice.yaml": b"name: x\nname: y\n",
        "broken.yaml": b"name: a/b\nmodel: {n_layer: 4, n_head: 3, n_embd: 64}\n"
        b"training: {lr: 0.1}\nsampels: {}\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    made = typed("gpt pretrain tiny --run-dir run --set training.max_steps=10")
    if made.code:
        sys.exit(made.printed)


def typed(line: str) -> Typed:
    """Run one line here."""
    from gptcli.cli.main import main

    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        code = main(shlex.split(line)[1:])
    return Typed(line, code, printed.getvalue())


@contextmanager
def prepared() -> Iterator[None]:
    """Inside a folder with what the lines need, where no hub answers."""
    kept, before = dict(os.environ), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # contextlib.chdir is of Python 3.11
        os.environ["GPT_RUNS"] = "runs"
        os.environ["COLUMNS"] = "100"
        os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
        try:
            prepare(Path(folder))
            yield
        finally:
            os.chdir(before)
            os.environ.clear()
            os.environ.update(kept)


def page() -> str:
    """The whole page, from running every line."""
    parts = [_OPENING]
    with prepared():
        for title, lines in LINES.items():
            parts.append(f"## {title}\n")
            for line in lines.strip().splitlines():
                found = typed(line)
                parts.append(f"```text\n$ {line}\n{found.printed.strip()}\n[{found.code}]\n```\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page, or say whether it is old."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE} is old: python scripts/wrong_inputs.py")


if __name__ == "__main__":
    main()
