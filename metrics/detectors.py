"""Feature networks: their weight files, and their preprocessing of images, which is part of the metric.

The networks come from maintained libraries: Inception, VGG16 and LPIPS from torch-fidelity, DINOv2 from transformers.
A custom network is a program (.pt2 of torch.export, or TorchScript) that maps uint8 images [B, C, H, W] to features
[B, F] and optionally class logits [B, K]. A program can run arbitrary code, so it is loaded only if `--detector`
specifies it, never because a file does.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import math
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from dnnlib.config import UserError, show
from dnnlib.util import describe_error, import_extra, open_regular, read_json
from metrics import programs
from metrics.weights import INCEPTION, KNOWN, LPIPS, VGG16, WeightFile, check, detector_dir, fetch, sha256_of
from torch_utils import distributed

Role = Literal["inception", "vgg16", "lpips", "dinov2"]
Output = tuple[Tensor, Tensor | None]  # features (B, F) and logits (B, K), both float32

FILES: Mapping[Role, tuple[WeightFile, ...]] = {
    "inception": (INCEPTION,),
    "vgg16": (VGG16,),
    "lpips": (VGG16, LPIPS),
    "dinov2": (),
}
PACKAGES: Mapping[Role, str] = {
    "inception": "torch_fidelity",
    "vgg16": "torch_fidelity",
    "lpips": "torch_fidelity",
    "dinov2": "transformers",
}
DESCRIPTIONS = {
    "inception, stylegan": "Inception of 2015-12-05, TensorFlow's bilinear resize to 299 px without antialiasing",
    "inception, clean": "Inception of 2015-12-05, antialiased bicubic resize to 299 px as in clean-fid",
    "vgg16": "fc2 of torchvision's VGG16, TensorFlow's bilinear resize to 224 px",
    "lpips": "LPIPS of torch-fidelity on torchvision's VGG16",
    "dinov2": "class token of DINOv2, antialiased bicubic resize to 224 px",
}
TVGG16 = "names end in _tvgg16 because torchvision's VGG16 may differ from the StyleGAN family's vgg16.pt"
REPLACEABLE: tuple[Role, ...] = ("inception", "vgg16")
PROTOCOLS = ("stylegan", "clean")

DINOV2_FOLDER = "dinov2-large"
DINOV2_SIZE = 224
DINOV2_MAX = {  # upper bounds on values in config.json, at least four times those of the largest published networks
    "hidden_size": 8192,
    "num_hidden_layers": 200,
    "num_attention_heads": 256,
    "mlp_ratio": 64,
    "patch_size": 128,
    "image_size": 4096,
    "num_channels": 3,
}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A feature network on its device: uint8 images [B, C, H, W] -> features and, for a classifier, class logits."""

    name: str
    network: Callable[[Tensor], Output] = field(repr=False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Output:
        with full_float32():
            return self.network(images)


@dataclass(frozen=True, kw_only=True)
class DetectorSetup:
    """Source of each feature network (a file given by the user or a cached file), and the protocol."""

    program: Path | None = None  # replaces every replaceable network
    bound: Mapping[Role, Path] = field(default_factory=dict)  # programs that the user specified as these networks
    dinov2: Path | None = None
    weights: Mapping[str, Path] = field(default_factory=dict)  # WeightFile.name -> file
    protocol: str = "stylegan"

    def program_of(self, role: Role) -> Path | None:
        """Return the program that replaces this network, or None."""
        return self.bound.get(role) or (self.program if role in REPLACEABLE else None)

    def suffix_of(self, role: Role) -> str:
        """Return the suffix of a metric's name if a custom detector replaces the network of this role, else ''."""
        if self.program is None or role in self.bound or role not in REPLACEABLE:
            return ""
        return "_" + re.sub(r"[^A-Za-z0-9]+", "-", self.program.stem)

    def missing(self, role: Role) -> str | None:
        """Return a message with the missing file or package and its remedy, or None. Fetches nothing."""
        if self.program_of(role):
            return None
        for file in FILES[role]:
            if file.name not in self.weights and not file.path.is_file():
                return f"{file.describe()} is not in {file.path.parent}"
        if role == "dinov2" and not (self._dinov2_folder() / "config.json").is_file():
            return (
                f"{self._dinov2_folder()} does not hold DINOv2: put config.json and model.safetensors of "
                "facebook/dinov2-large there, or specify a folder that holds them with --detector=FOLDER"
            )
        if importlib.util.find_spec(PACKAGES[role]) is None:
            return f"the package {PACKAGES[role].replace('_', '-')} is not installed: pip install '.[metrics]'"
        return None

    def needs(self, role: Role) -> str:
        """Return the files and the package that a network needs."""
        program = self.program_of(role)
        if program:
            return program.name
        files = " and ".join(file.name for file in FILES[role]) + ", downloaded on first use"
        if role == "dinov2":
            files = "config.json and model.safetensors of facebook/dinov2-large"
        return f"{files}; the package {PACKAGES[role].replace('_', '-')}"

    def prepare(self, role: Role) -> None:
        """Fetch and check the files of a network. Raises UserError for a missing file or package."""
        if self.program_of(role):
            return
        for file in FILES[role]:
            self._path_of(file)
        missing = self.missing(role)
        if missing:
            raise UserError(missing)
        import_extra(PACKAGES[role], "metrics")

    def identity(self, role: Role) -> dict[str, str]:
        """Return the name of a network and the sha256 of its files, which determine the features."""
        program = self.program_of(role)
        if program:
            return {"detector": program.name, "detector_sha256": sha256_of(program)}
        if role == "dinov2":
            folder = self._dinov2_folder()
            return {"detector": _dinov2_name(folder), "detector_sha256": sha256_of(folder)}
        paths = [self._path_of(file) for file in FILES[role]]
        name = {"inception": "inception-2015-12-05", "vgg16": "torchvision VGG16", "lpips": "LPIPS, torchvision VGG16"}
        return {"detector": name[role], "detector_sha256": " ".join(sha256_of(path) for path in paths)}

    def library_of(self, role: Role) -> str | None:
        """Return the package and version that implement a network and its resize; None for a program."""
        if self.program_of(role):
            return None
        return f"{PACKAGES[role]} {importlib.metadata.version(PACKAGES[role])}"

    def describe(self, role: Role) -> str:
        """Return a description of the network and its preprocessing."""
        program = self.program_of(role)
        if program:
            return f"features of {program.name}"
        return DESCRIPTIONS.get(f"{role}, {self.protocol}") or DESCRIPTIONS[role]

    def load(self, role: Role, device: torch.device) -> Detector:
        """Build a feature network. Raises UserError for unusable files."""
        program = self.program_of(role)
        if program:
            return load_program(program, device)
        if role == "dinov2":
            return load_dinov2(self._dinov2_folder(), device)
        state = load_state_dict(self._path_of(FILES[role][0]))
        if role == "vgg16":
            return load_vgg16(state, device)
        return load_inception(state, device, clean=self.protocol == "clean")

    def load_similarity(self, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """Build LPIPS as a function: two batches of RGB images with values in 0..255 -> distances (B,)."""
        return load_lpips(*self._lpips_states(), device)

    def load_lpips_network(self, device: torch.device) -> Any:
        """Build the LPIPS module, for access to its activations."""
        return load_lpips_network(*self._lpips_states(), device)

    def _lpips_states(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        vgg16, linear = (load_state_dict(self._path_of(file)) for file in FILES["lpips"])
        return vgg16, linear

    def _path_of(self, file: WeightFile) -> Path:
        return check(file, self.weights[file.name]) if file.name in self.weights else fetch(file)

    def _dinov2_folder(self) -> Path:
        return self.dinov2 or detector_dir() / DINOV2_FOLDER


@contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32, regardless of the settings that the measured network was trained with."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def _dinov2_name(folder: Path) -> str:
    """Return the name of the DINOv2 variant in a folder. Published distances use ViT-L/14."""
    config = _read_dinov2_config(folder)
    width, depth, patch = (config[key] for key in ("hidden_size", "num_hidden_layers", "patch_size"))
    if (width, depth, patch) == (1024, 24, 14):
        return "DINOv2 ViT-L/14"
    return f"DINOv2 of width {width}, {depth} layers, patches {patch}: not comparable with ViT-L/14"


def _read_dinov2_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a DINOv2 folder. Raises UserError for values outside the bounds of DINOV2_MAX."""
    path = folder / "config.json"
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: config.json does not describe a DINOv2 ({describe_error(error)})") from None
    if not isinstance(config, dict) or not config.keys() >= {"hidden_size", "num_hidden_layers", "patch_size"}:
        raise UserError(
            f"{folder}: config.json does not describe a DINOv2 (no hidden_size, num_hidden_layers, patch_size)"
        )
    for name, limit in DINOV2_MAX.items():
        value = config.get(name, 1)
        if type(value) is not int or not 1 <= value <= limit:
            raise UserError(f"{path}: {name}={show(value)}: must be a whole number from 1 to {limit}")
    return config


def read_detectors(paths: tuple[str, ...], protocol: str = "stylegan") -> DetectorSetup:
    """Classify each --detector: a program, a known weight file, or a DINOv2 folder. Raises UserError otherwise."""
    program = dinov2 = None
    bound: dict[Role, Path] = {}
    weights = {}
    for given in paths:
        role, path = _split_role(given)
        if not path.exists():
            raise UserError(f"--detector={given}: no such file or folder")
        if not path.is_dir():
            _check_regular(given, path)
        if role and (path.is_dir() or not _is_program(path)):
            raise UserError(f"--detector={given}: not a program (.pt2, or TorchScript); omit `{role}:`")
        if role:
            bound[role] = path.resolve()
        elif path.is_dir():
            dinov2 = path.resolve()
        elif _is_program(path):
            if program:
                raise UserError(
                    f"--detector={path}: {program} is already given; use inception:FILE or vgg16:FILE to state which "
                    "network each file is"
                )
            program = path.resolve()
        else:
            weights[_identify(path).name] = path.resolve()
    return DetectorSetup(program=program, bound=bound, dinov2=dinov2, weights=weights, protocol=protocol)


def _check_regular(given: str, path: Path) -> None:
    try:
        open_regular(path).close()
    except OSError as error:
        raise UserError(f"--detector={given}: cannot be read ({error.strerror})") from None


def _split_role(given: str) -> tuple[Role | None, Path]:
    """Split a --detector such as vgg16:FILE into role and path; the role is None without such a prefix."""
    for role in REPLACEABLE:
        if given.startswith(f"{role}:"):
            return role, Path(given.removeprefix(f"{role}:"))
    return None, Path(given)


def _is_program(path: Path) -> bool:
    """Return whether a file is an exported program or TorchScript, both of which contain code, not a state dict."""
    if path.suffix == ".pt2":
        return True
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _identify(path: Path) -> WeightFile:
    """Identify a known weight file by its name or checksum. Raises UserError for any other file."""
    for file in KNOWN:
        if path.name == file.name or (file.sha256 and sha256_of(path).startswith(file.sha256)):
            check(file, path)
            return file
    known = ", ".join(file.name for file in KNOWN)
    raise UserError(
        f"--detector={path}: neither a program (.pt2, or TorchScript) nor a DINOv2 folder nor one of {known}"
    )


def to_rgb(images: Tensor) -> Tensor:
    """Repeat a gray channel three times. Raises UserError for images that are neither gray nor RGB."""
    channels = images.shape[1]
    if channels == 1:
        return images.expand(-1, 3, -1, -1)
    if channels != 3:
        raise UserError(
            f"this detector needs RGB images, but the images have {channels} channels: "
            "build the dataset with dataset_tool.py --channels=3, or specify a custom network with --detector"
        )
    return images


def load_inception(state: Mapping[str, Tensor], device: torch.device, *, clean: bool) -> Detector:
    """Return the Inception network of 2015-12-05: pool features (2048) and 1008 logits without bias.

    Images are resized to 299x299 as in TensorFlow 1 (bilinear, without half-pixel centres), the protocol of the
    StyleGAN family. `clean` selects an antialiased bicubic resize instead (Parmar et al. 2022).
    """
    module = import_extra("torch_fidelity.feature_extractor_inceptionv3", "metrics")
    with _patched(module, load_state_dict_from_url=lambda *_, **__: state), _preserved_rng():
        network = _build(
            lambda: module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"]), "Inception"
        )
    network.to(device)

    def forward(images: Tensor) -> Output:
        resize = {"interpolate_bilinear_2d_like_tensorflow1x": clean_resize} if clean else {}
        with _patched(module, **resize):
            features, logits = network(to_rgb(images))
        return features, logits

    return Detector(name="inception-2015-12-05", network=forward)


def clean_resize(x: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Resize float images with the antialiased bicubic filter of Pillow, without rounding."""
    return F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=align_corners).clamp(0, 255)


def load_vgg16(state: Mapping[str, Tensor], device: torch.device) -> Detector:
    """Return torchvision's VGG16: the 4096 features of fc2 after the ReLU, for images resized to 224x224."""
    module = import_extra("torch_fidelity.feature_extractor_vgg16", "metrics")
    with _patched(module, torchvision_load_pretrained_vgg16=lambda **_: _torchvision_vgg16(state)):
        network = module.FeatureExtractorVGG16("vgg16", ["fc2_relu"]).to(device)
    return Detector(name="torchvision VGG16", network=lambda images: (network(to_rgb(images))[0], None))


def load_lpips(
    vgg16: Mapping[str, Tensor], linear: Mapping[str, Tensor], device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return LPIPS on torchvision's VGG16: two float batches (B, 3, H, W) with values in 0..255 -> (B,)."""
    network = load_lpips_network(vgg16, linear, device)

    def distance(one: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad(), full_float32():
            result: Tensor = network(one, other).reshape(-1)
        return result

    return distance


def load_lpips_network(vgg16: Mapping[str, Tensor], linear: Mapping[str, Tensor], device: torch.device) -> Any:
    """Return torch-fidelity's LPIPS module with `normalize` (for images with values in 0..255), `net` and `lins`."""
    module = import_extra("torch_fidelity.sample_similarity_lpips", "metrics")
    replaced = {
        "load_state_dict_from_url": lambda *_, **__: linear,
        "torchvision_load_pretrained_vgg16": lambda: _torchvision_vgg16(vgg16),
    }
    with _patched(module, **replaced), _preserved_rng():
        return _build(lambda: module.SampleSimilarityLPIPS("lpips"), "LPIPS").to(device)


def _torchvision_vgg16(state: Mapping[str, Tensor]) -> nn.Module:
    torchvision = import_extra("torchvision", "metrics")
    with _preserved_rng(), torch.device("meta"):
        network: nn.Module = torchvision.models.vgg16(init_weights=False)
    _build(lambda: network.load_state_dict(state, assign=True), "VGG16")
    return network.eval()


def load_dinov2(folder: Path, device: torch.device) -> Detector:
    """Load DINOv2 from a transformers folder: the class token after the last norm, for images resized to 224x224."""
    transformers = import_extra("transformers", "metrics")
    _check_dinov2_size(folder, transformers)
    with _dinov2_errors(folder, transformers):
        network, info = transformers.Dinov2Model.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    if info["missing_keys"]:
        raise UserError(f"{folder}: lacks the weights of {len(info['missing_keys'])} tensors of DINOv2")
    network = network.eval().requires_grad_(False).to(device)

    def forward(images: Tensor) -> Output:
        return network(pixel_values=dinov2_input(images)).last_hidden_state[:, 0].float(), None

    return Detector(name=f"DINOv2 from {folder.name}", network=forward)


@contextmanager
def _dinov2_errors(folder: Path, transformers: ModuleType) -> Iterator[None]:
    """Convert every error of the library to UserError. Preserves the random state and silences stderr."""
    try:
        with _preserved_rng(), _quiet(transformers):
            yield
    except Exception as error:  # raised by transformers, safetensors or json
        raise UserError(f"{folder}: cannot load DINOv2 from this folder ({describe_error(error)})") from None


def _check_dinov2_size(folder: Path, transformers: ModuleType) -> None:
    """Raise UserError if model.safetensors is smaller than the network of config.json, before memory is allocated."""
    _read_dinov2_config(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such file; a DINOv2 folder needs this file")
    with _dinov2_errors(folder, transformers):
        with torch.device("meta"):
            network = transformers.Dinov2Model(transformers.Dinov2Config.from_pretrained(str(folder)))
        expected = sum(x.numel() for x in network.parameters())
        with import_extra("safetensors", "metrics").safe_open(path, "pt") as file:
            found = sum(math.prod(file.get_slice(name).get_shape()) for name in [*file.keys()])
    if found < expected:
        raise UserError(f"{path}: holds {found} parameters, but config.json describes a network of {expected}")


def dinov2_input(images: Tensor) -> Tensor:
    """Resize uint8 images as Pillow does (bicubic, antialiased) and normalise them.

    Pillow resizes the rows, rounds to 8 bits, resizes the columns and rounds again.
    """
    x = to_rgb(images).float()
    for size in ((x.shape[2], DINOV2_SIZE), (DINOV2_SIZE, DINOV2_SIZE)):
        x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    x = x / 255
    mean, std = (x.new_tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def load_program(path: Path, device: torch.device) -> Detector:
    """Load a custom network. The file can run arbitrary code; the caller ensures that the user requested it.

    TorchScript files of the StyleGAN family return probabilities unless called with `return_features=True`.
    """
    _warn_that_program_runs(path)
    module, arguments = load_module(path, device)
    options = {"return_features": True} if "return_features" in arguments else {}

    def forward(images: Tensor) -> Output:
        shape = f"uint8 images {tuple(images.shape)}"
        try:
            output = module(images, **options)
        except Exception as error:
            raise UserError(f"--detector={path}: failed on {shape} ({describe_error(error)})") from None
        return _checked_output(output, len(images), f"--detector={path}: for {shape}")

    return Detector(name=path.name, network=forward)


@functools.cache
def _warn_that_program_runs(path: Path) -> None:
    if distributed.is_main():
        print(
            f"--detector={path}: is a program that runs on this machine; use only programs that you trust",
            file=sys.stderr,
        )


def load_module(path: Path, device: torch.device) -> tuple[Any, list[str]]:
    """Load a program. Returns the module and its argument names. Raises UserError if loading fails."""
    try:
        with warnings.catch_warnings(), _quiet_export():
            warnings.simplefilter("ignore")  # deprecation of TorchScript, which is still in use; read-only buffers
            if path.suffix == ".pt2":
                return _move_to_device(programs.load(path), device).module(), []
            module = torch.jit.load(path, map_location=device).eval()
            return module, [argument.name for argument in module.forward.schema.arguments]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--detector={path}: cannot be loaded ({describe_error(error)})") from None


def _move_to_device(program: torch.export.ExportedProgram, device: torch.device) -> torch.export.ExportedProgram:
    """Move an exported program, including the device arguments that are stored in its graph."""
    place = torch.empty(0, device=device).device  # with the index of the GPU, which the graph compares
    return move_to_device_pass(program, str(place))


def _checked_output(output: Any, count: int, where: str) -> Output:
    parts = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    if not 1 <= len(parts) <= 2 or not all(isinstance(x, Tensor) and x.ndim == 2 and len(x) == count for x in parts):
        shown = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in parts]
        raise UserError(f"{where} it returned {shown}, expected features [B, F] and optionally logits [B, K]")
    features, logits = parts[0].float(), parts[1].float() if len(parts) == 2 else None
    return features, logits


def load_state_dict(path: Path) -> Mapping[str, Tensor]:
    """Read a state dict without running code. Raises UserError for a file that contains anything but tensors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old file formats; unreadable files raise below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a state dict ({describe_error(error)})") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: is not a state dict of tensors")
    return state


def _build(build: Callable[[], Any], name: str) -> Any:
    try:
        return build()
    except RuntimeError as error:
        raise UserError(f"{name}: the weights do not fit the network ({describe_error(error)})") from None


@contextmanager
def _patched(module: ModuleType, **attributes: Any) -> Iterator[None]:
    """Patch attributes of a module temporarily: torch-fidelity has no arguments for a state dict or a resize."""
    kept = {name: getattr(module, name) for name in attributes}
    for name, value in attributes.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


@contextmanager
def _preserved_rng() -> Iterator[None]:
    """Preserve the global random state while a network initialises its weights."""
    with torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Silence the logger of torch.export, which logs the traceback of errors that are raised anyway."""
    logger = logging.getLogger("torch.export")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Silence the logger of transformers, which reports errors on stderr that are raised anyway."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
