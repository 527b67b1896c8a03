"""`gpt doctor`: what this machine has, what will be used, what is missing and what to do."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli.terminal import columns, write_out
from gptcli.errors import ResourceError

if TYPE_CHECKING:
    from gptcli.doctor import Examination


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> int:
    """Show what this machine has, and what is broken.

    Versions, devices, memory, disk and extras, and each problem with what to do about it. Exit code
    6 if something is broken without which no model can be trained here.
    """
    from gptcli.doctor import examine

    found = examine()
    write_out(_json(found) if as_json else _page(found))
    return 0 if found.works else ResourceError.exit_code


def _json(found: "Examination") -> str:
    import json

    extras = [{**asdict(extra), "install": extra.install} for extra in found.extras]
    return json.dumps({"works": found.works, **asdict(found), "extras": extras}, indent=2) + "\n"


def _page(found: "Examination") -> str:
    facts = [[name, value] for name, value in found.facts.items()]
    parts = [columns(facts)] if facts else []
    if found.extras:
        rows = [
            [extra.name, "missing" if extra.missing else "installed", extra.adds]
            for extra in found.extras
        ]
        parts.append("extras, each by: pip install 'gptcli[NAME]'\n" + columns(rows))
    if not found.problems:
        parts.append("no problems found\n")
    for number, problem in enumerate(found.problems, 1):
        weight = "problem" if problem.essential else "warning"
        parts.append(f"{number}. {weight}: {problem.what}\n   to do: {problem.do}\n")
    return "\n".join(parts)
