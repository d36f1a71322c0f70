"""Twelve quantum-chemical properties of a molecule from its geometry.

The public names below load on first use, so that `import qmprop` stays fast.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_WHERE = {
    "predict": "inference",
    "to_dataframe": "frames",
    "evaluate": "evaluation",
    "train": "training",
    "calibrate": "calibration",
    "load_model": "model",
    "Model": "model",
    "Molecule": "molecule",
    "Record": "records",
    "Value": "records",
    "Message": "records",
    "ModelConfig": "config",
    "TrainConfig": "config",
    "QmpropError": "errors",
}
__all__ = [*_WHERE, "__version__"]
try:
    __version__ = version("qmprop")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'qmprop' has no attribute '{name}'")
    return getattr(importlib.import_module(f"qmprop.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
