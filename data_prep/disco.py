"""Prepares DISCO, crowds with their audio (Hu et al., 2020), for counting: ``crowdexit prepare disco``."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.sparse import issparse

from crowdexit.data.density import Kernel, density_map
from crowdexit.data.image import SUFFIXES, ImageHeader
from crowdexit.data.log_mel import log_mel, read_audio
from crowdexit.data.store import SPLITS, StoredSample
from crowdexit.data.unlabelled import AUDIO_SUFFIXES
from crowdexit.errors import CrowdExitError

from .common import (
    CORES,
    DENSITY_STRIDE,
    Destination,
    Jobs,
    StoredPixels,
    Strict,
    Task,
    displayed_matrix,
    files_by_stem,
    heads_in_mat,
    heads_of,
    prepare,
    read_image,
    read_lines,
    read_mat,
    resized,
    run,
)
from .registry import DataSet

WIDTH, HEIGHT = 1024, 576


@dataclass(frozen=True)
class Recording(Task):
    """One id's files; ``heads`` only where there is one. ``problem`` says why it cannot be a sample."""

    image: Path
    audio: Path
    density: Path
    heads: Path | None = None
    problem: str = ""


DATA_SET = DataSet("DISCO, crowds with their audio (Hu et al., 2020)", task="counting", has_audio=True, has_heads=True)
app = typer.Typer(add_completion=False)


@app.command()
def main(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of imgs, auds and density.")],
    dst: Destination,
    heads: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of head annotations, PREFIX_ID.txt or .mat.")
    ] = None,
    kernel: Annotated[Kernel, typer.Option(help="Kernel of the stored density maps.")] = "gaussian",
    store_density: Annotated[
        bool, typer.Option("--store-density", help="Keep density maps made from the heads too.")
    ] = False,
    stored_pixels: StoredPixels = False,
    strict: Strict = False,
    jobs: Jobs = CORES,
) -> None:
    """Prepare DISCO: one HDF5 file of images of 1024×576, heads and log-mels.

    The split of an id is that of its density folder. Without --heads, and for ids that have no head file,
    the count is the sum of the published density matrix, which is then stored on a grid of 8×8 pixels. Images
    of another shape than 16:9 are fitted and padded with black at the right or bottom. Heads and densities are
    those of the image as it is displayed (EXIF orientation applied).

    Example: crowdexit prepare disco DISCO data/disco.h5 --heads DISCO/annotations
    """
    tasks = find_recordings(src, heads)
    make = partial(make_sample, kernel=kernel if store_density else None, stored_pixels=stored_pixels)
    settings = f"disco {src.resolve()} {heads and heads.resolve()} {make.keywords}"
    prepare(dst, tasks, make, settings=settings, jobs=jobs, strict=strict).print()


def find_recordings(src: Path, heads: Path | None = None) -> list[Recording]:
    """A task for every id that has an image, sound or density, and one for each head file of an unknown id.

    Raises:
        CrowdExitError: if a folder is missing or there is no density matrix at all.
    """
    for folder in (src, src / "imgs", src / "auds", src / "density", *([heads] if heads else [])):
        if not folder.is_dir():
            raise CrowdExitError(f"{folder}: no such folder")
    densities: dict[str, list[Path]] = {}
    for split in SPLITS:
        for id, paths in files_by_stem(src / "density" / split, (".mat",)).items():
            densities.setdefault(id, []).extend(paths)
    if not densities:
        raise CrowdExitError(f"{src / 'density'}: no matrix ID.mat in {', '.join(SPLITS)}")
    images, audio_files = files_by_stem(src / "imgs", SUFFIXES), files_by_stem(src / "auds", AUDIO_SUFFIXES)
    ids = images.keys() | audio_files.keys() | densities.keys()
    texts_and_mats = files_by_stem(heads, (".txt", ".mat")) if heads else {}
    annotations, strangers = _match_heads([path for paths in texts_and_mats.values() for path in paths], ids)

    recordings = []
    for id in sorted(ids):
        matrices, texts = densities.get(id, []), annotations.get(id, [])
        image, audio = images.get(id, [src / "imgs" / f"{id}.jpg"]), audio_files.get(id, [src / "auds" / f"{id}.wav"])
        problem = ""
        if len(matrices) != 1:
            splits = " and ".join(path.parent.name for path in matrices)
            problem = f"density matrices in {splits}" if matrices else "no density matrix, so of no split"
        for what, paths in (("images", image), ("sounds", audio), ("head files", texts)):
            if not problem and len(paths) > 1:
                problem = f"{what} {' and '.join(path.name for path in paths)}"
        recordings.append(
            Recording(
                id=id,
                split="" if problem else matrices[0].parent.name,
                image=image[0],
                audio=audio[0],
                density=matrices[0] if matrices else Path(),
                heads=texts[0] if texts else None,
                problem=problem,
            )
        )
    unknown = "heads of an id without image, audio or density"
    return recordings + [Recording(path.stem, "", Path(), Path(), Path(), path, problem=unknown) for path in strangers]


def _match_heads(texts: Iterable[Path], ids: Collection[str]) -> tuple[dict[str, list[Path]], list[Path]]:
    """Head files by id, and those of no id. Ids and prefixes may hold underscores: the longest id wins."""
    matched: dict[str, list[Path]] = {}
    strangers = []
    for path in texts:
        words = path.stem.split("_")
        id = next((id for start in range(len(words)) if (id := "_".join(words[start:])) in ids), None)
        if id is None:
            strangers.append(path)
        else:
            matched.setdefault(id, []).append(path)
    return matched, strangers


def make_sample(task: Recording, *, kernel: Kernel | None, stored_pixels: bool) -> StoredSample:
    """Read one id's image, sound and heads or density.

    Raises:
        CrowdExitError: if one of them is missing or damaged.
    """
    if task.problem:
        raise CrowdExitError(task.problem)
    source = read_image(task.image)
    image, size = source.data, (source.header.width, source.header.height)
    scale = min(WIDTH / size[0], HEIGHT / size[1])
    width, height = (max(1, round(side * scale)) for side in size)
    points, density, origin = np.zeros((0, 2), np.float32), None, {"count_from": "density"}
    if task.heads is None:
        matrix = read_density(task.density)
        count = float(matrix.sum())
        matrix = laid_as_displayed(matrix, source.header, task.density.name, stored_pixels=stored_pixels)
        density = onto_grid(matrix, height, width)
    else:
        points, outside = heads_of(read_heads(task.heads), source.header, stored_pixels=stored_pixels)
        count = float(len(points))
        origin = {"count_from": "heads", "heads_outside": str(outside)}
    if size != (WIDTH, HEIGHT):
        image, points = resized(source.pixels, points, width, height, canvas=(WIDTH, HEIGHT))
    if task.heads is not None and kernel:
        density = density_map(points, HEIGHT, WIDTH, kernel=kernel, stride=DENSITY_STRIDE)
        origin["density_kernel"] = kernel
    if density is not None:
        origin["density_stride"] = str(DENSITY_STRIDE)
    return StoredSample(
        id=task.id,
        split=task.split,
        image=image,
        points=points,
        width=WIDTH,
        height=HEIGHT,
        count=count,
        log_mel=log_mel(*read_audio(task.audio)),
        audio_source="recorded",
        density=density,
        origin={
            "dataset": "DISCO",
            "source": f"imgs/{task.image.name}",
            "annotated_in": "stored pixels" if stored_pixels else "displayed image",
            **source.origin,
            **origin,
        },
    )


def laid_as_displayed(
    matrix: NDArray[np.float64], header: ImageHeader, name: str, *, stored_pixels: bool
) -> NDArray[np.float64]:
    """A density matrix of the displayed image; with ``stored_pixels`` it is of those, and turned with them.

    Raises:
        CrowdExitError: if it has the shape of the other one.
    """
    if stored_pixels:
        matrix = displayed_matrix(matrix, header.orientation)
    rows, columns = matrix.shape
    # By the ratio of the sides: how far from the displayed image's, and from the stored one's.
    ratio, shown = np.log(columns / rows), np.log(header.width / header.height)
    if header.orientation >= 5 and abs(ratio + shown) + 0.1 < abs(ratio - shown):
        other = "without" if stored_pixels else "with"
        raise CrowdExitError(
            f"{name} is {columns}×{rows}, and the image is displayed at {header.width}×{header.height}: "
            f"EXIF turns it; try it {other} --stored-pixels"
        )
    return matrix


def read_density(path: Path) -> NDArray[np.float64]:
    """A published density matrix, (h, w) of any size; its sum is the count.

    Raises:
        CrowdExitError: if the file is missing or damaged, has no ``map`` nor one matrix alone, or it is no density.
    """
    variables = read_mat(path)
    if "map" not in variables and len(variables) != 1:
        raise CrowdExitError(f"{path.name}: expected a matrix 'map'; found {', '.join(variables) or 'no variable'}")
    matrix = variables.get("map", next(iter(variables.values())))
    matrix = matrix.toarray() if issparse(matrix) else matrix
    if matrix.ndim != 2 or matrix.size == 0 or matrix.dtype.kind not in "fiu":
        raise CrowdExitError(f"{path.name} holds a map of shape {matrix.shape} of {matrix.dtype}, not a matrix")
    if not np.isfinite(matrix).all() or matrix.min() < 0:
        raise CrowdExitError(f"{path.name} holds a map with values that are negative or not finite")
    out: NDArray[np.float64] = matrix.astype(np.float64)
    return out


def onto_grid(matrix: NDArray[np.float64], height: int, width: int) -> NDArray[np.float32]:
    """A density matrix stretched over the upper left height×width pixels of the stored image, by cells.

    Returns (72, 128) float32 of the same sum: what lies across cells of 8×8 pixels is shared out.
    """
    for axis, (side, full) in enumerate(((height, HEIGHT), (width, WIDTH))):
        rows = matrix.shape[axis]
        edges = np.minimum(np.arange(0, full + 1, DENSITY_STRIDE) / side, 1.0) * rows
        mass = np.concatenate([np.zeros_like(matrix.take([0], axis)), matrix.cumsum(axis)], axis)
        below = np.minimum(edges.astype(int), rows - 1)
        share = np.expand_dims(edges - below, 1 - axis)
        mass = mass.take(below, axis) * (1 - share) + mass.take(below + 1, axis) * share
        matrix = np.diff(mass, axis=axis)
    return np.maximum(matrix, 0.0).astype(np.float32)  # rounding leaves a hair below zero


def read_heads(path: Path) -> NDArray[np.float64]:
    """The heads of an annotation file, (N, 2) in pixels of the published picture: a text of lines ``x y``, or a .mat.

    Raises:
        CrowdExitError: if the file cannot be read or a line is anything else.
    """
    if path.suffix.lower() == ".mat":
        return heads_in_mat(path)
    lines = read_lines(path)
    heads = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            x, y = map(float, line.split())
        except ValueError as error:
            raise CrowdExitError(f"{path.name} line {number} is not 'x y', but {line.strip()[:40]!r}") from error
        heads.append((x, y))
    return np.array(heads, np.float64).reshape(-1, 2)


if __name__ == "__main__":
    sys.exit(run(app))
