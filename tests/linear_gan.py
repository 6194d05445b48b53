"""GAN of two linear networks with closed forms of losses and penalties."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from training.augment.pipe import AugmentConfig, AugmentPipe
from training.loss import GAN

H = W = 4


class LinearG(nn.Module):
    """Generator with w = 2 z; the image is the sum of A w over the num_ws styles."""

    z_dim, w_dim, c_dim, num_ws = 3, 3, 0, 5

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(2 * H * W, 3, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def mapping(self, z: Tensor, c: Tensor) -> Tensor:
        return self.scale * z.double()[:, None].expand(-1, self.num_ws, -1)

    def synthesis(self, ws: Tensor, noise_mode: str) -> Tensor:
        assert noise_mode == "random"  # in all training phases
        return (ws.sum(dim=1) @ self.A.T).reshape(-1, 2, H, W)


class LinearD(nn.Module):
    """Discriminator with logit = <a, x> + b."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, H, W, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, img: Tensor, c: Tensor) -> Tensor:
        return ((img * self.a).sum(dim=(1, 2, 3)) + self.b)[:, None]


class Augment(AugmentPipe):
    """Augmentation by a function without random parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__(AugmentConfig(mode="noaug"), (2, H, W))
        self.function = function

    def forward(self, images: Tensor, values: list[Tensor] | None = None) -> Tensor:
        return self.function(images)


def make_gan(augment: Callable[[Tensor], Tensor] = lambda x: x, style_mixing: float = 0.0) -> GAN:
    torch.manual_seed(1)
    pl_mean = torch.tensor(0.7, dtype=torch.float64)
    return GAN(
        G=LinearG(),
        D=LinearD(),
        augment=Augment(augment),
        labels=torch.zeros(10, 0),
        style_mixing=style_mixing,
        pl_mean=pl_mean,
    )


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 2, H, W, dtype=torch.float64), torch.zeros(count, 0)
