"""Check inputs, options and output paths before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crowdexit.errors import Option, OptionError
from crowdexit.jobs.options import CountOptions, not_resumable
from crowdexit.jobs.output import output_paths
from crowdexit.jobs.sources import Source, SourceError, is_single, skip_unreadable
from crowdexit.utils.paths import output_file_problem, output_folder_problem

NOTHING_COUNTED = "none of the files could be counted"


def check_inputs(sources: Sequence[Source], options: CountOptions) -> set[Path]:
    """Check options against the sources, and output paths, before anything is loaded.

    Returns:
        All named files, resolved: inputs and outputs.

    Raises:
        OptionError: for an unsuitable option, or a path that is an input or cannot be written.
    """
    kinds = {s.kind for s in sources}
    single = is_single(sources)
    if options.audio is not None and (not single or "live" in kinds):
        problem = "an audio file belongs to one image or video, not to several or a live source"
        raise OptionError("{} {}: {}", Option("audio"), options.audio, problem)
    taken = _check_paths(sources, options)
    if "live" in kinds:
        if options.start:
            raise OptionError("{} {:g}: a live source begins now", Option("start"), options.start)
        if options.resume:
            raise not_resumable()
    if options.budget_ms is not None and kinds != {"image"}:
        raise OptionError("{}: images share a budget, a video has none", Option("budget_ms"))
    if options.resume and options.late == "fail" and len(set(sources)) < len(sources):
        problem = "resuming needs distinct files"
        raise OptionError("{}: with {} fail {}", Option("resume"), Option("late"), problem)
    return taken


def _check_paths(sources: Sequence[Source], options: CountOptions) -> set[Path]:
    single = is_single(sources)
    named: set[Path] = set()
    given = {path.resolve() for s in sources for path in (s.path, s.audio, options.audio) if path is not None}
    drawn = {Option("density"): options.density, Option("annotate"): options.annotate}
    for option, path in {Option("out"): options.out, **drawn}.items():
        if path is None:
            continue
        if path.resolve() in given:
            raise OptionError("{} {}: this is an input, it would be overwritten", option, path)
        is_one_file = single or option == "out"  # else a folder, whose files are never overwritten
        problem = output_file_problem(path) if is_one_file else output_folder_problem(path)
        if problem is None and option == "out" and not path.parent.is_dir():
            problem = f"cannot be written; the folder {path.parent} does not exist"
        if problem is not None:
            raise OptionError("{} {}: {}", option, path, problem)
        written = output_paths(path) if is_one_file else set()
        if overwritten := written & (given | named):
            problem = f"{min(overwritten)} would be overwritten, choose another name"
            raise OptionError("{} {}: {}", option, path, problem)
        named |= written
    kinds = {s.kind for s in sources}
    density, annotate = drawn
    if options.annotate is not None and kinds == {"image"}:
        text = "{} {}: this is for videos; of images, {} shows the map"
        raise OptionError(text, annotate, options.annotate, density)
    if options.annotate is not None and options.density is not None and "image" not in kinds:
        raise OptionError("{} {}: of a video, {} draws it; name one of the two", density, options.density, annotate)
    for option, path in drawn.items():
        if path is None:
            continue
        suffix = path.suffix.lower()
        if not single:
            if suffix in (".png", ".npy", ".mp4"):
                raise OptionError("{} {}: for several inputs this has to be a folder", option, path)
            continue
        kind = sources[0].kind
        suffixes = (".png", ".npy") if kind == "image" else (".mp4",)
        if suffix not in suffixes:
            of = {"live": "a live source", "video": "a video", "image": "an image"}[kind]
            raise OptionError("{} {}: of {} this ends in {}", option, path, of, " or ".join(suffixes))
    return given | named


def nameable(sources: Sequence[Source]) -> list[Source]:
    """The sources whose names are valid UTF-8.

    Raises:
        SourceError: if there is none, or one that was named itself is not.
    """
    good = []
    for source in sources:
        with skip_unreadable(source):
            try:
                source.name.encode()
            except UnicodeEncodeError:
                name = source.name.encode(errors="backslashreplace").decode()
                raise SourceError(f"{name}: no row can hold this name, it is not in UTF-8") from None
            good.append(source)
    if not good:
        raise SourceError(NOTHING_COUNTED)
    return good
