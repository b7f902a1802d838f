"""Counts of training images by networks that were trained without them, as a table: what intervals take their shape of.

A recipe's ``data.leave_out`` leaves a fold of the training images out; here its network counts that fold.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from crowdexit.data.folds import in_fold
from crowdexit.data.store import Store
from crowdexit.errors import CrowdExitError
from crowdexit.evaluation.evaluate import count_samples
from crowdexit.inference.counter import load
from crowdexit.models import zoo
from crowdexit.utils.files import atomic_write, write_problem

COLUMNS = ("id", "exit", "count", "truth")
CrossFitted = Mapping[str, tuple[Sequence[float], Sequence[float]]]


class CrossFitError(CrowdExitError):
    """Runs whose networks have seen what they are to count, or a table that is none."""


def cross_fit(
    runs: Sequence[str],
    data: Path,
    out: Path,
    *,
    runtime: str = "auto",
    progress: Callable[[int], AbstractContextManager[Any]] = lambda total: nullcontext(),
) -> int:
    """Count with each run's network, without audio, the training images that it left out, and write a row an exit.

    Args:
        runs: folders of trained runs, or checkpoints, one for each fold.
        data: the prepared file that they were trained on.
        progress: given the number of images, a context whose value is called after each.

    Returns:
        The number of images.

    Raises:
        CrowdExitError: for a run that left nothing out or what another has, or a file that cannot be read or written.
    """
    rows: dict[str, list[tuple[str, float, float]]] = {}
    with Store(data) as store:
        for run in runs:
            part = zoo.read_spec(zoo.checkpoint_path(run)).meta.get("recipe", {}).get("data", {})
            fold = part.get("leave_out")
            if fold is None:
                raise CrossFitError(f"{run}: no training images were left out; train it with data.leave_out")
            ids = [id for id in store.ids(part["train"], part["train_ids"]) if in_fold(id, fold)]
            if twice := next((id for id in ids if id in rows), None):
                raise CrossFitError(f"{run}: {twice} was left out of another run as well")
            counter = load(run, runtime=runtime)
            counter.exits = counter.network.exit_names
            with progress(len(ids)) as advance:
                for sample in count_samples(counter, store, part["train"], ids, audio=False, progress=advance):
                    rows[sample.id] = [(result.exit, result.count, sample.truth) for result in sample.results]
    try:
        with atomic_write(out) as written, written.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(COLUMNS)
            for id, said in rows.items():
                table.writerows((id, exit, f"{count:.3f}", f"{truth:g}") for exit, count, truth in said)
    except OSError as error:
        raise CrossFitError(write_problem(out, error, kept="nothing is written")) from None
    return len(rows)


def read_counts(path: Path) -> CrossFitted:
    """Counts and true counts by exit, from what :func:`cross_fit` wrote.

    Raises:
        CrossFitError: if it cannot be read, or is no such table.
    """
    read: dict[str, tuple[list[float], list[float]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.reader(file)
            if tuple(next(table, ())) != COLUMNS:
                raise ValueError
            for _, exit, count, truth in table:
                counts, truths = read.setdefault(exit, ([], []))
                counts.append(float(count))
                truths.append(float(truth))
    except OSError as error:
        raise CrossFitError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise CrossFitError(f"{path}: not a table of crowdexit cross-fit (columns {', '.join(COLUMNS)})") from None
    return read
