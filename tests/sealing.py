"""Manifests rewritten after their files were changed, as somebody who means it would."""

import hashlib
import json
from pathlib import Path
from typing import Any

from gptcli.runs.manifest import sealed


def reseal(directory: Path, **changes: Any) -> None:
    """Give the manifest of a checkpoint the hashes of its files as they are now, and `changes`."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        content = (directory / name).read_bytes()
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    path.write_text(json.dumps(sealed({**manifest, **changes})))
