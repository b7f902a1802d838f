"""Prepares ShanghaiTech (Zhang et al., CVPR 2016) for counting: ``crowdexit prepare shanghaitech``."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated
from zlib import crc32

import typer

from crowdexit.data.density import Kernel, density_map
from crowdexit.data.image import SUFFIXES
from crowdexit.data.store import StoredSample
from crowdexit.errors import CrowdExitError

from .common import (
    CORES,
    DENSITY_STRIDE,
    Destination,
    Jobs,
    StoredPixels,
    Strict,
    Task,
    files_by_stem,
    heads_in_mat,
    heads_of,
    prepare,
    read_image,
    resized,
    run,
)
from .registry import DataSet

_SALT = 1  # see split_of


@dataclass(frozen=True)
class ImageTask(Task):
    """``image`` and ``truth`` are where the image and its heads should be; both may turn out missing.

    ``problem`` says why it cannot be a sample.
    """

    part: str
    image: Path
    truth: Path
    problem: str = ""


DATA_SET = DataSet("ShanghaiTech A and B, crowds and streets (Zhang et al., 2016)", task="counting", has_heads=True)
app = typer.Typer(add_completion=False)


@app.command()
def main(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of part_A and part_B, or one of them.")],
    dst: Destination,
    kernel: Annotated[Kernel, typer.Option(help="Kernel of the stored density maps.")] = "gaussian",
    store_density: Annotated[
        bool,
        typer.Option("--store-density", help="Keep density maps too, on a grid of 8×8 pixels."),
    ] = False,
    max_side: Annotated[
        int | None,
        typer.Option(min=16, help="Shrink larger images to this longer side (re-encoded, heads moved)."),
    ] = None,
    stored_pixels: StoredPixels = False,
    strict: Strict = False,
    jobs: Jobs = CORES,
) -> None:
    """Prepare ShanghaiTech: one HDF5 file of images and heads, with a fixed validation split.

    Reads train_data and test_data, if present: images IMG_n of any common format, and GT_IMG_n.mat with
    the heads in the image as it is displayed (EXIF orientation applied). An eighth of the training images, chosen
    by id alone, becomes `val`. Images are stored unchanged. An interrupted run resumes.

    Example: crowdexit prepare shanghaitech ShanghaiTech data/shanghaitech.h5 --jobs 4
    """
    tasks = [
        task
        for part, folder in find_parts(src)
        for half in ("train_data", "test_data")
        for task in find_images(folder / half, part)
    ]
    if not tasks:
        raise CrowdExitError(f"{src}: no images IMG_n.jpg in train_data/images or test_data/images")
    kept = kernel if store_density else None
    make = partial(make_sample, kernel=kept, max_side=max_side, stored_pixels=stored_pixels)
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


def find_images(half: Path, part: str) -> list[ImageTask]:
    """A task for every number that has an image or heads, in order; ids as ``A_IMG_12``."""
    truths = next((half / name for name in ("ground-truth", "ground_truth") if (half / name).is_dir()), half)
    images = {name: paths for name, paths in files_by_stem(half / "images", SUFFIXES).items() if name[:4] == "IMG_"}
    heads = {name[3:]: paths for name, paths in files_by_stem(truths, (".mat",)).items() if name[:7] == "GT_IMG_"}

    def number(name: str) -> tuple[int, str]:
        digits = name.removeprefix("IMG_")
        return (int(digits) if digits.isdecimal() else sys.maxsize, name)

    def sample_of(name: str) -> ImageTask:
        image = images.get(name, [half / "images" / f"{name}.jpg"])
        truth = heads.get(name, [truths / f"GT_{name}.mat"])
        several = next((paths for paths in (image, truth) if len(paths) > 1), [])
        return ImageTask(
            id=f"{part}_{name}",
            split=split_of(f"{part}_{name}") if half.name == "train_data" else "test",
            part=part,
            image=image[0],
            truth=truth[0],
            problem=f"{' and '.join(path.name for path in several)}: only one can be meant" if several else "",
        )

    return [sample_of(name) for name in sorted({*images, *heads}, key=number)]


def split_of(id: str) -> str:
    """``val`` for about an eighth of the training images, fixed by the id alone.

    Those whose salted CRC-32 is a multiple of 8. The salt is the smallest for which, in both parts, the mean
    count of the validation images is within 5 % of the others', and median, spread and distance from the
    median within 15 %: an unsalted draw had made part A's a sixth denser. No network took part in the choice.
    """
    return "val" if crc32(f"{_SALT} {id}".encode()) % 8 == 0 else "train"


def make_sample(task: ImageTask, *, kernel: Kernel | None, max_side: int | None, stored_pixels: bool) -> StoredSample:
    """Read one image and its heads.

    Raises:
        CrowdExitError: if either is missing or damaged, or there are several.
    """
    if task.problem:
        raise CrowdExitError(task.problem)
    source = read_image(task.image)
    image, size = source.data, (source.header.width, source.header.height)
    inside, outside = heads_of(heads_in_mat(task.truth), source.header, stored_pixels=stored_pixels)
    width, height = size
    if max_side and max(size) > max_side:
        width, height = (max(1, round(side * max_side / max(size))) for side in size)
        image, inside = resized(source.pixels, inside, width, height)
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
            "annotated_in": "stored pixels" if stored_pixels else "displayed image",
            **source.origin,
            **({"density_kernel": kernel, "density_stride": str(DENSITY_STRIDE)} if kernel else {}),
        },
    )


if __name__ == "__main__":
    sys.exit(run(app))
