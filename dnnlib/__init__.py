"""Configuration, command-line and file helpers that do not import torch."""

from dnnlib import util
from dnnlib.util import EasyDict

__all__ = ["EasyDict", "util"]
__version__ = "0.2.0"
