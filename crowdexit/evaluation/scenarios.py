"""The tables of the SL-ViT paper (IV to VIII) from trained runs, its figures beside them where they are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from crowdexit.errors import CrowdExitError
from crowdexit.evaluation.cost import cost_of
from crowdexit.evaluation.files import blank, csv_text, markdown_table, write_files
from crowdexit.evaluation.tables import cell
from crowdexit.models import zoo
from crowdexit.models.network import FINAL

COPYCAT = "cc-"
METHODS = {"cnn": "CNN", "slvit": "SL-ViT", f"{COPYCAT}cnn": "CC-CNN", f"{COPYCAT}slvit": "CC-SL-ViT"}
# Accuracy in percent (IV) or MAE (VIII) of CNN and SL-ViT, by backbone and place.
PAPER: Mapping[str, Mapping[tuple[str, str], tuple[str, str]]] = {
    "IV": {
        ("resnet152", "1"): ("66.78", "71.06"),
        ("resnet152", "2"): ("79.31", "81.18"),
        ("densenet201", "1"): ("71.27", "76.38"),
        ("densenet201", "2"): ("80.64", "83.53"),
        ("inceptionv3", "1"): ("77.27", "79.99"),
        ("inceptionv3", "2"): ("79.55", "81.72"),
    },
    "VIII": {
        ("audiocsrnet", "V1"): ("16.99 ± 0.28", "15.04 ± 0.71"),
        ("audiocsrnet", "AV1"): ("17.00 ± 0.23", "14.58 ± 0.64"),
        ("audiocsrnet", "AV2"): ("17.90 ± 0.25", "17.03 ± 1.04"),
    },
}


@dataclass(frozen=True)
class Outcome:
    """What one run of a suite reached.

    Attributes:
        backbone: of the suite. spec: of the checkpoint.
        copycat: whether it learned from unlabelled samples too.
        values: by exit, accuracy in percent or MAE (``measure``).
    """

    backbone: str
    spec: zoo.Spec
    copycat: bool
    measure: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One backbone and place: what each method reached over the seeds, and what its branch costs."""

    backbone: str
    place: str
    measure: str
    values: Mapping[str, Sequence[float]]
    params: Mapping[str, int]
    flops: Mapping[str, int]
    speedup: Mapping[str, float]
    final: Sequence[float]


def _trained(outcome: Outcome) -> set[str]:
    """The exits that the run trained; others may have stood on the backbone before."""
    return {e["name"] for e in outcome.spec.meta["recipe"]["exits"]} & set(outcome.values)


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """The table's rows, in the order in which backbones and places come."""
    keys = list(dict.fromkeys((o.backbone, e.place) for o in outcomes for e in o.spec.exits if e.name in _trained(o)))
    rows = []
    for backbone, place in keys:
        own = [o for o in outcomes if o.backbone == backbone]
        values: dict[str, list[float]] = {}
        params, flops, speedup = {}, {}, {}
        for o in own:
            for e, c in zip(o.spec.exits, cost_of(o.spec, o.spec.model).exits, strict=True):
                if e.place != place or e.name not in _trained(o):
                    continue
                values.setdefault(f"{COPYCAT}{e.kind}" if o.copycat else e.kind, []).append(o.values[e.name])
                params[e.kind], flops[e.kind], speedup[e.kind] = c.branch_params, c.total_flops, c.speedup
        final = [o.values[FINAL] for o in own if FINAL in o.values][:1]  # one backbone for all seeds
        rows.append(Row(backbone, place, own[0].measure, values, params, flops, speedup, final))
    return rows


def as_markdown(rows: Sequence[Row], title: str, paper: str | None) -> str:
    """The paper's columns; its own figures last."""
    kinds = [kind for kind in METHODS if any(kind in row.values for row in rows)]
    plain = [kind for kind in kinds if not kind.startswith(COPYCAT)]
    known = PAPER.get(paper or "", {})
    beside = any((row.backbone, row.place) in known for row in rows)
    header = ["backbone", "branch", *(f"{METHODS[kind]}, {rows[0].measure}" for kind in kinds), "final"]
    header += [f"parameters {METHODS[kind]}" for kind in plain] + [f"FLOPS {METHODS[kind]}" for kind in plain]
    header += [f"speedup {METHODS[plain[-1]]}"] if plain else []
    header += ["paper CNN", "paper SL-ViT"] if beside else []
    body = []
    for row in rows:
        cells = [row.backbone, row.place, *(cell(row.values.get(kind, ())) for kind in kinds), cell(row.final)]
        cells += [f"{row.params[kind] / 1e6:.2f}M" if kind in row.params else "–" for kind in plain]
        cells += [f"{row.flops[kind] / 1e9:.2f}B" if kind in row.flops else "–" for kind in plain]
        if plain:
            cells.append(f"{row.speedup[plain[-1]]:.2f}" if plain[-1] in row.speedup else "–")
        cells += known.get((row.backbone, row.place), ("–", "–")) if beside else ()
        body.append(cells)
    seeds = max((len(values) for row in rows for values in row.values.values()), default=0)
    note = f"Mean ± standard deviation over {seeds} seeds of the branches; the backbone is the same for all."
    return "\n".join([f"# {title}", "", *markdown_table(header, body), "", note]) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """``backbone,branch,method,measure,seed,value``, a line a figure."""
    header = ["backbone", "branch", "method", "measure", "number", "value"]
    lines = (
        [row.backbone, row.place, method, row.measure, number, f"{value:.4f}"]
        for row in rows
        for method, values in row.values.items()
        for number, value in enumerate(values)
    )
    return csv_text(header, lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """For each backbone and place every method's mean and deviation, and the final exit's line."""
    kinds = [kind for kind in METHODS if any(kind in row.values for row in rows)]
    figure = blank(max(5.0, 1.6 * len(rows)), 4.2)
    ax = figure.subplots()
    for number, kind in enumerate(kinds):
        at = [i for i, row in enumerate(rows) if row.values.get(kind)]
        values = [rows[i].values[kind] for i in at]
        errors = [stdev(v) if len(v) > 1 else 0.0 for v in values]
        places = [i + 0.6 * ((number + 0.5) / len(kinds) - 0.5) for i in at]
        ax.errorbar(places, [mean(v) for v in values], errors, fmt="os^D"[number], capsize=4, label=METHODS[kind])
    for i, row in enumerate(rows):
        if row.final:
            label = "final" if i == 0 else "_final"  # named once
            ax.hlines(row.final[0], i - 0.4, i + 0.4, colors="0.3", linestyles="--", label=label)
    ax.set_xticks(range(len(rows)), [f"{row.backbone}\n{row.place}" for row in rows])
    ax.set_ylabel(rows[0].measure)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path)


def write(outcomes: Sequence[Outcome], folder: Path, *, title: str, paper: str | None) -> list[Path]:
    """Write ``table.csv``, ``table.md`` and ``table.png`` into a folder, each whole.

    Raises:
        CrowdExitError: if nothing was trained, or the folder cannot be written.
    """
    rows = rows_of(outcomes)
    if not rows:
        raise CrowdExitError("no run of this suite has finished; no table to write")
    return write_files(
        folder,
        {"table.csv": as_csv(rows), "table.md": as_markdown(rows, title, paper), "table.png": partial(draw, rows)},
    )
