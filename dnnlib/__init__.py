"""Configuration, command-line and file helpers that do not import torch."""

__version__ = "0.1.0"
