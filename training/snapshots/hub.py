"""Snapshots as models of the Hugging Face Hub: a folder of safetensors with sample images and a model card.

    HubModel(load_network("network-snapshot-000200.pkl"), license="cc-by-4.0").save_pretrained("shapes")
    G = HubModel.from_pretrained("shapes").G_ema                # a folder, or NAME/MODEL on the Hub

The folder contains neither G nor D, and names the dataset without its path. training/snapshots/model_card.py writes the
text of the model card.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.config import UserError
from torch_utils.images import save_pixels, to_uint8
from torch_utils.sheets import labelled_grid
from training.config import TrainConfig
from training.snapshots.exchange import load_folder, new_folder, write_folder
from training.snapshots.model_card import SAMPLES, is_split_value, num_samples, read_records, write_card
from training.snapshots.snapshot import Snapshot

try:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData, ModelHubMixin, snapshot_download
except ImportError as error:
    raise UserError(f"the package huggingface-hub cannot be imported ({error}): pip install '.[hub]'") from None


class HubModel(ModelHubMixin, library_name="styleformer", pipeline_tag="unconditional-image-generation"):
    """Snapshot as a Hub model; `license` is a licence identifier of the Hub, or None."""

    def __new__(cls, *args: Any, **kwargs: Any) -> HubModel:
        """Bypass the mixin's `__new__`, which would derive a config from the arguments and write it."""
        return object.__new__(cls)

    def __init__(self, snapshot: Snapshot, license: str | None = None) -> None:
        snapshot.require_generator("is the network to publish")
        self.snapshot, self.license = snapshot, license

    @property
    def G_ema(self) -> Any:
        """Exponential moving average of the generator."""
        return self.snapshot.G_ema

    def _save_pretrained(self, save_directory: Path) -> None:
        config, labels = without_paths(self.snapshot.config), self.snapshot.label_kind()
        write_folder(save_directory, replace(self.snapshot, G=None, D=None, config=config, labels=labels))
        images, captions = sample_images(self.snapshot)
        save_pixels(labelled_grid(images, captions), save_directory / SAMPLES)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **_: Any,
    ) -> HubModel:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        return cls(load_folder(folder))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the model card with the metadata of the Hub."""
        snapshot, config = self.snapshot, without_paths(self.snapshot.config)
        data = ModelCardData(
            **self._hub_mixin_info.model_card_data.to_dict() | {"license": self.license},
            model_name=Path(snapshot.path).stem,
            eval_results=[result for record in read_records(snapshot.path) for result in _to_results(record)] or None,
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{write_card(snapshot, config, self.license)}")


def save_hub_folder(folder: Path, snapshot: Snapshot, license: str | None = None) -> None:
    """Write a folder for upload to the Hub. Raises UserError if the path exists, WriteError if it cannot be written."""
    model = HubModel(snapshot, license)
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)


def without_paths(config: TrainConfig) -> TrainConfig:
    """Return a configuration in which URLs and paths are reduced to their last component."""
    data = replace(config.data, path=Path(config.data.path).name)
    # Turns vgg16:/a/FILE into vgg16:FILE.
    detectors = tuple(re.sub(r"(?s)^(\w+:)?.*?([^/]+)/*$", r"\1\2", name) for name in config.run.detectors)
    source = config.origin.source and Path(config.origin.source.partition("#")[0]).name
    origin = replace(config.origin, source=source)
    return replace(config, data=data, origin=origin, run=replace(config.run, detectors=detectors))


def sample_images(snapshot: Snapshot) -> tuple[torch.Tensor, list[str]]:
    """Return uint8 images and captions for seeds 0, 1, ..., cycling through the classes, or with zero label vectors."""
    G = snapshot.G_ema
    device, count = next(G.parameters()).device, num_samples(G)
    z = np.concatenate([np.random.RandomState(seed).randn(1, G.z_dim) for seed in range(count)])
    c, captions = torch.zeros(count, G.c_dim, device=device), [f"seed {seed}" for seed in range(count)]
    if G.c_dim and snapshot.label_kind() != "vectors":
        c = torch.eye(G.c_dim, device=device)[torch.arange(count) % G.c_dim]
        captions = [f"{caption}, class {seed % G.c_dim}" for seed, caption in enumerate(captions)]
    with torch.no_grad():
        return to_uint8(G(torch.from_numpy(z).float().to(device), c)), captions


def _to_results(record: dict[str, Any]) -> list[EvalResult]:
    """Return the values of a record that were measured on the dataset, not on equal parts of its images or others."""
    name = Path(record["data"]).name
    return [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in record["results"].items()
        if not is_split_value(metric)
    ]
