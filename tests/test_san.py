"""Slicing adversarial networks: the last layer, and the loss of its direction."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import small_config
from linear_gan import make_gan
from torch import Tensor
from training_helpers import new_trainer, saved_state, train_steps, train_with_a_break

from dnnlib.config import ConfigError
from torch_utils.checkpoint import digest
from training.config import PRESETS, Environment, apply_options, resolve
from training.loss import discriminator_hinge, discriminator_logistic
from training.networks import execution
from training.networks.discriminator import SlicingHead
from training.networks.styleformer_discriminator import StyleformerDiscriminatorConfig
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig

SMALL: dict[str, Any] = {
    "stylegan2": StyleGAN2DiscriminatorConfig(img_size=(8, 8), channel_base=64, channel_max=8, san=True),
    "styleformer": StyleformerDiscriminatorConfig(
        img_size=(16, 16), layers=(1, 1), channel_base=64, channel_max=8, depth=4, san=True
    ),
}


def head_of(dim: int) -> SlicingHead:
    head = SlicingHead(dim, conditional=False).double()
    with torch.no_grad():
        head.bias.copy_(torch.randn(dim))
        head.scale.fill_(1.7)
    return head


def test_the_logit_is_a_projection_on_a_unit_vector() -> None:
    head, h = head_of(5), torch.randn(3, 5).double()
    assert head.direction is not None
    omega = head.direction[0].detach() / math.sqrt(sum(x**2 for x in head.direction[0].tolist()))
    expected = torch.stack([1.7 * torch.dot(omega, row + head.bias) for row in h])[:, None]
    torch.testing.assert_close(head(h, None), expected)
    embedding = torch.randn(3, 5).double()
    rows = [1.7 * torch.dot(e / e.norm(), row + head.bias) for e, row in zip(embedding, h, strict=True)]
    torch.testing.assert_close(head(h, embedding), torch.stack(rows)[:, None])


def test_each_column_trains_its_own_parameters() -> None:
    head, h = head_of(5), torch.randn(3, 5).double().requires_grad_(True)
    assert head.direction is not None
    with execution.using(slicing=True):
        both = head(h, None)
    plain = head(h, None)
    torch.testing.assert_close(both, plain.expand(-1, 2))
    parts = (h, head.bias, head.scale, head.direction)
    whole = torch.autograd.grad(plain.sum(), parts)
    first = torch.autograd.grad(both[:, 0].sum(), parts, retain_graph=True)
    second = torch.autograd.grad(both[:, 1].sum(), parts)
    torch.testing.assert_close(first, (*whole[:3], torch.zeros_like(whole[3])))
    torch.testing.assert_close(second, (*map(torch.zeros_like, whole[:3]), whole[3]))


class Sliced(torch.nn.Module):
    """D with h(x) = the mean of each channel, for images (B, 2, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = head_of(2)

    def forward(self, img: Tensor, c: Tensor) -> Tensor:
        logits: Tensor = self.head(img.mean(dim=(2, 3)), None)
        return logits


@pytest.mark.parametrize("loss", [discriminator_logistic, discriminator_hinge])
def test_the_direction_maximises_the_difference_of_means(loss: Any) -> None:
    """Gradients of the loss of D in closed form: of scale by the objective, of the direction by the difference."""
    gan = make_gan()
    D = Sliced()
    gan = replace(gan, D=D)
    real = torch.randn(4, 2, 4, 4).double()
    torch.manual_seed(3)
    terms = loss(gan, real, torch.zeros(4, gan.G.c_dim))
    assert D.head.direction is not None
    by_scale, by_direction = torch.autograd.grad(terms.loss, [D.head.scale, D.head.direction])

    torch.manual_seed(3)
    with torch.no_grad():
        fake, *_ = gan.generate(4)
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    omega = F.normalize(D.head.direction, dim=1)[0].detach()
    h_fake, h_real = (x.mean(dim=(2, 3)) + D.head.bias.detach() for x in (fake, real))
    f, r = scale * h_fake @ omega, scale * h_real @ omega
    if loss is discriminator_logistic:
        objective = (1 + f.exp()).log().mean() + (1 + (-r).exp()).log().mean()
    else:
        objective = (1 + f).clamp(min=0).mean() + (1 - r).clamp(min=0).mean()
    torch.testing.assert_close(terms.stats["Loss/D/loss"], objective)
    torch.testing.assert_close(by_scale, torch.autograd.grad(objective, scale)[0])
    gap = 1.7 * (h_fake.mean(dim=0) - h_real.mean(dim=0))
    tangent = (gap - (gap @ omega) * omega) / D.head.direction.norm()  # derivative of the normalised direction
    torch.testing.assert_close(by_direction[0], tangent)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("c_dim", [0, 3])
def test_discriminators_have_a_slicing_head(family: str, c_dim: int) -> None:
    D = replace(SMALL[family], c_dim=c_dim).build()
    img, c = torch.randn(4, *D.img_shape), F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()[:, :c_dim]
    logits = D(img, c)
    with execution.using(slicing=True):
        both = D(img, c)
    assert logits.shape == (4, 1)
    torch.testing.assert_close(both, logits.expand(-1, 2))
    assert (D.head.direction is None) == bool(c_dim)
    plain = replace(SMALL[family], c_dim=c_dim, san=False).build()
    assert plain.head is None


def test_training_with_san_resumes_exactly(shapes_zip: Path, tmp_path: Path) -> None:
    config = small_config(shapes_zip, discriminator__san=True, loss__r1_interval=2)
    straight = new_trainer(config)
    direction = straight.D.head.direction.clone()
    train_steps(straight, 4)
    assert not torch.equal(direction, straight.D.head.direction)
    resumed = train_with_a_break(config, 2, 2, tmp_path)
    assert digest(saved_state(resumed)) == digest(saved_state(straight))


@pytest.mark.parametrize("objective", ["relativistic", "wgangp-eps"])
def test_san_is_refused_where_it_is_not_defined(objective: str) -> None:
    options = {"loss.objective": objective, "discriminator.san": True}
    with pytest.raises(ConfigError, match=r"discriminator\.san=True: needs --loss=logistic or hinge"):
        resolve(apply_options(PRESETS["tiny"], options), Environment(img_shape=(3, 32, 32), c_dim=0))
