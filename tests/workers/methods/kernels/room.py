"""All kernels of the room."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from workers.methods import kernels
from workers.methods.kernels.compiling import Kernel


def of_room() -> Iterator[Kernel]:
    """Every kernel that a module of the room holds under a name, or in a mapping under a name."""
    for found in pkgutil.iter_modules(kernels.__path__):
        for value in vars(importlib.import_module(f"{kernels.__name__}.{found.name}")).values():
            held = value.values() if isinstance(value, dict) else [value]
            yield from (each for each in held if isinstance(each, Kernel))
