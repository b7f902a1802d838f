"""The user's cache folder wherever the environment says, or nowhere; the processor's name and abilities."""

from __future__ import annotations

from pathlib import Path

import pytest

from crowdexit.utils import machine
from crowdexit.utils.machine import cache_folder, has_bfloat16, processor


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "crowdexit"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for not_a_place in ("", "relative/to/anywhere"):  # the XDG specification has such a path ignored
        monkeypatch.setenv("XDG_CACHE_HOME", not_a_place)
        assert cache_folder() == tmp_path / "home" / ".cache" / "crowdexit"


def test_without_a_home_there_is_no_cache(monkeypatch, homeless):
    assert cache_folder() is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor : 0\nmodel name\t: Xeon 8481C\nflags\t\t: fpu amx_tile\n\nprocessor : 1\nmodel name : other\n",
            ("Xeon 8481C", "fpu amx_tile"),
        ),
        ("processor : 0\nBogoMIPS : 50\nFeatures : fp asimd sve\n", ("aarch64", "fp asimd sve")),
        (None, ("aarch64", "")),
    ],
    ids=["x86", "ARM", "not Linux"],
)
def test_the_processor(text, expected, monkeypatch):
    def read_text(path: Path, *_: str) -> str:
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    assert processor() == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2 avx512f", False), ("avx512f avx512_bf16", True), ("amx_bf16 amx_tile", True), ("asimd bf16", True)],
)
def test_bfloat16(flags, expected, monkeypatch):
    monkeypatch.setattr(machine, "processor", lambda: ("any", flags))
    assert has_bfloat16() is expected
