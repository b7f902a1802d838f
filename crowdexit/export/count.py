"""The program of an exported folder: count the people in one image."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from crowdexit.data.mel import AudioError, checked_log_mel
from crowdexit.errors import CrowdExitError
from crowdexit.export.images import read_image
from crowdexit.export.standalone import Runner, read_description


class _Parser(ArgumentParser):
    """Refuses what is mistyped in one line."""

    def error(self, message: str) -> NoReturn:
        raise CrowdExitError(f"{message} (--help shows the usage)")


def main(folder: Path, arguments: Sequence[str] | None = None) -> int:
    """Count an image with the network of a folder: a line for each exit, its name and its count.

    Args:
        folder: the exported network.
        arguments: instead of the process's own.

    Returns:
        0; 2 after an error, of which one line is printed; 130 after Ctrl-C.
    """
    parser = _Parser(prog="count.py", description="Count the people in an image: each exit's name and count.")
    parser.add_argument("image", type=Path, help="a JPEG or PNG with 8 bits")
    parser.add_argument("--log-mel", type=Path, metavar="FILE.npy", help="log-mel (96, 64) of the second around it")
    try:
        options = parser.parse_args(arguments)
        log_mel = None if options.log_mel is None else _read_log_mel(options.log_mel)
        runner = Runner(folder, read_description(folder))
        image, warnings = read_image(options.image)
        if log_mel is not None and len(runner.boxes(image.shape[1], image.shape[0])) > 1:
            warnings.append("counted in tiles, without the audio")
        for warning in warnings:
            print(f"warning: {options.image}: {warning}", file=sys.stderr)
        for name, count in runner.stream(image, log_mel):
            print(f"{name}\t{count:.2f}", flush=True)
    except CrowdExitError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _read_log_mel(path: Path) -> NDArray[np.float32]:
    try:
        return checked_log_mel(np.load(path, allow_pickle=False))
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({error.strerror or 'no .npy file'})") from None
    except (ValueError, EOFError):
        raise AudioError(f"{path}: no array in a .npy file") from None
    except AudioError as error:
        raise AudioError(f"{path}: {error}") from None
