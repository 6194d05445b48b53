"""Augmentation pipeline of the discriminator's input, and the controller of the augmentation probability.

Implements adaptive discriminator augmentation (Karras et al. 2020b, "Training generative adversarial networks with
limited data") and DiffAugment (diffaugment.py). Adaptive pseudo augmentation (Jiang et al. 2021) transforms no images:
it uses the controller here, and training.loss.GAN.reals replaces images.
"""

from dataclasses import dataclass
from math import ceil, isclose
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnnlib.config import ConfigError, check_bounds, setting
from dnnlib.schedule import Schedule, value_at
from torch_utils.ops.conv2d import conv2d
from training.augment.diffaugment import DIFFAUG, PARAMETERS
from training.augment.stages import PIPES, STAGES, AffineStage, AugmentStage, Transform

Mode = Literal["noaug", "ada", "fixed", "diffaug", "apa"]

# Fields used by each mode. Flags for other fields are rejected.
MODE_FIELDS: dict[str, tuple[str, ...]] = {
    "noaug": ("blur",),
    "ada": ("pipe", "color_strength", "target", "ada_kimg", "ada_interval", "max_p", "paired", "blur"),
    "fixed": ("pipe", "color_strength", "p", "paired", "blur"),
    "diffaug": ("policy", "translation", "cutout_p", "filter_p", "hue_p", "paired", "blur"),
    "apa": ("target", "ada_kimg", "ada_interval", "max_p", "blur"),
}
ADAPTIVE = ("ada", "apa")  # modes whose p follows AdaController
WITHOUT_TRANSFORMS = ("noaug", "apa")


def parse_mode(text: str) -> str:
    """Parse an augmentation mode; `none` is an alias of `noaug`."""
    return "noaug" if text == "none" else text


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Configuration of the augmentation: its mode, its transforms and their probabilities."""

    mode: Mode = setting(
        "ada",
        "Augmentation: none, adaptive p (ADA), constant p, DiffAugment, or pseudo augmentation (APA).",
        parse=parse_mode,
    )
    pipe: str = setting("bgc", "Groups of transforms for ada and fixed.", choices=tuple(PIPES))
    color_strength: float = setting(
        1.0, "Probability of each colour transform, as a fraction of p.", at_least=0, at_most=1
    )
    p: float | Schedule | None = setting(
        None, "Probability of each transform, for fixed; None in other modes.", at_least=0, at_most=1
    )
    target: float = setting(0.6, "Target of ADA and APA for the mean sign of D(real).", at_least=0, at_most=1)
    ada_kimg: float = setting(500, "Speed of ADA and APA: thousands of images in which p can change by 1.", above=0)
    ada_interval: int = setting(4, "Number of steps between adjustments of p by ADA and APA.", at_least=1)
    max_p: float = setting(1.0, "Upper bound of p for ADA and APA.", above=0, at_most=1)
    policy: tuple[str, ...] | None = setting(
        None, "Transforms of DiffAugment, in order; None: translation,cutout,color.", auto=True, choices=tuple(DIFFAUG)
    )
    translation: float = setting(
        0.125, "Maximum shift of DiffAugment's translation, as a fraction of the image size.", at_least=0, at_most=1
    )
    cutout_p: float = setting(
        1.0, "Probability of DiffAugment's cutout or erase, drawn once per micro-batch.", at_least=0, at_most=1
    )
    filter_p: float = setting(
        1.0, "Probability of DiffAugment's filter, per image and frequency band.", at_least=0, at_most=1
    )
    hue_p: float = setting(1.0, "Probability of DiffAugment's hue, per image.", at_least=0, at_most=1)
    paired: bool = setting(False, "Augment the two images of a pair of relativistic with the same random draw.")
    blur: float | Schedule = setting(
        0.0, "Standard deviation in pixels of a Gaussian blur of all of D's images; 0: none.", at_least=0, at_most=100
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.mode == "fixed" and self.p is None:
            raise ConfigError("p", self.p, "mode 'fixed' needs the probability of augmentation, from 0 to 1")
        if self.mode != "fixed" and self.p is not None:
            raise ConfigError("p", self.p, f"mode '{self.mode}' does not use a probability; omit it or use 'fixed'")
        if self.policy is not None:
            self._check_policy(self.policy)

    def _check_policy(self, policy: tuple[str, ...]) -> None:
        if self.mode != "diffaug":
            raise ConfigError("policy", policy, f"mode '{self.mode}' does not use a policy; omit it or use 'diffaug'")
        if not policy or len(set(policy)) < len(policy):
            raise ConfigError("policy", policy, f"give one or more of {', '.join(DIFFAUG)}, each at most once")

    @property
    def identity(self) -> str | None:
        """Option because of which images are never transformed, for messages; None if there are transforms."""
        if self.mode in WITHOUT_TRANSFORMS:
            return f"--aug={self.mode}"
        return "--p=0" if self.mode == "fixed" and self.p == 0 else None

    def fixed_p(self, nimg: int) -> float | None:
        """Return the probability after `nimg` images in modes 'diffaug' and 'fixed'; None in the other modes."""
        if self.mode == "diffaug":
            return 1.0
        return None if self.p is None else value_at(self.p, nimg)


class AugmentPipe(nn.Module):
    """Augment images [B, C, H, W] of `img_shape` (C, H, W), with values roughly in [-1, 1], preserving their shape.

    Each transform is applied to each image with probability `p`, a scalar tensor on the device. In mode 'diffaug' p is
    1, and some transforms have their own probability. With p = 0 the images are unchanged. In modes 'noaug' and 'apa'
    there are no transforms. The pipe is twice differentiable with respect to the images. Raises ConfigError if the pipe
    or policy does not support the image shape.

    With `config.blur`, a Gaussian blur of standard deviation `sigma`, a scalar tensor, precedes the transforms.
    """

    p: Tensor
    sigma: Tensor

    def __init__(self, config: AugmentConfig, img_shape: tuple[int, int, int]) -> None:
        super().__init__()
        # Not persistent, because p is part of the controller's state.
        self.register_buffer("p", torch.tensor(config.fixed_p(0) or 0.0, dtype=torch.float32), persistent=False)
        self.stages = nn.ModuleList(_build_stages(config, img_shape))
        self.register_buffer("sigma", torch.tensor(value_at(config.blur, 0)), persistent=False)
        largest = max(config.blur.numbers) if isinstance(config.blur, Schedule) else config.blur
        self.blur_radius = ceil(3 * largest)

    def draw(self, images: Tensor) -> list[Tensor]:
        """Draw the parameters of every transform for images [B, C, H, W]: one tensor [B, ...] per transform."""
        return [stage.draw(images, self.p) for stage in self._transforms()]

    def forward(self, images: Tensor, values: list[Tensor] | None = None) -> Tensor:
        """Transform images with the parameters `values`, as from `draw`; None: random parameters."""
        values = self.draw(images) if values is None else values
        images = blurred(images, self.sigma, self.blur_radius) if self.blur_radius else images
        for stage, parameters in zip(self._transforms(), values, strict=True):
            images = stage.transform(images, parameters)
        return images

    def without_transforms(self, images: Tensor) -> Tensor:
        """Return images as D sees them without augmentation."""
        return images

    def _transforms(self) -> list[Transform]:
        return cast(list[Transform], [*self.stages])


def blurred(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur images [B, C, H, W] by a Gaussian of standard deviation `sigma`, a scalar tensor, cut off at `radius`.

    Beyond their borders images are gray (0). A sigma of 0 leaves them unchanged.
    """
    x = torch.arange(-radius, radius + 1, device=images.device)
    taps = (-x.square() / (2 * sigma.clamp(min=1e-3).square())).exp()
    C, taps = images.shape[1], (taps / taps.sum()).to(images.dtype)
    images = F.pad(images, (radius, radius, radius, radius))
    images = conv2d(images, taps.expand(C, 1, 1, -1), groups=C)
    return conv2d(images, taps[:, None].expand(C, 1, -1, -1), groups=C)


def _build_stages(config: AugmentConfig, img_shape: tuple[int, int, int]) -> list[Transform]:
    if config.mode in WITHOUT_TRANSFORMS:
        return []
    if config.mode == "diffaug":
        if config.policy is None:
            raise ConfigError("policy", None, "not resolved")
        return [_build_diffaug(name, config, img_shape) for name in config.policy]
    active = set(PIPES[config.pipe])
    return [_build_stage(stage, config, img_shape) for stage in STAGES if active & set(stage.groups)]


def _build_stage(stage: type[AugmentStage], config: AugmentConfig, img_shape: tuple[int, int, int]) -> AugmentStage:
    if issubclass(stage, AffineStage):
        return stage(config.pipe, img_shape, color_strength=config.color_strength)
    return stage(config.pipe, img_shape)


def _build_diffaug(name: str, config: AugmentConfig, img_shape: tuple[int, int, int]) -> Transform:
    if name not in PARAMETERS:
        return DIFFAUG[name](img_shape)
    return DIFFAUG[name](img_shape, getattr(config, PARAMETERS[name]))


class AdaController:
    """Controller that adjusts p of a pipe to keep the overfitting heuristic r = E[sign D(real)] at the target.

        p <- clamp(p + sign(r - target) * batch * interval / (ada_kimg * 1000), 0, max_p)        every `interval` steps

    Karras et al. 2020b, section 3. r is the average since the last adjustment. All values stay on the device. In modes
    other than 'ada' and 'apa' p is constant or follows a schedule. In mode 'apa' r includes the generated images that
    replace real images: while D recognises every image, r = 1 - 2 p, or 1 - p on pairs of generated and real images.
    """

    def __init__(self, config: AugmentConfig, pipe: AugmentPipe) -> None:
        self.config = config
        self.pipe = pipe
        self.sign_sum = torch.zeros_like(pipe.p)
        self.count = torch.zeros_like(pipe.p)

    def observe(self, mean_sign: Tensor, skip: Tensor) -> None:
        """Accumulate the mean of sign(D(real)) over the global batch of a step, a scalar. Call once per step and rank.

        `skip`, a boolean scalar on the device, is true if the mean is not finite; such a step is ignored.
        """
        if self.config.mode in ADAPTIVE:
            self.sign_sum += torch.where(skip, 0, mean_sign.detach())
            self.count += ~skip

    def follow_schedule(self, nimg: int) -> None:
        """Set sigma to its value after `nimg` images, and p too, except in modes 'ada' and 'apa'."""
        p = self.config.fixed_p(nimg)
        if p is not None:
            self.pipe.p.fill_(p)
        if isinstance(self.config.blur, Schedule):
            self.pipe.sigma.fill_(self.config.blur.at(nimg))

    def update(self, step: int, batch_size: int) -> None:
        """Adjust p every `ada_interval` steps. `step` counts completed steps; `batch_size` is the global batch size."""
        if self.config.mode not in ADAPTIVE or step % self.config.ada_interval != 0:
            return
        change = batch_size * self.config.ada_interval / (self.config.ada_kimg * 1000)
        direction = (self.sign_sum - self.config.target * self.count).sign()  # 0 when nothing was observed
        self.pipe.p.add_(direction * change).clamp_(0, self.config.max_p)
        self.sign_sum.zero_()
        self.count.zero_()

    def is_saturated(self, p: float) -> bool:
        """Return whether p (read from the device) is at its upper bound, which suggests too little data."""
        is_at_bound = p >= self.config.max_p or isclose(p, self.config.max_p, rel_tol=1e-6)
        return self.config.mode in ADAPTIVE and is_at_bound

    def state_dict(self) -> dict[str, Tensor]:
        return {"p": self.pipe.p, "sign_sum": self.sign_sum, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state in place. Raises ValueError if its keys differ from those of `state_dict`."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(f"state of the ADA controller has {sorted(state)}, expected {sorted(own)}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
