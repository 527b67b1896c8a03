"""The shell lines and YAMLs of README.md and docs/*.md, and how each becomes one that runs here.

A line that cannot run here is in NOT_RUN with the reason; what its words stand for is in MEANT.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = ("cli.md", "config.md", "faults.md")  # by scripts/reference.py and fault_table.py
_SHELLS = ("sh", "bash", "shell", "console", "zsh", "fish")
_COMMANDS = "gpt|bash|sh|pip|curl|python3?|torchrun|sbatch|git|cd|source|export|uv|eval|cat|echo"
_COMMAND = re.compile(rf"^(@reboot |\. |(\w+=('[^']*'|\S*)\s+)*({_COMMANDS})( |$))")
_BLOCK = re.compile(
    r"^(?P<margin> *)```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^(?P=margin)```", re.S | re.M
)

# What no test can run, or another one does: a pattern of its lines -> why. These are only parsed.
NOT_RUN = {
    r"^pip install|^\. \.venv|^git clone|^cd ": "installs, or belongs to an installation",
    r"^(\w+=\S+ )?bash scripts/(quickstart|test|check|release)\.sh": (
        "minutes; tests/cli/test_scripts.py"
    ),
    r"--devices \d|^torchrun|scripts/(gpu_box|spot|slurm)\.sh": "GPUs; tests/test_gpu_boxes.py",
    r"^python scripts/fault_table\.py": "tests/faults/test_fault_table.py runs it",
    r"^python scripts/wrong_inputs\.py": "tests/test_wrong_inputs.py runs it",
    r"--lm-eval": "an extra, which asks the hub; tests/test_evaluate_lm_eval.py",
    r"--prove-resume": "minutes; tests/test_prove_resume.py",
    r"^python scripts/(chaos|fuzz)\.py": "minutes; tests/test_chaos.py, tests/test_fuzz.py",
}
# What runs in the slow suite alone, and is parsed in the other.
SLOW_LINES = {r"^gpt plan (?!.*--device-kind)": "seconds: it times the steps of the run"}
# What stands for something of the reader's, or for what takes long -> what there is here. The first
# that fits a line counts where two do: a run of a task, before any run.
MEANT = {
    r"(eval --task.*--model) runs/\S+": r"\1 tuned/task",
    r"--model runs/\S+( --to peft)": r"--model tuned/lora\1",
    r"--model (runs/\S*\.\.\.\S*|MODEL|DIR|path/to/\S+)": "--model runs/A",
    r"--model ADAPTERS": "--model tuned/lora",
    r"config copy small my\.yaml": "config copy small {new}.yaml",
    r"\bSOURCE\b": "gpt2",
    r"\bOUT\b": "{new}",
    r"(finetune configs/finetune\.yaml)": (
        r"\1 --set 'data.train={path: builtin:web-verses, limit: 200}'"
    ),
    r"data show CONFIG": "data show rows.yaml",
    r"--save talk\.jsonl": "--save {new}.jsonl",
}
# To what is trained, small sizes, behind the config: what the line itself sets comes later.
_SMALL = (
    "training.max_steps=2 training.device=cpu training.compile=off training.precision=fp32"
    " training.tokens_per_step=256 training.micro_batch_size=1 schedule.warmup_steps=1"
    " samples.n=1 samples.max_new_tokens=4"
)
_SHAPE = (
    "tokenizer.kind=bytes model.n_layer=1 model.n_head=2 model.n_embd=16 model.block_size=256"
    " data.train=book.txt"
)
_TASK = "model.block_size=256 finetune.score_rows=4 finetune.max_new_tokens=4"


@dataclass(frozen=True)
class Line:
    """A command of a page, its continuation lines joined and its comment gone."""

    page: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why it is not run; None for one that is."""
        return next((why for what, why in NOT_RUN.items() if re.search(what, self.text)), None)

    @property
    def gpt(self) -> bool:
        """Whether it is a command of `gpt`, behind a pipe perhaps."""
        return bool(re.search(r"^((\w+=\S*|.*(\||&&)) +)?gpt( |$)", self.text))

    @property
    def stdin(self) -> str | None:
        """The file that it reads; of what a pipe or a person says there is one, said.md."""
        match = re.search(r"(?<!<)<\s*([\w./-]+)", self.text)
        if match:
            return match[1]
        return "said.md" if re.search(r"gpt chat|\| *gpt", self.text) else None

    @property
    def slow(self) -> bool:
        """Whether it runs in the slow suite alone."""
        return any(re.search(what, self.text) for what in SLOW_LINES)

    def here(self, new: str) -> str:
        """The same with what there is here; `new` is a name that is free."""
        text = self.text
        for pattern, meant in MEANT.items():
            text = re.sub(pattern, meant.replace("{new}", new), text, count=1)
        return text


def pages() -> list[Path]:
    """README.md and the guides that are written by hand."""
    guides = sorted((ROOT / "docs").glob("*.md"))
    return [ROOT / "README.md", *(guide for guide in guides if guide.name not in GENERATED)]


def _blocks(page: Path) -> Iterator[tuple[str, str]]:
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        margin = match["margin"]
        yield match["kind"], "\n".join(t.removeprefix(margin) for t in match["text"].split("\n"))


def _is_shell(kind: str, text: str) -> bool:
    first = next((t for t in text.split("\n") if t.strip() and not t.startswith("#")), "")
    return kind in _SHELLS or (not kind and bool(_COMMAND.match(first.removeprefix("$ "))))


def lines() -> list[Line]:
    """Every shell line, once a page. With prompts ($) in a block, the others are its output."""
    found = []
    for page in pages():
        for kind, text in _blocks(page):
            if not _is_shell(kind, text):
                continue
            given = re.sub(r"\\\n\s*", "", text).split("\n")
            if any(t.startswith("$ ") for t in given):
                given = [t[2:] for t in given if t.startswith("$ ")]
            bare = [re.sub(r"(^|\s+)#( .*|$)", "", t).strip() for t in given]
            found += [Line(page.name, t) for t in bare if t]
    return list(dict.fromkeys(found))


def yamls() -> list[tuple[str, str]]:
    """Every YAML of a page, with the page's name."""
    return [(p.name, text) for p in pages() for kind, text in _blocks(p) if kind == "yaml"]


def words_of(text: str) -> list[list[str]]:
    """The arguments of each `gpt` in a shell line, as a shell passes them: quotes, $'...'."""
    tell = r'gpt() { for w; do printf "%s\0" "$w" >&9; done; printf "\n\0" >&9; }; '
    run = "exec 9>&1 >/dev/null; "
    plain = re.sub(r"(?<![<>])[<>]{1,2}\s*[\w./-]+", "", text)  # files are not for this
    told = subprocess.run(
        ["bash", "-c", tell + run + plain], capture_output=True, text=True, timeout=20, check=True
    )
    found: list[list[str]] = [[]]
    for word in told.stdout.split("\0")[:-1]:
        if word == "\n":
            found.append([])
        else:
            found[-1].append(word)
    return found[:-1]


def small(words: list[str]) -> list[str]:
    """The same command at a small size."""
    if not words or words[0] not in ("pretrain", "finetune", "plan"):
        return words
    sizes = _SMALL
    if words[0] == "finetune":
        sizes += f" {_TASK}"
    elif not any(word.startswith("init=") for word in words):
        sizes += f" {_SHAPE}" if not words[1].endswith(".txt") else ""
    sets = [part for size in sizes.split() for part in ("--set", size)]
    return [*words[:2], *sets, *words[2:]]


def stands_for(line: str) -> str | None:
    """The `gpt` command that a line of a launcher or script comes to; None for other lines."""
    text = re.sub(r"^@reboot .*?&& ", "", line)
    text = re.sub(r"^(\w+=('[^']*'|\S*)\s+)+", "", text)
    if match := re.match(r"torchrun .*? -m gptcli (.*)", text):
        return f"gpt {match[1]}"
    if match := re.match(r"(?:bash|sbatch).* scripts/(?:gpu_box|slurm|spot)\.sh (.*)", text):
        return f"gpt pretrain {match[1]}"
    return text if text.startswith("gpt ") else None


def environment() -> dict[str, str]:
    """Of the lines that are not `gpt`'s: no proxy stands between curl and this machine."""
    return {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
