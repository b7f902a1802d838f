"""The registry of networks by name: each backbone registers its configurations beside its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from crowdexit.models.network import Config, MultiExitNetwork
from crowdexit.utils.modules import import_modules


@dataclass(frozen=True)
class Model:
    """A registered network: its factory and its configuration."""

    make: Callable[[Any], MultiExitNetwork]
    config: Config


_MODELS: dict[str, Model] = {}


def register_models(make: Callable[[Any], MultiExitNetwork], configs: Mapping[str, Config]) -> None:
    """Register a backbone's configurations by name.

    Args:
        make: the class of the network, or a function from a configuration to it.
        configs: frozen dataclasses of plain values, by name.
    """
    _MODELS.update({name: Model(make, config) for name, config in configs.items()})


def models() -> Mapping[str, Model]:
    """All networks by name."""
    import_modules("crowdexit.models.backbones")
    return _MODELS
