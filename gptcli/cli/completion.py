"""Shell completion: what can stand where the cursor is.

`gpt completion SHELL` prints a script that asks `gpt` itself, with the line up to the cursor as its
one argument and the shell's name in GPT_COMPLETE. What a parameter takes is told by its metavar.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

SCRIPTS = {
    "bash": """_gpt_completion() {
    local IFS=$'\\n'
    COMPREPLY=($(GPT_COMPLETE=bash gpt "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
    [[ ${COMPREPLY[0]} == *[=/] ]] && compopt -o nospace
}
complete -o bashdefault -o default -F _gpt_completion gpt
""",
    "zsh": """#compdef gpt
_gpt_completion() {
    local -a found
    found=("${(@f)$(GPT_COMPLETE=zsh gpt "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    found=("${(@)found:#}")
    if (( ! ${#found} )); then
        _files
        return
    fi
    compadd -S '' -- "${(@M)found:#*[=/]}"
    compadd -- "${(@)found:#*[=/]}"
}
compdef _gpt_completion gpt
""",
    "fish": """complete -c gpt -e
complete -c gpt -k -a '(GPT_COMPLETE=fish gpt (commandline -cp | string collect) 2>/dev/null)'
""",
}
_BREAKS = re.compile(r"^.*[=:]")  # behind which bash begins a word of its own
_CONFIGS = (".yaml", ".yml")
_MOST = 200  # candidates: more help nobody


def candidates(line: str, shell: str, names: Sequence[str], tree: Callable[..., Any]) -> list[str]:
    """The words that can end `line`. `names` are the commands; `tree` makes the command of some
    arguments."""
    before, incomplete = _words(line)
    if not any(not word.startswith("-") for word in before) and not incomplete.startswith("-"):
        found: Iterator[str] = iter(names)
    else:
        found = _of_command(tree(before), before, incomplete)
    fitting = [word for word in dict.fromkeys(found) if word.startswith(incomplete)][:_MOST]
    typed = _BREAKS.match(incomplete)
    cut = len(typed[0]) if typed and shell == "bash" else 0
    return [word[cut:] for word in fitting]


def _words(line: str) -> tuple[list[str], str]:
    """The whole words behind `gpt`, and the one at the cursor."""
    ends_in_space = line[-1:].isspace()
    for quote in ("", "'", '"'):  # one that is still open
        try:
            words = shlex.split(line + quote)
            break
        except ValueError:
            continue
    else:
        words = line.split()
    return (words[1:], "") if ends_in_space else (words[1:-1], words[-1] if words[1:] else "")


def _of_command(command: Any, before: list[str], incomplete: str) -> Iterator[str]:
    arguments: list[str] = []
    option = None  # whose value comes next
    for word in before:
        if option is not None:
            option = None
        elif word.startswith("-") and word != "-":
            taking = _option(command, word)
            option = taking if taking is not None and not taking.is_flag else None
        elif word in getattr(command, "commands", {}):
            command = command.commands[word]
        else:
            arguments.append(word)
    if option is not None:
        return _values(str(option.metavar or ""), incomplete)
    name, given, value = incomplete.partition("=")
    if given and name.startswith("--"):
        option = _option(command, name)
        found = _values(str(option.metavar or "") if option is not None else "", value)
        return (f"{name}={word}" for word in found)
    if incomplete.startswith("-"):
        return (name for param in _options(command) for name in param.opts if name[:2] == "--")
    if hasattr(command, "commands"):
        return iter(() if arguments else command.commands)
    places = [param for param in command.params if param.param_type_name == "argument"]
    if not places:
        return iter(())
    return _values(str(places[min(len(arguments), len(places) - 1)].metavar or ""), incomplete)


def _options(command: Any) -> list[Any]:
    return [param for param in command.params if param.param_type_name == "option"]


def _option(command: Any, word: str) -> Any:
    return next((param for param in _options(command) if word in param.opts), None)


def _values(metavar: str, incomplete: str) -> Iterator[str]:
    """What a parameter of this metavar takes, as far as it can be listed."""
    from gptcli.config.shipped import shipped_names

    kind = metavar.strip("[].").split("]")[0]
    if kind == "CONFIG":
        yield from shipped_names()
        yield from _paths(incomplete, _CONFIGS)
    elif kind in ("MODEL", "SOURCE"):
        yield from _runs(paths=True)
        yield from _checkpoints(incomplete)
    elif kind in ("RUN", "A B [C"):
        yield from _runs(paths=False)
    elif kind == "NAME":
        yield from shipped_names()
    elif kind == "KEY=VALUE":
        yield from _settings(incomplete)
    elif kind == "D":
        yield from ("auto", "cpu", "cuda", "mps")
    elif kind == "SHELL":
        yield from SCRIPTS
    elif "|" in kind and kind == kind.lower():
        yield from kind.split("|")


def _paths(incomplete: str, endings: tuple[str, ...]) -> Iterator[str]:
    folder = incomplete.rpartition("/")[0]
    here = incomplete[: len(folder) + 1] if "/" in incomplete else ""
    try:
        for entry in sorted(os.scandir(here or "."), key=lambda entry: entry.name):
            if entry.name.startswith(".") and not incomplete[len(here) :].startswith("."):
                continue
            if entry.is_dir():
                yield f"{here}{entry.name}/"
            elif entry.name.endswith(endings):
                yield f"{here}{entry.name}"
    except OSError:
        return


def _runs(paths: bool) -> Iterator[str]:
    """Newest first: their paths, or their names, which `gpt runs` takes too."""
    from gptcli.runs.run_dir import RUN_JSON, runs_root

    root = runs_root()
    try:
        runs = [run for run in root.iterdir() if (run / RUN_JSON).is_file()]
        runs.sort(key=lambda run: run.stat().st_mtime, reverse=True)
    except OSError:
        return
    yield from (str(run) if paths else run.name for run in runs)


def _checkpoints(incomplete: str) -> Iterator[str]:
    """Those of the run that is written out up to its `/`, the newest first."""
    from gptcli.runs.listing import checkpoint_names
    from gptcli.runs.run_dir import CHECKPOINTS, is_run_dir

    parts = Path(incomplete + "x").parts  # so that what ends in / has a last part
    for depth in range(len(parts) - 1, 0, -1):
        run = Path(*parts[:depth])
        if is_run_dir(run):
            names = reversed(checkpoint_names(run))
            yield from (str(run / CHECKPOINTS / name) for name in names)


def _settings(incomplete: str) -> Iterator[str]:
    """`KEY=` of all keys; behind one's `=`, its values."""
    from gptcli.config.fields import wanted_at
    from gptcli.config.presets import PRESETS
    from gptcli.config.schema import Config

    key, given, _ = incomplete.partition("=")
    if not given:
        yield from (f"{name}=" for name in _keys(Config, ""))
        return
    if key == "model.preset":
        values: Iterable[str] = PRESETS
    else:
        want = wanted_at(key.split("."))
        values = () if want is None else want.choices
        values = (*values, *(("true", "false") if want is not None and want.switch else ()))
        values = (*values, *(("null",) if want is not None and want.null else ()))
    yield from (f"{key}={value}" for value in values)


def _keys(section: Any, prefix: str) -> Iterator[str]:
    from gptcli.config.data_schema import SourceConfig
    from gptcli.config.fields import keys_of, wanted

    for name, field in keys_of(section).items():
        inner = wanted(field.annotation).section
        if inner is None or inner is SourceConfig:
            yield f"{prefix}{name}"
        else:
            yield from _keys(inner, f"{prefix}{name}.")
