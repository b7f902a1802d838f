"""What the audio of a prepared file tells about the count: how much of its variance, and an image of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from crowdexit.data.store import Store
from crowdexit.errors import CrowdExitError

PARTS = ("A_", "B_")  # ShanghaiTech's, by the beginning of the id
MOST_SECONDS = 6_000  # of training: the kernel matrix then takes 290 MB
KERNEL_WIDTH, RIDGE = 0.1, 1.0
MIN_IMAGES = 10  # for an R² that says anything


@dataclass(frozen=True)
class AudioSamples:
    """The log-mels, (n, 96, 64) float32, of a set of seconds, with the count and id of each one's image."""

    log_mels: NDArray[np.float32]
    counts: NDArray[np.float64]
    ids: NDArray[np.str_]

    def only(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> AudioSamples:
        return AudioSamples(self.log_mels[chosen], self.counts[chosen], self.ids[chosen])


@dataclass(frozen=True)
class Explained:
    """R² of log count on held-out images, of a regression fitted on the training images of ``part``."""

    part: str
    r2: float
    images: int
    seconds: int

    def __str__(self) -> str:
        return (
            f"R² of log count from audio alone, {self.part}: {self.r2:.3f} "
            f"({self.images} held-out images, fitted on {self.seconds} seconds)"
        )


def measure(path: Path) -> list[Explained]:
    """How much of the variance of log(count) the audio explains: all images, then each part by itself.

    Kernel ridge regression on statistics of the log-mel (see ``statistics``), fitted on the ``train`` split
    with all its takes, judged on the first take of the ``val`` split. For a part it is fitted on that part
    alone, so that telling dense sets from sparse ones does not count there. Images without heads or without
    sound are left out.

    Raises:
        CrowdExitError: if a split is missing or fewer than ten images of it have sound.
    """
    train, held_out = read_split(path, "train"), read_split(path, "val")
    results = [_explained("all images", train, held_out)]
    for part in PARTS:
        train_part = train.only(np.char.startswith(train.ids, part))
        held_out_part = held_out.only(np.char.startswith(held_out.ids, part))
        if min(len(train_part.ids), len(held_out_part.ids)) >= MIN_IMAGES:
            results.append(_explained(f"part {part.rstrip('_')}", train_part, held_out_part))
    return results


def read_split(path: Path, split: str) -> AudioSamples:
    """The seconds of a split's images that have sound and heads, further takes included."""
    log_mels: list[NDArray[np.float32]] = []
    counts: list[float] = []
    ids: list[str] = []
    with Store(path) as store:
        for id in store.ids(split):
            sample = store.read(split, id, with_takes=True)
            if sample.log_mel is None or sample.count < 1:
                continue
            seconds = [sample.log_mel, *(sample.takes if sample.takes is not None else [])]
            log_mels += [second.astype(np.float32) for second in seconds]
            counts += [sample.count] * len(seconds)
            ids += [id] * len(seconds)
    if len(set(ids)) < MIN_IMAGES:
        raise CrowdExitError(
            f"{path}: {len(set(ids))} images of {split!r} have audio and heads; measuring needs at least {MIN_IMAGES}"
        )
    return AudioSamples(np.stack(log_mels), np.array(counts), np.array(ids))


def statistics(log_mels: NDArray[np.float32]) -> NDArray[np.float64]:
    """What a listener may go by: (n, 96, 64) to (n, 341).

    For each band the mean, standard deviation, maximum, 10 % quantile and mean step over time; of the level
    (all bands together) the same five; and the strength of its 16 slowest modulations (1 to 17 Hz).
    """
    level = np.log(np.mean(np.exp(log_mels.astype(np.float64)), axis=2, keepdims=True))
    both = np.concatenate([log_mels, level], axis=2)  # (n, 96, 65)
    flicker = level[:, :, 0] - level[:, :, 0].mean(axis=1, keepdims=True)
    modulation = np.log(np.abs(np.fft.rfft(flicker, axis=1))[:, 1:17] + 0.1)
    columns = [
        both.mean(axis=1),
        both.std(axis=1),
        both.max(axis=1),
        np.quantile(both, 0.1, axis=1),
        np.abs(np.diff(both, axis=1)).mean(axis=1),
        modulation,
    ]
    return np.concatenate(columns, axis=1)


def _explained(part: str, train: AudioSamples, held_out: AudioSamples) -> Explained:
    if len(train.ids) > MOST_SECONDS:
        train = train.only(np.random.default_rng(0).choice(len(train.ids), MOST_SECONDS, replace=False))
    # A take is further training material, never a further held-out image.
    _, first = np.unique(held_out.ids, return_index=True)
    held_out = held_out.only(first)
    truth = np.log(held_out.counts)
    guess = _kernel_ridge(statistics(train.log_mels), np.log(train.counts), statistics(held_out.log_mels))
    r2 = 1 - np.sum(np.square(truth - guess)) / np.sum(np.square(truth - truth.mean()))
    return Explained(part, float(r2), len(truth), len(train.ids))


def _kernel_ridge(x: NDArray[np.float64], y: NDArray[np.float64], x_new: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ridge regression with a Gaussian kernel over standardised columns: the guesses for ``x_new``."""
    centre, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    x, x_new = (x - centre) / scale, (x_new - centre) / scale

    def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        squared = np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1) - 2 * a @ b.T
        return np.asarray(np.exp(squared * (-KERNEL_WIDTH / x.shape[1])))

    matrix = kernel(x, x)
    matrix[np.diag_indices_from(matrix)] += RIDGE
    weights = cho_solve(cho_factor(matrix, overwrite_a=True), y - y.mean())
    return np.asarray(kernel(x_new, x) @ weights + y.mean())


def plot(path: Path, target: Path, results: Sequence[Explained]) -> None:
    """Draw the log-mels of four held-out images, few heads to many, and level against count.

    Args:
        path: a prepared file with audio.
        target: where to write it; the ending says how (``.png``, ``.svg``, ``.pdf``).
        results: what ``measure`` gave, for the title.
    """
    import matplotlib  # not needed by the workers, which import this too

    matplotlib.use("Agg")
    from matplotlib import pyplot

    held_out = read_split(path, "val")
    order = np.argsort(held_out.counts, kind="stable")
    shown = order[np.linspace(0, len(order) - 1, 4).round().astype(int)]
    lowest, highest = np.quantile(held_out.log_mels[shown], [0.01, 0.999])
    figure = pyplot.figure(figsize=(12, 7), layout="constrained")
    images, scatter = figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 1.15])[:, 0]
    axes = images.subplots(1, 4, sharey=True)
    for axis, i in zip(axes, shown, strict=True):
        image = axis.imshow(
            held_out.log_mels[i].T,
            origin="lower",
            aspect="auto",
            extent=(0, 0.96, 0, 64),
            vmin=lowest,
            vmax=highest,
        )
        axis.set(title=f"{held_out.counts[i]:.0f} heads ({held_out.ids[i]})", xlabel="time (s)")
    axes[0].set_ylabel("mel band (125 to 7500 Hz)")
    images.colorbar(image, ax=axes, label="log(mel + 0.01)")
    axis = scatter.subplots()
    level = 20 / np.log(10) * np.log(np.mean(np.exp(held_out.log_mels), axis=(1, 2)))
    groups = {part: np.char.startswith(held_out.ids, part) for part in PARTS}
    groups["other"] = ~np.any(list(groups.values()), axis=0)
    for (name, chosen), marker in zip(groups.items(), "o^s", strict=True):
        if chosen.any():
            label = "images" if name == "other" else f"part {name.rstrip('_')}"
            axis.scatter(held_out.counts[chosen], level[chosen], s=22, alpha=0.8, marker=marker, label=label)
    axis.set(xscale="log", xlabel="heads in the image", ylabel="mean level of the mel bands (dB)")
    axis.legend(loc="lower right")
    axis.grid(alpha=0.3)
    summary = ", ".join(f"{result.part} {result.r2:.2f}" for result in results)
    axis.set_title(f"variance of log count explained by all audio features (R²): {summary}")
    figure.suptitle(f"Audio of held-out images: {_audio_kind(path)}")
    try:
        figure.savefig(target, dpi=110)
    except (OSError, ValueError) as error:
        raise CrowdExitError(f"{target}: the plot cannot be written ({error})") from error
    finally:
        pyplot.close(figure)


def _audio_kind(path: Path) -> str:
    with Store(path) as store:
        kinds = {store.info("val", id).audio_source for id in store.ids("val")} - {"none"}
    return " and ".join(sorted(kinds))
