"""Trainers on fake tensors, which have shapes, types and devices but no data: a step takes seconds on any machine."""

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
from torch_utils.ops import encoder, library
from training.config import Environment, TrainConfig
from training.training_loop import Trainer


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make all tensors fake, with this project's kernels on the (fake) GPU."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # from PyTorch, about copies of fake tensors
        stack.enter_context(FakeTensorMode())
        for owner, name, substitute in (
            (nn.Module, "to", move),  # nn.Module.to raises for fake tensors
            (nn.init, "trunc_normal_", lambda tensor, **options: tensor),  # the original reads values
            (library, "kernels", lambda: None),
            (custom_ops, "why_not", lambda: None),
            (encoder, "why_not", lambda: None),
        ):
            stack.enter_context(patch.object(owner, name, substitute))
        stack.enter_context(patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True))
        yield


def move(module: nn.Module, device: Any = None, memory_format: torch.memory_format | None = None) -> nn.Module:
    """Replacement of nn.Module.to that replaces all parameters and buffers by new tensors without data."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # id of the old tensor -> (old, new); the reference keeps the id valid
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
    """Return a trainer for a dataset without images, with class numbers as labels, or without labels."""
    labels = torch.empty(100, dtype=torch.int64) if env.c_dim else torch.empty(100, 0)
    dataset: Any = SimpleNamespace(img_shape=env.img_shape, c_dim=env.c_dim, labels=labels)
    return Trainer(config, dataset, device)


def new_batch(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a step on the trainer's device."""
    layout = torch.channels_last if trainer.config.channels_last else torch.contiguous_format
    img = torch.empty(trainer.batch_size, *trainer.dataset.img_shape, device=trainer.device)
    c = torch.empty(trainer.batch_size, trainer.dataset.c_dim, device=trainer.device)
    return img.contiguous(memory_format=layout), c
