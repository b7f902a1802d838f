"""Error against cost for every exit of a network: which branches are practical, and which to deploy for a budget.

Figure 5 of the multi-exit ViT paper, its notion of a practical branch, and what follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crowdexit.errors import CrowdExitError
from crowdexit.evaluation.cost import for_one_image, measure
from crowdexit.evaluation.files import blank, csv_text, markdown_table, write_files
from crowdexit.models import zoo
from crowdexit.models.network import FINAL


class TradeoffError(CrowdExitError):
    """Budgets that mean nothing, or no exits to choose from."""


@dataclass(frozen=True)
class Point:
    """One exit.

    Attributes:
        exit: its name. place: where it stands (``final`` for the final exit). kind: of the branch.
        macs: multiply-adds of one view, up to and including it.
        error: MAE (or the share of wrong answers); lower is better.
        practical: lower in error than every exit that costs less.
    """

    exit: str
    place: str
    kind: str
    macs: int
    error: float
    practical: bool = False


def costs(network_of: zoo.Spec) -> dict[str, int]:
    """Multiply-adds up to and including each exit that a network has, by name; of one view, one second of audio."""
    network, features = for_one_image(network_of)
    stages, exits = measure(network, features)
    return {name: (sum(stages[: network.stage_of(name) + 1]) + exits[name]) // 2 for name in network.exit_names}


def points(spec: zoo.Spec, errors: Mapping[str, float]) -> list[Point]:
    """The exits of a network whose errors are known, the cheapest first, the practical ones marked.

    A branch is *practical* if it is more accurate than every earlier one (multi-exit ViT paper, IV). Several at
    one layer count by their own cost, so that all of them that trade are offered.
    """
    own = {e.name: (e.place, e.kind) for e in spec.exits} | {FINAL: (FINAL, FINAL)}
    macs = costs(spec)
    best = float("inf")
    made = []
    for name in sorted((name for name in errors if name in macs), key=lambda name: (macs[name], errors[name])):
        practical = errors[name] < best
        best = min(best, errors[name])
        made.append(Point(name, *own[name], macs[name], errors[name], practical))
    return made


def recommend(made: Sequence[Point], budgets: Sequence[float]) -> list[tuple[float, Point | None]]:
    """For each budget in multiply-adds the practical exit with the least error that fits; None where none does.

    Raises:
        TradeoffError: for a budget that is not above zero.
    """
    answers = []
    for budget in budgets:
        if not budget > 0:
            raise TradeoffError(f"a budget of {budget:g} multiply-adds is not positive")
        fitting = [p for p in made if p.practical and p.macs <= budget]
        answers.append((budget, fitting[-1] if fitting else None))
    return answers


def as_csv(made: Sequence[Point]) -> str:
    """``exit,place,kind,macs,error,practical``, a line each."""
    header = ["exit", "place", "kind", "macs", "error", "practical"]
    return csv_text(header, ([p.exit, p.place, p.kind, p.macs, f"{p.error:.4f}", int(p.practical)] for p in made))


def as_markdown(made: Sequence[Point], budgets: Sequence[float], measure_name: str) -> str:
    """Kinds against layers, practical ones in bold, and the recommendation."""
    final = next((p for p in made if p.exit == FINAL), None)
    early = [p for p in made if p.exit != FINAL]
    places = list(dict.fromkeys(p.place for p in sorted(early, key=lambda p: (len(p.place), p.place))))
    kinds = list(dict.fromkeys(p.kind for p in early))
    lines = [f"{measure_name} of each branch at each location; **practical**: better than every cheaper exit.", ""]
    rows = []
    for kind in kinds:
        cells = []
        for place in places:
            there = [p for p in early if (p.kind, p.place) == (kind, place)]
            cells.append(" / ".join(f"**{p.error:.1f}**" if p.practical else f"{p.error:.1f}" for p in there))
        rows.append([kind, *cells])
    lines += markdown_table(["branch", *places], rows)
    if final is not None:
        lines += ["", f"The final exit: {final.error:.1f} at {final.macs / 1e9:.2f}·10⁹ multiply-adds."]
    advice = []
    for budget, point in recommend(made, budgets):
        found = ["none fits", "", ""]
        if point is not None:
            found = [point.exit, f"{point.macs / 1e9:.2f}", f"{point.error:.1f}"]
        advice.append([f"{budget / 1e9:.2f}", *found])
    lines += ["", *markdown_table(["budget, 10⁹ multiply-adds", "exit", "its cost", measure_name], advice)]
    return "\n".join(lines) + "\n"


def draw(made: Sequence[Point], title: str, measure_name: str, path: Path) -> None:
    """Figure 5: error against multiply-adds, a mark a kind, practical exits circled, the final exit's line."""
    figure = blank(9, 5.5)
    axes = figure.subplots()
    early = [p for p in made if p.exit != FINAL]
    for number, kind in enumerate(dict.fromkeys(p.kind for p in early)):
        of_kind = [p for p in early if p.kind == kind]
        mark = "os^vDPX*<>hd"[number % 12]
        axes.plot([p.macs / 1e9 for p in of_kind], [p.error for p in of_kind], mark, label=kind, markersize=6)
    practical = [p for p in made if p.practical]
    xs, ys = [p.macs / 1e9 for p in practical], [p.error for p in practical]
    axes.plot(xs, ys, color="0.7", linewidth=1, zorder=0)
    axes.scatter(xs, ys, s=140, facecolors="none", edgecolors="black", label="practical")
    for p in (p for p in made if p.exit == FINAL):
        axes.axhline(p.error, color="black", linestyle="--", linewidth=1)
        axes.plot([p.macs / 1e9], [p.error], "k*", markersize=10, label="final exit")
    axes.set_xlabel("multiply-adds of one view, 10⁹")
    axes.set_ylabel(measure_name)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path)


def write(
    made: Sequence[Point], folder: Path, *, title: str, measure_name: str, budgets: Sequence[float] | None = None
) -> list[Path]:
    """Write ``tradeoff.csv``, ``tradeoff.md`` and ``tradeoff.png`` into a folder, each whole.

    Args:
        budgets: multiply-adds; default: a quarter, half, three quarters and all of what the costliest exit takes.

    Raises:
        CrowdExitError: if there is nothing to show, a budget means nothing, or the folder cannot be written.
    """
    if not made:
        raise TradeoffError("no exit with a known error")
    if budgets is None:
        most = max(p.macs for p in made)
        budgets = [most * share / 4 for share in (1, 2, 3, 4)]
    table = as_markdown(made, budgets, measure_name)
    return write_files(
        folder,
        {
            "tradeoff.csv": as_csv(made),
            "tradeoff.md": f"# {title}\n\n{table}",
            "tradeoff.png": lambda path: draw(made, title, measure_name, path),
        },
    )
