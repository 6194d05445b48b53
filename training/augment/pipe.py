"""Augmentation: what the discriminator sees of images, and how strongly.

Adaptive discriminator augmentation (Karras et al. 2020b, "Training generative adversarial networks with limited data"),
or DiffAugment (diffaugment.py).
"""

from dataclasses import dataclass
from math import isclose
from typing import Literal

import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError, check_bounds, setting
from training.augment.diffaugment import DIFFAUG, PARAMETERS
from training.augment.stages import PIPES, STAGES, Transform

Mode = Literal["noaug", "ada", "fixed", "diffaug"]

# The fields that each mode reads; the flags of the others are refused.
MODE_FIELDS: dict[str, tuple[str, ...]] = {
    "noaug": (),
    "ada": ("pipe", "target", "ada_kimg", "ada_interval", "max_p"),
    "fixed": ("pipe", "p"),
    "diffaug": ("policy", "translation", "cutout_p", "filter_p", "hue_p"),
}


def parse_mode(text: str) -> str:
    """Return a mode as it is typed: `none` is another word for noaug."""
    return "noaug" if text == "none" else text


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Transforms that the discriminator sees, each of which fires with probability p."""

    mode: Mode = setting("ada", "Augmentation: none, adaptive p (ADA), constant p, or DiffAugment.", parse=parse_mode)
    pipe: str = setting("bgc", "Groups of ADA's transforms, for ada and fixed.", choices=tuple(PIPES))
    p: float | None = setting(
        None, "Probability of each transform, for fixed; None in other modes.", at_least=0, at_most=1
    )
    target: float = setting(0.6, "Target of ADA: mean sign of D(real).", at_least=0, at_most=1)
    ada_kimg: float = setting(500, "Speed of ADA: thousands of images in which p can move by 1.", above=0)
    ada_interval: int = setting(4, "Steps between adjustments of ADA's p.", at_least=1)
    max_p: float = setting(1.0, "Upper bound of ADA's p.", above=0, at_most=1)
    policy: tuple[str, ...] | None = setting(
        None, "Transforms of DiffAugment, in order; None: translation,cutout,color.", auto=True, choices=tuple(DIFFAUG)
    )
    translation: float = setting(
        0.125, "Largest shift of DiffAugment's translation, as a fraction of the image's size.", at_least=0, at_most=1
    )
    cutout_p: float = setting(
        1.0, "Probability of DiffAugment's cutout or erase, drawn once per micro-batch.", at_least=0, at_most=1
    )
    filter_p: float = setting(
        1.0, "Probability of DiffAugment's filter, per image and frequency band.", at_least=0, at_most=1
    )
    hue_p: float = setting(1.0, "Probability of DiffAugment's hue, per image.", at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.mode == "fixed" and self.p is None:
            raise ConfigError("p", self.p, "mode 'fixed' needs the probability of augmentation, from 0 to 1")
        if self.mode != "fixed" and self.p is not None:
            raise ConfigError("p", self.p, f"mode '{self.mode}' takes no probability; leave it out or use 'fixed'")
        if self.policy is not None:
            self._check_policy(self.policy)

    def _check_policy(self, policy: tuple[str, ...]) -> None:
        if self.mode != "diffaug":
            raise ConfigError("policy", policy, f"mode '{self.mode}' takes no policy; leave it out or use 'diffaug'")
        if not policy or len(set(policy)) < len(policy):
            raise ConfigError("policy", policy, f"give some of {', '.join(DIFFAUG)}, each once")

    @property
    def constant_p(self) -> float | None:
        """The probability that does not change in training, None where the controller or nobody reads it."""
        return 1.0 if self.mode == "diffaug" else self.p


class AugmentPipe(nn.Module):
    """Augment images [B, C, H, W] of `img_shape` (C, H, W) with values in about [-1, 1]; the shape stays.

    Each transform fires for each image with probability `p`, a scalar on the device; in mode 'diffaug' p is 1, and some
    transforms have a probability of their own. At p = 0 images stay as they are. Twice differentiable in the images. In
    mode 'noaug' there are no transforms. Raises ConfigError when pipe or policy cannot treat images of this shape.
    """

    p: Tensor

    def __init__(self, config: AugmentConfig, img_shape: tuple[int, int, int]) -> None:
        super().__init__()
        # Not persistent: p belongs to the controller's state.
        self.register_buffer("p", torch.tensor(config.constant_p or 0.0, dtype=torch.float32), persistent=False)
        self.stages = nn.ModuleList(_build_stages(config, img_shape))

    def forward(self, images: Tensor) -> Tensor:
        for stage in self.stages:
            images = stage(images, self.p)
        return images


def _build_stages(config: AugmentConfig, img_shape: tuple[int, int, int]) -> list[Transform]:
    if config.mode == "noaug":
        return []
    if config.mode == "diffaug":
        if config.policy is None:
            raise ConfigError("policy", None, "not resolved")
        return [_build_diffaug(name, config, img_shape) for name in config.policy]
    active = set(PIPES[config.pipe])
    return [stage(config.pipe, img_shape) for stage in STAGES if active & set(stage.groups)]


def _build_diffaug(name: str, config: AugmentConfig, img_shape: tuple[int, int, int]) -> Transform:
    if name not in PARAMETERS:
        return DIFFAUG[name](img_shape)
    return DIFFAUG[name](img_shape, getattr(config, PARAMETERS[name]))


class AdaController:
    """Moves p of a pipe so that the discriminator's overfitting r = E[sign D(real)] stays at the target.

        p <- clamp(p + sign(r - target) * batch * interval / (ada_kimg * 1000), 0, max_p)        every `interval` steps

    Karras et al. 2020b, section 3. r is the mean since the last adjustment. All of it stays on the device. In modes
    other than 'ada' p never moves.
    """

    def __init__(self, config: AugmentConfig, pipe: AugmentPipe) -> None:
        self.config = config
        self.pipe = pipe
        self.sign_sum = torch.zeros_like(pipe.p)
        self.count = torch.zeros_like(pipe.p)

    def observe(self, mean_sign: Tensor, skip: Tensor) -> None:
        """Add up the mean of sign(D(real)) over a step's global batch, a scalar; once per step on every rank.

        Where `skip`, a boolean scalar on the device, is true, the mean is not finite and does not count.
        """
        if self.config.mode == "ada":
            self.sign_sum += torch.where(skip, 0, mean_sign.detach())
            self.count += ~skip

    def update(self, step: int, batch_size: int) -> None:
        """Adjust p if it is due at `step`, the number of steps done; `batch_size` images made a step."""
        if self.config.mode != "ada" or step % self.config.ada_interval != 0:
            return
        change = batch_size * self.config.ada_interval / (self.config.ada_kimg * 1000)
        direction = (self.sign_sum - self.config.target * self.count).sign()  # 0 when nothing was observed
        self.pipe.p.add_(direction * change).clamp_(0, self.config.max_p)
        self.sign_sum.zero_()
        self.count.zero_()

    def is_saturated(self, p: float) -> bool:
        """Say whether p, as read from the device, has reached its upper bound: the data may be too few for ADA."""
        return self.config.mode == "ada" and (p >= self.config.max_p or isclose(p, self.config.max_p, rel_tol=1e-6))

    def state_dict(self) -> dict[str, Tensor]:
        return {"p": self.pipe.p, "sign_sum": self.sign_sum, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a state in; raises ValueError when its names are not those of `state_dict`."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(f"state of the ADA controller has {sorted(state)}, expected {sorted(own)}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
