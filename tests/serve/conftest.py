from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Server, make_model, serving

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    return make_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """A server that the tests of a module share."""
    with serving("--model", str(model), "--max-tokens", "400") as running:
        yield running
