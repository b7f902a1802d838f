"""Folds of a prepared set: parts of its samples, told from each other by their ids alone."""

from __future__ import annotations

import zlib


def in_fold(id: str, fold: str) -> bool:
    """Whether a sample belongs to a fold, ``K/N``: the K-th of N, counted from 0, of about the same size.

    Examples:
        >>> [in_fold("A_IMG_1", f"{k}/3") for k in range(3)].count(True)
        1
    """
    number, of = map(int, fold.split("/"))
    return zlib.crc32(id.encode()) % of == number
