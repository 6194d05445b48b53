"""Python interface of Styleformer: read snapshots, generate images, compute metrics, read datasets, train.

    import styleformer

    snapshot = styleformer.load_network("docs/shapes.pkl")        # networks and their configuration
    images = styleformer.generate(snapshot, range(4))             # uint8 [4, 3, 32, 32]
    record = styleformer.compute_metric("docs/shapes.pkl", "swd5k", data="data/shapes.zip")
    print(record["results"]["swd5k"])

These functions share the code of the `styleformer` commands. The first access to a function imports torch.
Invalid input raises `dnnlib.config.UserError`, a one-line message with the name, the value and the remedy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnnlib import __version__
    from styleformer.interface import Dataset, compute_metric, generate, load_network, train

__all__ = ["Dataset", "__version__", "compute_metric", "generate", "load_network", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there are {', '.join(__all__)}")
    return getattr(importlib.import_module("dnnlib" if name == "__version__" else "styleformer.interface"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
