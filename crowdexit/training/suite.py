"""A suite: a table's experiments, each backbone trained once and its branches with several seeds, as one command.

A suite is a YAML file: recipes in parts, for a list of backbones. Every run is a process of its own with a recipe file
of its own beside it, so that one that fails stops no other, and one that was killed goes on where it was.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crowdexit.errors import CrowdExitError
from crowdexit.models import zoo
from crowdexit.models.scenarios import CLASSES, branch_options
from crowdexit.training.recipe import checked, first_problem
from crowdexit.utils.files import write_problem

BUNDLED = Path(__file__).parent / "suites"


class SuiteError(CrowdExitError):
    """A suite that is not there, or means nothing."""


class BackbonePart(BaseModel):
    """One backbone of a suite: what is its own in the recipe of the backbone and in that of its branches.

    ``start`` is a trained checkpoint in place of a training of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: dict[str, Any] | None = None
    start: Path | None = None
    branches: dict[str, Any] = {}


class Suite(BaseModel):
    """The experiments of a table.

    Attributes:
        title: of the table. paper: the number of the SL-ViT paper's table whose figures stand beside it.
        dataset: of the paper's classification sets, whose branches have shapes of their own (table III).
        train, branches, copycat: values of all recipes of a kind; of a backbone's own, the latter win.
        teacher: the backbone of the suite that labels the unlabelled images of copycat for all; None: each its own.
        places, kinds: of the branches.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    paper: str | None = None
    dataset: str | None = None
    backbones: dict[str, BackbonePart] = Field(min_length=1)
    train: dict[str, Any] = {}
    branches: dict[str, Any] = {}
    copycat: dict[str, Any] = {}
    teacher: str | None = None
    places: tuple[str, ...] = ("1", "2")
    kinds: tuple[str, ...] = ("cnn", "slvit")

    @model_validator(mode="after")
    def _known_teacher(self) -> Suite:
        if self.teacher is not None and self.teacher not in self.backbones:
            raise ValueError(f"teacher {self.teacher!r} is none of its backbones ({', '.join(self.backbones)})")
        return self


@dataclass(frozen=True)
class Run:
    """One training of a suite.

    Attributes:
        name: of its folder below the suite's.
        backbone: whose it is. step: ``backbone``, ``branches`` or ``copycat``. seed: of the branches.
        recipe: what is trained. needs: the runs whose checkpoints it starts from or is taught by.
    """

    name: str
    backbone: str
    step: str
    seed: int
    recipe: dict[str, Any]
    needs: tuple[str, ...] = ()


def bundled() -> list[str]:
    """The names of the suites that come with the project."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def read_suite(name: str | Path) -> Suite:
    """Read a suite's file, or a bundled one by its name.

    Raises:
        SuiteError: no such suite, not YAML, or an unknown key; names key and problem.
    """
    path = Path(name)
    if not path.is_file():
        path = BUNDLED / f"{name}.yaml"
    if not path.is_file():
        raise SuiteError(f"{name}: no such suite (bundled are {', '.join(bundled())})")
    try:
        suite = Suite.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SuiteError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    except ValidationError as error:
        raise SuiteError(f"{path}: {first_problem(error, 'suite')}") from None
    if suite.dataset is not None and suite.dataset not in CLASSES:
        raise SuiteError(f"{path}: dataset: {suite.dataset!r} is none of {', '.join(CLASSES)}")
    return suite


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings within mappings laid over each other, later ones above."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            below = whole.get(key)
            whole[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return whole


def runs_of(suite: Suite, data: Path, out: Path, seeds: int, images: Path | None = None) -> list[Run]:
    """All trainings of a suite: the backbones, then the branches, then copycat.

    Args:
        data: the prepared file. out: folder of the suite.
        seeds: how many; the branches of each backbone are trained with 0, 1, …
        images: unlabelled ones, for copycat on top of each.

    Raises:
        CrowdExitError: if a recipe that comes out means nothing.
    """
    runs: list[Run] = []
    taught: dict[str, Any] = {}
    teacher: tuple[str, ...] = ()
    if suite.teacher is not None:
        path, teacher = _trained(suite, suite.teacher, out)
        taught = {"copycat": {"teacher": str(path)}}
    for backbone, part in suite.backbones.items():
        start, needs = _trained(suite, backbone, out)
        for name in needs:
            recipe = merged(suite.train, part.train or {}, {"data": {"store": str(data)}})
            runs.append(Run(name, backbone, "backbone", int(recipe.get("seed", 0)), recipe))
        model = merged(suite.branches, part.branches).get("model") or (part.train or {}).get("model")
        exits = [
            {"name": f"{place}-{kind}", "place": place, "kind": kind, "options": _options(suite, model, place, kind)}
            for place in suite.places
            for kind in suite.kinds
        ]
        for seed in range(seeds):
            own = {"stage": "branches", "model": model, "start": str(start), "seed": seed, "exits": exits}
            recipe = merged(own, suite.branches, part.branches, {"data": {"store": str(data)}})
            name = f"{backbone}/branches-{seed}"
            runs.append(Run(name, backbone, "branches", seed, recipe, needs))
            if images is not None:
                run = str(out / name / "model.safetensors")
                more = {"start": run, "branches_from": run, "copycat": {"pictures": str(images)}, "fit": 0}
                again = merged(recipe, more, taught, suite.copycat)
                runs.append(Run(f"{backbone}/copycat-{seed}", backbone, "copycat", seed, again, (name, *teacher)))
    for run_ in runs:
        checked(run_.recipe, run_.name)
    return sorted(runs, key=lambda run_: ("backbone", "branches", "copycat").index(run_.step))


def _trained(suite: Suite, backbone: str, out: Path) -> tuple[Path, tuple[str, ...]]:
    """A backbone's checkpoint, and the run that trains it, unless it is trained already."""
    start = suite.backbones[backbone].start
    if start is not None:
        return start, ()
    return out / backbone / "backbone" / "model.safetensors", (f"{backbone}/backbone",)


def _options(suite: Suite, model: str | None, place: str, kind: str) -> dict[str, Any]:
    return {} if suite.dataset is None or model is None else branch_options(model, suite.dataset, place, kind)


def described(run: Run, runs: Sequence[Run]) -> zoo.Spec:
    """The network whose branches a run trains, known before anything is trained.

    Args:
        runs: of the suite; the run's backbone may be one of them.

    Raises:
        CrowdExitError: if the backbone is neither one of them nor a checkpoint.
    """
    recipe = checked(run.recipe, run.name)
    backbone = next((other for other in runs if other.name in run.needs), None)
    if backbone is not None:
        changes: Mapping[str, Any] = checked(backbone.recipe, backbone.name).changes
    else:
        changes = zoo.read_spec(zoo.checkpoint_path(cast(Path, recipe.start))).changes
    exits = tuple(zoo.ExitSpec(e.name, e.place, e.kind, e.options) for e in recipe.exits)
    return zoo.Spec(recipe.model, exits, {**changes, **recipe.changes})


def run_all(runs: Sequence[Run], out: Path, jobs: int, report: Callable[[Run, str | None], None]) -> dict[str, str]:
    """Train what is not trained yet, several at once, each in a process of its own.

    Args:
        out: folder of the suite; each run has one below it, with ``recipe.yaml`` and ``log.txt``.
        jobs: how many at once; they share the cores.
        report: called as each ends, with what went wrong, if anything did.

    Returns:
        What went wrong by the name of the run; runs that need a failed one are not begun.

    Raises:
        SuiteError: if a folder holds another recipe's run, or cannot be written.
    """
    waiting = []
    for run in runs:
        if not _finished(run, out):
            waiting.append(run)
        else:
            report(run, None)
    failed: dict[str, str] = {}
    ended = {run.name: threading.Event() for run in waiting}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    children: set[subprocess.Popen[bytes]] = set()
    stopping = threading.Event()

    def one(run: Run) -> None:
        try:
            for name in run.needs:
                if name in ended:
                    ended[name].wait()
            problem = next((f"{name} failed" for name in run.needs if name in failed), None)
            if problem is None and not stopping.is_set():
                problem = _train(run, out, threads, children)
            if problem is not None:
                failed[run.name] = problem
            report(run, problem)
        finally:
            ended[run.name].set()

    with ThreadPoolExecutor(jobs) as pool:
        # In order, so that what a run needs has been begun before it: a waiting run cannot keep it from a worker.
        futures = [pool.submit(one, run) for run in waiting]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stopping.set()
            for future in futures:
                future.cancel()
            for child in list(children):
                child.terminate()
            raise
    return failed


def _written(run: Run) -> str:
    return yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)


def _finished(run: Run, out: Path) -> bool:
    """Whether a run of this recipe has ended well; its recipe is written where there is none yet."""
    folder = out / run.name
    recipe, text = folder / "recipe.yaml", _written(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not recipe.exists():
            recipe.write_text(text, "utf-8")
        elif recipe.read_text("utf-8") != text:
            raise SuiteError(f"{folder}: holds a run of another recipe; choose another --out or remove it")
        mark = folder / "finished"
        return mark.exists() and mark.read_text("utf-8") == sha256(text.encode()).hexdigest()
    except OSError as error:
        raise SuiteError(write_problem(folder, error)) from None


def _train(run: Run, out: Path, threads: int, children: set[subprocess.Popen[bytes]]) -> str | None:
    """Train one run to its end; what went wrong, or None."""
    folder = out / run.name
    command = [sys.executable, "-m", "crowdexit", "train", str(folder / "recipe.yaml"), "--out", str(folder)]
    log = folder / "log.txt"
    with log.open("ab") as file:
        child = subprocess.Popen(
            [*command, "--resume"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        children.add(child)
        code = child.wait()
        children.discard(child)
    if code == 0:
        (folder / "finished").write_text(sha256(_written(run).encode()).hexdigest(), "utf-8")
        return None
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"ended with {code}"
