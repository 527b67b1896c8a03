"""Whether the dependencies have known holes: those that matter here, and all that PyPI knows of.

    python scripts/audit.py

First, without a network: neither the pinned versions nor the oldest that pyproject.toml allows may
be among ADVISORIES. Then pip-audit asks PyPI about every pinned version; where PyPI's advisories
cannot be reached, that is said and left out. Exit code 1 if anything is found.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
_SECONDS = 120

# Package -> the first version without the hole, what it is called, and what it would do to us.
ADVISORIES = {
    "torch": ("2.6", "CVE-2025-32434", "torch.load runs code in spite of weights_only=True"),
    "transformers": ("5.3", "CVE-2026-4372", "a config.json names code that is loaded"),
    "jinja2": ("3.1.6", "CVE-2025-27516", "a template leaves the sandbox"),
    "pyarrow": ("14.0.1", "CVE-2023-47248", "reading an IPC or Parquet file runs code"),
    "pyyaml": ("5.4", "CVE-2020-14343", "the full loader runs code"),
    "tqdm": ("4.66.3", "CVE-2024-34062", "arguments of its command line run code"),
    "h11": ("0.16", "CVE-2025-43859", "a request is smuggled past a proxy in front of gpt serve"),
    "requests": ("2.32.4", "CVE-2024-47081", "credentials of .netrc go to another host"),
}


def pinned() -> dict[str, str]:
    """The versions of scripts/constraints.txt."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    found = [re.match(r"([\w.-]+)==([^\s;]+)", line) for line in lines]
    return {match[1].lower(): match[2] for match in found if match}


def lowest() -> dict[str, str]:
    """The oldest versions that pyproject.toml allows."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return {name.lower(): version for name, version in re.findall(r'"([\w-]+)[>=]=([\d.]+)"', text)}


def too_old() -> list[str]:
    """What is allowed or pinned and has one of the ADVISORIES."""
    found = []
    for where, versions in (("scripts/constraints.txt", pinned()), ("pyproject.toml", lowest())):
        for name, (fixed, advisory, what) in ADVISORIES.items():
            if name in versions and Version(versions[name]) < Version(fixed):
                found.append(
                    f"{where}: {name} {versions[name]}: {advisory}, {what}; {fixed} has not"
                )
    return found


def of_pypi() -> tuple[list[str], str]:
    """What PyPI knows of the pinned versions, and what is to be said of the asking."""
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--format", "json"]
    command += ["--no-deps", "--disable-pip", "-r", str(CONSTRAINTS)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        entries = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return [], f"PyPI's advisories: no answer in {_SECONDS} s, left out"
    except (ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return [], f"PyPI's advisories cannot be reached, left out: {last[:200]}"
    asked = [entry for entry in entries if "vulns" in entry]
    found = [
        f"{entry['name']} {entry['version']}: {hole['id']},"
        f" fixed in {', '.join(hole['fix_versions']) or 'no version'}"
        for entry in asked
        for hole in entry["vulns"]
    ]
    if not asked:
        return [], "PyPI's advisories cannot be reached, left out"
    return found, f"PyPI's advisories: {len(asked)} of {len(entries)} pinned versions looked up"


def main() -> int:
    old, (holes, said) = too_old(), of_pypi()
    print(f"{len(ADVISORIES)} advisories that matter here: {len(old)} found")
    print(f"{said}: {len(holes)} found" if holes else said)
    for line in (*old, *holes):
        print(f"error: {line}")
    return int(bool(old or holes))


if __name__ == "__main__":
    raise SystemExit(main())
