"""Options of counting, shared by the command line, the job and the resume note."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crowdexit.errors import Option, OptionError
from crowdexit.inference.budget import check_positive
from crowdexit.inference.deadline import Late, check_deadline
from crowdexit.inference.executor import Policy
from crowdexit.inference.policies import ANYTIME
from crowdexit.jobs.rows import Format, checked_format
from crowdexit.jobs.smooth import HALF_LIFE_S, Smoother
from crowdexit.jobs.sources import Source
from crowdexit.video.container import VideoError
from crowdexit.video.decode import DEFAULT_FPS, Span

BATCH = 4
MAX_BATCH = 64


@dataclass(frozen=True)
class CountOptions:
    """How inputs are counted, and where results are written.

    Attributes:
        audio: the audio of a single image, or to replace that of a single video.
        exit, deadline_ms, late, policy: of each image or frame, as of :meth:`CrowdCounter.count`. Without a deadline
            only the exits that are needed run on frames.
        budget_ms: of all images together, as of :meth:`CrowdCounter.count_many`.
        fps: frames a second to count in videos.
        start, end: count videos from and until these times, in seconds; a live source until ``end``.
        batch: frames of a video per batch, which does not change the counts; default: :data:`BATCH`, for a
            live source or with a deadline 1.
        smooth: half-life of a video's smoothed count, in seconds.
        format: of the rows. out: their file; default: the standard output.
        resume: continue an interrupted run that wrote to ``out``, if there is one.
        density: where to write density maps: of a single image ``.png`` or ``.npy`` ((h, w) float32, heads
            a cell), of a single video as ``annotate``; of several inputs a folder.
        annotate: where to write the frames with density and count: ``.mp4``, of several inputs a folder.

    Raises:
        OptionError: for incompatible options. CrowdExitError: for an invalid value.
    """

    audio: Path | None = None
    exit: str = "auto"
    deadline_ms: float | None = None
    late: Late = "wait"
    policy: Policy = ANYTIME
    budget_ms: float | None = None
    fps: float = DEFAULT_FPS
    start: float = 0.0
    end: float = math.inf
    batch: int | None = None
    smooth: float = HALF_LIFE_S
    format: Format = "table"
    out: Path | None = None
    resume: bool = False
    density: Path | None = None
    annotate: Path | None = None

    def __post_init__(self) -> None:
        checked_format(self.format)
        check_deadline(self.deadline_ms)
        check_positive(self.budget_ms)
        Smoother(self.smooth)
        _ = self.span
        if self.batch is not None and not 1 <= self.batch <= MAX_BATCH:
            raise VideoError(f"a batch of {self.batch} frames (there are 1 to {MAX_BATCH})")
        if self.batch_size > 1 and self.deadline_ms is not None:
            raise VideoError(f"a batch of {self.batch} frames cannot keep a deadline")
        if self.late == "fail" and self.deadline_ms is None:
            raise OptionError("{} fail: nothing is late without {}", Option("late"), Option("deadline_ms"))
        if self.format == "parquet" and self.out is None:
            raise OptionError("{} parquet: name a file with {}", Option("format"), Option("out"))
        if self.budget_ms is not None:
            self._check_budget()
        if self.resume:
            self._check_resume()

    def _check_budget(self) -> None:
        drawn = self.density is not None
        if self.exit != "auto" or self.deadline_ms is not None or self.policy is not ANYTIME or drawn:
            names = map(Option, ("budget_ms", "exit", "deadline_ms", "policy", "density"))
            raise OptionError("{}: a budget chooses the exits itself, without {}, {}, {} or {}", *names)
        if self.resume:
            problem = "a budget covers all images of one run and cannot be resumed"
            raise OptionError("{}: {}", Option("resume"), problem)

    def _check_resume(self) -> None:
        if not self.resumable:
            raise not_resumable()
        if self.annotate or self.density:
            raise OptionError("{}: what is drawn cannot go on where it was stopped, only rows can", Option("resume"))

    @property
    def span(self) -> Span:
        """Which frames of a video are counted."""
        return Span(self.fps, self.start, self.end)

    @property
    def batch_size(self) -> int:
        """Frames per batch."""
        return self.batch or (BATCH if self.deadline_ms is None else 1)

    @property
    def resumable(self) -> bool:
        """Whether an interrupted run over files can be resumed."""
        return self.out is not None and self.format != "table" and self.budget_ms is None

    def for_sources(self, sources: Sequence[Source]) -> CountOptions:
        """Fill in what depends on the sources: a live one is counted frame by frame; links are resolved."""
        live = any(source.kind == "live" for source in sources)
        batch = 1 if live and self.batch is None else self.batch
        out = self.out.resolve() if self.out is not None and self.out.is_symlink() else self.out
        return replace(self, batch=batch, out=out)

    def of_rows(self) -> dict[str, Any]:
        """The options on which the rows depend."""
        names = ("format", "fps", "start", "end", "smooth", "exit", "deadline_ms", "late", "policy")
        return {name: getattr(self, name) for name in names}


def not_resumable() -> OptionError:
    """The error for a run that cannot be resumed."""
    text = "{}: only rows of files go on, in {} as csv, json or parquet"
    return OptionError(text, Option("resume"), Option("out"))
