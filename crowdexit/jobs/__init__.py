"""The job of `crowdexit count`: sources, frames, rows, resuming."""
