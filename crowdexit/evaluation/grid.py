"""What a search over d and h has found (SL-ViT paper, table X and the choice of table III)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from crowdexit.errors import CrowdExitError
from crowdexit.evaluation.files import blank, csv_text, markdown_table, write_files
from crowdexit.models import zoo


@dataclass(frozen=True)
class Candidate:
    """A branch of the grid.

    Attributes:
        exit: its name. dim, heads: d and h; None of the CNN branch.
        params: of the branch. value: accuracy in percent, or validation error, of the validation images.
    """

    exit: str
    dim: int | None
    heads: int | None
    params: int
    value: float


@dataclass(frozen=True)
class Grid:
    """A grid's candidates in order. ``measure`` is ``accuracy``, of which more is better, or ``error``."""

    measure: str
    candidates: tuple[Candidate, ...]

    @property
    def limit(self) -> int:
        """The CNN branch's parameters."""
        return max((c.params for c in self.candidates if c.dim is None), default=0)

    @property
    def best(self) -> Candidate | None:
        """The best SL-ViT with no more parameters than the CNN branch, or None if all have more."""
        fitting = [c for c in self.candidates if c.dim is not None and c.params <= self.limit]
        sign = -1 if self.measure == "accuracy" else 1
        return min(fitting, key=lambda c: sign * c.value, default=None)


def read_grid(run: Path) -> Grid:
    """The grid of a search's run.

    Raises:
        CrowdExitError: if its checkpoint is missing or damaged, or tells of no validation.
    """
    network, spec = zoo.load(run)
    found = []
    try:
        for e in spec.exits:
            metrics = spec.meta["validation"].get(e.name)
            if metrics is None:
                continue  # it stood there before
            dim, heads = (e.options.get(key, e.options.get(f"slvit_{key}")) for key in ("dim", "heads"))
            params = sum(p.numel() for p in network.exit_module(e.name).parameters())
            found.append(Candidate(e.name, dim, heads, params, float(metrics.get("accuracy", metrics["error"]))))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CrowdExitError(f"{run}: not a search that has run") from None
    return Grid("accuracy" if network.classifies else "error", tuple(found))


def as_markdown(grid: Grid) -> str:
    """Every candidate, those with more parameters than the CNN branch marked, and the best of the others."""
    rows = []
    for c in grid.candidates:
        over = " (more than CNN)" if c.dim is not None and c.params > grid.limit else ""
        d, h = ("–" if n is None else str(n) for n in (c.dim, c.heads))
        rows.append([c.exit, d, h, f"{c.params / 1e6:.3f}M{over}", f"{c.value:.4g}"])
    best = grid.best
    chosen = (
        "None has as few parameters as the CNN branch." if best is None else f"Best: d = {best.dim}, h = {best.heads}."
    )
    table = markdown_table(["branch", "d", "h", "parameters", grid.measure], rows)
    return "\n".join([*table, "", chosen]) + "\n"


def as_csv(grid: Grid) -> str:
    """``exit,d,h,params,MEASURE``, a line a candidate."""
    header = ["exit", "d", "h", "params", grid.measure]
    return csv_text(header, ([c.exit, c.dim, c.heads, c.params, f"{c.value:.6g}"] for c in grid.candidates))


def draw(grid: Grid, path: Path) -> None:
    """The measure against the heads, a line for each d, the CNN branch's level across."""
    figure = blank(6.5, 4.2)
    ax = figure.subplots()
    for dim in sorted({c.dim for c in grid.candidates if c.dim is not None}):
        own: Sequence[Candidate] = sorted((c for c in grid.candidates if c.dim == dim), key=lambda c: c.heads or 0)
        ax.plot([c.heads or 0 for c in own], [c.value for c in own], "o-", label=f"d = {dim}")
    for c in grid.candidates:
        if c.dim is None:
            ax.axhline(c.value, color="0.3", linestyle="--", label="CNN")
    ax.set_xlabel("heads")
    ax.set_ylabel(grid.measure)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.savefig(path)


def write(grid: Grid, folder: Path) -> list[Path]:
    """Write ``grid.csv``, ``grid.md`` and ``grid.png`` into a folder, each whole.

    Raises:
        CrowdExitError: if the folder cannot be written.
    """
    return write_files(
        folder, {"grid.csv": as_csv(grid), "grid.md": as_markdown(grid), "grid.png": partial(draw, grid)}
    )
