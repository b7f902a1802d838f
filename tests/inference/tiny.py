"""A network small enough for tests, with a density that is not lost in rounding."""

TINY = {
    "width": 0.0625,
    "audio_width": 0.0625,
    "size": [128, 64],
    "dim": 4,
    "heads": 2,
    "hidden": 8,
    "filters": 2,
    "density_scale": 0.1,
}
