"""The memory of ``auto`` belongs to one test."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def memory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
