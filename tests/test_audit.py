"""The audit of dependencies, as far as it needs no network."""

import audit
import pytest


def test_no_version_with_a_known_hole() -> None:
    """Neither what is pinned nor the oldest that is allowed."""
    assert audit.too_old() == []
    assert {"torch", "jinja2"} <= audit.lowest().keys() & audit.pinned().keys()


def test_an_old_version_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "lowest", lambda: {"torch": "2.5.1", "jinja2": "3.10"})
    (found,) = audit.too_old()
    assert found.startswith("pyproject.toml: torch 2.5.1: CVE-2025-32434")


def test_no_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit that could not be done must not look like one that found nothing."""

    class Done:
        stdout, stderr = "", "ConnectionError: no route to host\n"

    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: Done)
    found, said = audit.of_pypi()
    assert found == []
    assert "left out" in said
    assert "no route to host" in said
