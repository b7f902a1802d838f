"""Prepares ShanghaiTech (Zhang et al., CVPR 2016) for counting: ``python -m data_prep.shanghaitech``."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated
from zlib import crc32

import numpy as np
import typer
from numpy.typing import NDArray

from crowdexit.data.density import Kernel, density_map, split_inside
from crowdexit.data.store import StoredSample
from crowdexit.errors import CrowdExitError
from data_prep.common import (
    CORES,
    DENSITY_STRIDE,
    Jobs,
    Strict,
    Task,
    prepare,
    read_mat,
    read_picture,
    resized,
    run,
)

_SALT = 1  # see split_of


@dataclass(frozen=True)
class Picture(Task):
    """``image`` and ``truth`` are where the picture and its heads should be; both may turn out missing."""

    part: str
    image: Path
    truth: Path


app = typer.Typer(add_completion=False)


@app.command()
def main(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of part_A and part_B, or one of them.")],
    dst: Annotated[Path, typer.Argument(metavar="DST.h5", help="The prepared file to write.")],
    kernel: Annotated[Kernel, typer.Option(help="Kernel of the stored density maps.")] = "gaussian",
    store_density: Annotated[
        bool,
        typer.Option("--store-density", help="Keep density maps too, on a grid of 8×8 pixels."),
    ] = False,
    max_side: Annotated[
        int | None,
        typer.Option(min=16, help="Shrink larger pictures to this longer side (re-encoded, heads moved)."),
    ] = None,
    strict: Strict = False,
    jobs: Jobs = CORES,
) -> None:
    """Prepare ShanghaiTech: one HDF5 file of pictures and heads, with a fixed validation split.

    Takes whichever of train_data and test_data are there. An eighth of the training pictures, chosen by id
    alone, becomes `val`. Pictures are kept byte by byte. An interrupted run goes on where it was.

    Example: python -m data_prep.shanghaitech ShanghaiTech data/shanghaitech.h5 --jobs 4
    """
    tasks = [
        task
        for part, folder in find_parts(src)
        for half in ("train_data", "test_data")
        for task in find_pictures(folder / half, part)
    ]
    if not tasks:
        raise CrowdExitError(f"{src}: no pictures IMG_n.jpg in train_data/images or test_data/images")
    make = partial(make_sample, kernel=kernel if store_density else None, max_side=max_side)
    settings = f"shanghaitech {src.resolve()} {make.keywords}"
    prepare(dst, tasks, make, settings=settings, jobs=jobs, strict=strict).print()


def find_parts(src: Path) -> list[tuple[str, Path]]:
    """The parts in a folder as (letter, folder); the letter comes from the name, ``X`` where it tells none.

    Raises:
        CrowdExitError: if there is no part, or one letter stands for two folders.
    """
    if not src.is_dir():
        raise CrowdExitError(f"{src}: no such folder")

    def letter(folder: Path) -> str | None:
        match = re.match(r"part[ _-]?([a-z])(?![a-z])", folder.name, re.IGNORECASE)
        return match[1].upper() if match else None

    if any((src / half).is_dir() for half in ("train_data", "test_data")):
        return [(letter(src.resolve()) or "X", src)]
    parts = [(name, folder) for folder in sorted(src.iterdir()) if folder.is_dir() and (name := letter(folder))]
    if not parts:
        raise CrowdExitError(f"{src}: holds neither part_A and part_B nor train_data or test_data")
    for (one, folder), (other, next_folder) in pairwise(parts):
        if one == other:
            raise CrowdExitError(f"{src}: {folder.name} and {next_folder.name} are both part {one}")
    return parts


def find_pictures(half: Path, part: str) -> list[Picture]:
    """A task for every number that has a picture or heads, in order; ids as ``A_IMG_12``."""
    truths = next((half / name for name in ("ground-truth", "ground_truth") if (half / name).is_dir()), half)
    names = {path.stem for path in (half / "images").glob("IMG_*.jpg")}
    names |= {path.stem.removeprefix("GT_") for path in truths.glob("GT_IMG_*.mat")}

    def number(name: str) -> tuple[int, str]:
        digits = name.removeprefix("IMG_")
        return (int(digits) if digits.isdecimal() else sys.maxsize, name)

    return [
        Picture(
            id=f"{part}_{name}",
            split=split_of(f"{part}_{name}") if half.name == "train_data" else "test",
            part=part,
            image=half / "images" / f"{name}.jpg",
            truth=truths / f"GT_{name}.mat",
        )
        for name in sorted(names, key=number)
    ]


def split_of(id: str) -> str:
    """``val`` for about an eighth of the training pictures, fixed by the id alone.

    Those whose salted CRC-32 is a multiple of 8. The salt is the smallest for which, in both parts, the mean
    count of the validation pictures is within 5 % of the others', and median, spread and distance from the
    median within 15 %: an unsalted draw had made part A's a sixth denser. No network took part in the choice.
    """
    return "val" if crc32(f"{_SALT} {id}".encode()) % 8 == 0 else "train"


def make_sample(task: Picture, *, kernel: Kernel | None, max_side: int | None) -> StoredSample:
    """Read one picture and its heads.

    Raises:
        CrowdExitError: if either is missing or damaged.
    """
    image, picture = read_picture(task.image)
    inside, outside = split_inside(read_heads(task.truth), picture.height, picture.width)
    width, height = picture.size
    if max_side and max(width, height) > max_side:
        width, height = (max(1, round(side * max_side / max(picture.size))) for side in picture.size)
        image, inside = resized(picture, inside, width, height)
    density = density_map(inside, height, width, kernel=kernel, stride=DENSITY_STRIDE) if kernel else None
    return StoredSample(
        id=task.id,
        split=task.split,
        image=image,
        points=inside,
        width=width,
        height=height,
        count=len(inside),
        density=density,
        origin={
            "dataset": "ShanghaiTech",
            "part": task.part,
            "source": "/".join(task.image.parts[-3:]),
            "heads_outside": str(outside),
            **({"density_kernel": kernel, "density_stride": str(DENSITY_STRIDE)} if kernel else {}),
        },
    )


def read_heads(path: Path) -> NDArray[np.float64]:
    """The heads of a ground-truth file, (N, 2), x y in pixels.

    Raises:
        CrowdExitError: if the file is missing or damaged or not of ShanghaiTech's form.
    """
    info = read_mat(path, "image_info")
    try:
        heads = np.asarray(info[0][0][0][0][0], np.float64)
    except (IndexError, TypeError, ValueError) as error:
        raise CrowdExitError(f"{path.name} is not a ShanghaiTech ground truth") from error
    if heads.size and (heads.ndim != 2 or heads.shape[1] != 2):
        raise CrowdExitError(f"{path.name} holds heads of shape {heads.shape}, not N×2")
    return heads.reshape(-1, 2)


if __name__ == "__main__":
    sys.exit(run(app))
