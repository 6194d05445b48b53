"""Trainers on fake tensors, which have shapes, types and devices but no values: a step takes seconds on any machine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_utils import custom_ops
from torch_utils.ops import library
from training.config import Environment, TrainConfig
from training.training_loop import Trainer


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make all tensors fake. A GPU has the kernels of this project."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # PyTorch's, of copying fake tensors
        stack.enter_context(FakeTensorMode())
        for owner, name, substitute in (
            (nn.Module, "to", move),  # modules of fake tensors refuse to be moved
            (nn.init, "trunc_normal_", lambda tensor, **options: tensor),  # which reads values
            (library, "kernels", lambda: None),
            (custom_ops, "why_not", lambda: None),
        ):
            stack.enter_context(patch.object(owner, name, substitute))
        stack.enter_context(patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True))
        yield


def move(module: nn.Module, device: Any = None, memory_format: torch.memory_format | None = None) -> nn.Module:
    """Stand in for nn.Module.to: new tensors without values take the place of all parameters and buffers."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the old one, which must live on to keep it
    for part in module.modules():
        tables: Any = part._parameters, part._buffers
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    layout = memory_format if memory_format and tensor.ndim == 4 else torch.preserve_format
                    new = torch.empty_like(tensor.detach(), device=device, memory_format=layout)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = tensor, nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                table[name] = moved[id(tensor)][1]
    return module


def new_trainer(config: TrainConfig, env: Environment, device: torch.device) -> Trainer:
    """Return a trainer for a data set of which only the labels exist: class numbers, or none."""
    labels = torch.empty(100, dtype=torch.int64) if env.c_dim else torch.empty(100, 0)
    dataset: Any = SimpleNamespace(img_shape=env.img_shape, c_dim=env.c_dim, labels=labels)
    return Trainer(config, dataset, device)


def new_batch(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a step on the trainer's device."""
    layout = torch.channels_last if trainer.config.channels_last else torch.contiguous_format
    img = torch.empty(trainer.batch_size, *trainer.dataset.img_shape, device=trainer.device)
    c = torch.empty(trainer.batch_size, trainer.dataset.c_dim, device=trainer.device)
    return img.contiguous(memory_format=layout), c
