"""Tables of trained runs in the layout of the multi-exit ViT paper, its table I beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from crowdexit.errors import CrowdExitError
from crowdexit.evaluation.files import blank, csv_text, markdown_table, write_files
from crowdexit.models import zoo
from crowdexit.models.network import FINAL

STRATEGIES = {"branches": "classifier-wise", "end-to-end": "end-to-end", "layer-wise": "layer-wise"}
# In the paper's order; then those that it does not have.
NAMES = {
    "mlp": "MLP-EE",
    "cnn-ignore": "CNN-Ignore-EE",
    "cnn-add": "CNN-Add-EE",
    "cnn-project": "CNN-Project-EE",
    "vit": "ViT-EE",
    "mixer": "MLP-Mixer-EE",
    "resmlp": "ResMLP-EE",
    "slvit": "SL-ViT",
    "slvit-audio": "SL-ViT with audio",
    "gmlp": "gMLP-EE",
    "fnet": "FNet-EE",
    "perceiver": "Perceiver-EE",
}

# Multi-exit ViT paper, table I: (the branch after layer 6, the final exit); accuracy in percent, of DISCO the MAE.
PAPER_SETS = ("CIFAR-10", "CIFAR-100", "Fashion MNIST", "DISCO")
PAPER_TABLE_I: Mapping[str, tuple[tuple[float, float], ...]] = {
    "mlp": ((94.90, 96.73), (81.12, 87.45), (94.47, 94.85), (11.04, 10.72)),
    "cnn-ignore": ((95.95, 97.10), (77.97, 85.90), (94.43, 94.67), (21.88, 11.09)),
    "cnn-add": ((94.94, 96.87), (75.75, 86.96), (94.22, 94.77), (18.46, 11.24)),
    "cnn-project": ((94.66, 96.80), (77.95, 86.89), (94.33, 94.69), (18.23, 11.29)),
    "vit": ((95.89, 96.99), (85.23, 89.44), (94.39, 94.84), (11.06, 11.01)),
    "mixer": ((95.78, 97.07), (81.72, 87.53), (94.41, 94.88), (13.03, 10.93)),
    "resmlp": ((95.44, 97.35), (82.41, 87.57), (94.38, 94.95), (16.99, 11.36)),
}
PAPER_WITHOUT_EXITS = (98.31, 91.24, 95.00, 11.07)


@dataclass(frozen=True)
class Figure:
    """What one exit of one run reached.

    Attributes:
        strategy: by which it was trained; empty for a backbone without exits.
        places: of all branches of the run, in order.
        data: name of the data set. measure: ``MAE`` or ``accuracy``.
        kind: of the branch in whose row it stands; empty for a backbone without exits.
        place: of the exit, or ``final``.
    """

    strategy: str
    places: tuple[str, ...]
    data: str
    measure: str
    kind: str
    place: str
    value: float


def data_of(spec: zoo.Spec) -> str:
    """The name of the prepared file that a run was trained on.

    Raises:
        CrowdExitError: if the checkpoint does not tell.
    """
    try:
        return str(spec.meta["recipe"]["data"]["store"])
    except (KeyError, TypeError):
        raise CrowdExitError(f"{spec.model}: the checkpoint does not record what it was trained on") from None


def figures(spec: zoo.Spec, data: str, values: Mapping[str, float], measure: str) -> list[Figure]:
    """The figures of one run, from what each of its exits reached (by name).

    The final exit stands in the row of each kind of branch that it was trained with.

    Raises:
        CrowdExitError: if two exits of the run claim one cell.
    """
    stage = str(spec.meta["recipe"]["stage"])
    if stage not in STRATEGIES:
        return [Figure("", (), data, measure, "", FINAL, values[FINAL])]
    trained = {e["name"] for e in spec.meta["recipe"]["exits"]}
    exits = [e for e in spec.exits if e.name in trained]
    places = tuple(sorted({e.place for e in exits}, key=lambda place: (len(place), place)))
    made = [Figure(STRATEGIES[stage], places, data, measure, e.kind, e.place, values[e.name]) for e in exits]
    if len({(f.kind, f.place) for f in made}) < len(made):
        raise CrowdExitError(f"{spec.model}: two branches of one kind at one location; the table has one cell for them")
    kinds = dict.fromkeys(e.kind for e in exits)
    return [*made, *(Figure(STRATEGIES[stage], places, data, measure, kind, FINAL, values[FINAL]) for kind in kinds)]


def cell(values: Sequence[float]) -> str:
    """One value, the mean of several runs ± their standard deviation, or a dash for none."""
    if not values:
        return "–"
    return f"{values[0]:.2f}" if len(values) == 1 else f"{mean(values):.2f} ± {stdev(values):.2f}"


def as_markdown(made: Sequence[Figure]) -> str:
    """A table for each strategy and choice of places, the paper's table I behind the one that is laid out like it."""
    sets = {f.data: f.measure for f in made}
    alone = {data: [f.value for f in made if f.data == data and not f.strategy] for data in sets}
    lines: list[str] = ["# Multi-exit training"]
    groups = list(dict.fromkeys((f.strategy, f.places) for f in made if f.strategy))
    for strategy, places in groups:
        group = [f for f in made if (f.strategy, f.places) == (strategy, places)]
        cells: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for f in group:
            cells[f.kind, f.data, f.place].append(f.value)
        used = [data for data in sets if any(f.data == data for f in group)]
        after = f"layer{'s' if len(places) > 1 else ''} {', '.join(places)}"
        lines += ["", f"## {strategy.capitalize()}, branches after {after}", ""]
        columns = [(data, place) for data in used for place in (*places, FINAL)]
        header = ["branch", *(f"{data}, {sets[data]} @{place}" for data, place in columns)]
        kinds = [kind for kind in NAMES if any(f.kind == kind for f in group)]
        kinds += sorted({f.kind for f in group} - set(NAMES))
        rows = [[NAMES.get(kind, kind), *(cell(cells[kind, *column]) for column in columns)] for kind in kinds]
        lines += markdown_table([part.replace("@final", "final") for part in header], rows)
        known = [f"{data} {cell(alone[data])}" for data in used if alone[data]]
        if known:
            lines += ["", f"Backbones without exits: {', '.join(known)}."]
        if (strategy, places) == ("end-to-end", ("6",)):
            lines += ["", "The paper's table I, from ImageNet weights on the whole sets:", "", *_paper()]
    return "\n".join(lines) + "\n"


def _paper() -> list[str]:
    header = ["branch"]
    for data in PAPER_SETS:
        measure = "MAE" if data == "DISCO" else "accuracy"
        header += [f"{data}, {measure} @6", f"{data}, {measure} final"]
    rows = [
        [NAMES[kind], *(f"{value:.2f}" for pair in pairs for value in pair)] for kind, pairs in PAPER_TABLE_I.items()
    ]
    without = ", ".join(f"{data} {value:.2f}" for data, value in zip(PAPER_SETS, PAPER_WITHOUT_EXITS, strict=True))
    return [*markdown_table(header, rows), "", f"Backbones without exits: {without}."]


def as_csv(made: Sequence[Figure]) -> str:
    """``strategy,places,data,measure,branch,exit,value``, a line a figure."""
    header = ["strategy", "places", "data", "measure", "branch", "exit", "value"]
    rows = ([f.strategy, " ".join(f.places), f.data, f.measure, f.kind, f.place, f"{f.value:.4f}"] for f in made)
    return csv_text(header, rows)


def draw(made: Sequence[Figure], path: Path) -> None:
    """A panel for each table and data set: the figure of each kind of branch at each exit."""
    panels = list(dict.fromkeys((f.strategy, f.places, f.data, f.measure) for f in made if f.strategy))
    figure = blank(5 * len(panels), 4.5)
    axes = figure.subplots(1, len(panels), squeeze=False)
    for panel, ax in zip(panels, axes[0], strict=True):
        strategy, places, data, measure = panel
        for number, kind in enumerate(NAMES):
            own = [f for f in made if (f.strategy, f.places, f.data, f.measure, f.kind) == (*panel, kind)]
            exits = [e for e in (*places, FINAL) if any(f.place == e for f in own)]
            if exits:
                values = [mean(f.value for f in own if f.place == e) for e in exits]
                ax.plot(exits, values, f"{'os^vDPX*<>hd'[number % 12]}-", label=NAMES[kind], linewidth=1)
        ax.set_title(f"{strategy}, {data}")
        ax.set_xlabel("exit after layer")
        ax.set_ylabel(measure)
        ax.grid(alpha=0.3)
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path)


def write(made: Sequence[Figure], folder: Path) -> list[Path]:
    """Write ``table.csv``, ``table.md`` and ``table.png`` into a folder, each whole.

    Raises:
        CrowdExitError: if no run has branches, or the folder cannot be written.
    """
    if not any(f.strategy for f in made):
        raise CrowdExitError("no run has trained branches; no table to write")
    return write_files(
        folder, {"table.csv": as_csv(made), "table.md": as_markdown(made), "table.png": partial(draw, made)}
    )
