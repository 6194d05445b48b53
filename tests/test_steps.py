"""Training steps against a second implementation of their equations: gradients by autograd, everything else by hand.

Other tests compare two training runs and cannot detect a term that is missing in both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_config
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.misc import seed_step
from training.augment.pipe import AugmentPipe
from training.dataset import EpochSampler, ImageDataset
from training.networks import execution
from training.training_loop import Trainer

SEED, BATCH, MICRO, STEPS = 7, 8, 4, 3
# All values are distinct and differ from the defaults, so the test detects mix-ups.
GAMMA, R1_INTERVAL, PL_WEIGHT, PL_INTERVAL, PL_DECAY, MIXING = 8.0, 2, 5.0, 3, 0.03, 0.7
G_LR, D_LR, G_BETAS, D_BETAS, EPS = 0.0013, 0.007, (0.3, 0.97), (0.2, 0.95), 1e-2
EMA_KIMG, ADA_KIMG, ADA_INTERVAL, ADA_TARGET, W_AVG_RATE = 0.05, 0.4, 3, 0.55, 0.07

CONFIG: dict[str, Any] = {
    "seed": SEED,
    "batch_size": BATCH,
    "run__batch_gpu": MICRO,
    "loss__r1_gamma": GAMMA,
    "loss__r1_interval": R1_INTERVAL,
    "loss__pl_weight": PL_WEIGHT,
    "loss__pl_interval": PL_INTERVAL,
    "loss__pl_decay": PL_DECAY,
    "loss__style_mixing": MIXING,
    "g_optimizer__lr": G_LR,
    "g_optimizer__beta1": G_BETAS[0],
    "g_optimizer__beta2": G_BETAS[1],
    "g_optimizer__eps": EPS,
    "d_optimizer__lr": D_LR,
    "d_optimizer__beta1": D_BETAS[0],
    "d_optimizer__beta2": D_BETAS[1],
    "d_optimizer__eps": EPS,
    "ema__kimg": EMA_KIMG,
    "ema__rampup": None,
    "augment__pipe": "bgc",
    "augment__ada_kimg": ADA_KIMG,
    "augment__ada_interval": ADA_INTERVAL,
    "augment__target": ADA_TARGET,
    "w_avg_rate": W_AVG_RATE,
    "data__use_labels": True,
}

Terms = tuple[Tensor, dict[str, Tensor]]  # loss, and the batch means that update running averages
Loss = Callable[[Tensor, Tensor], Terms]


class Adam:
    """Algorithm 1 of Kingma & Ba 2015, with lr and betas adjusted for lazy regularisation every k steps."""

    def __init__(self, network: nn.Module, lr: float, betas: tuple[float, float], k: int) -> None:
        slowed = k / (k + 1)
        self.parameters = list(network.parameters())
        self.lr, self.betas = lr * slowed, [beta**slowed for beta in betas]
        self.moments = [(torch.zeros_like(p).double(), torch.zeros_like(p).double()) for p in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        self.steps += 1
        beta1, beta2 = self.betas
        for p, (m, v), g in zip(self.parameters, self.moments, gradients, strict=True):
            m += (1 - beta1) * (g.double() - m)
            v += (1 - beta2) * (g.double().square() - v)
            change = m / (1 - beta1**self.steps) / ((v / (1 - beta2**self.steps)).sqrt() + EPS)
            p.copy_(p.double() - self.lr * change)


class Reference:
    """Reference training that starts from the networks of a trainer."""

    def __init__(self, trainer: Trainer, p: float) -> None:
        self.G, self.D, self.G_ema = (copy.deepcopy(x).requires_grad_(True) for x in (trainer.G, trainer.D, trainer.G))
        self.data = ImageDataset(trainer.config.data)
        self.augment = AugmentPipe(trainer.config.augment, self.data.img_shape)
        self.augment.p.fill_(p)
        self.optimizers = {
            "G": Adam(self.G, G_LR, G_BETAS, PL_INTERVAL),
            "D": Adam(self.D, D_LR, D_BETAS, R1_INTERVAL),
        }
        self.running = {"w": torch.zeros(trainer.G.w_dim), "length": trainer.pl_mean.value.clone()}
        self.signs: list[Tensor] = []

    def train(self) -> None:
        for step in range(STEPS):
            indices = EpochSampler(len(self.data), SEED).indices(step * BATCH, BATCH)
            img = self.data.images(indices) / 127.5 - 1
            c = F.one_hot(self.data.labels[indices], self.data.c_dim).float()
            self.run("G_main", 1, self.g_main, step, img, c)
            if step % PL_INTERVAL == 0:
                self.run("G_reg", PL_INTERVAL, self.g_reg, step, img, c)
            self.run("D_main", 1, self.d_main, step, img, c)
            if step % R1_INTERVAL == 0:
                self.run("D_reg", R1_INTERVAL, self.d_reg, step, img, c)
            self.follow()
            if (step + 1) % ADA_INTERVAL == 0:
                self.adjust()

    def run(self, phase: str, weight: int, loss: Loss, step: int, *batch: Tensor) -> None:
        """Update a network by the mean gradient over the micro-batches, and running averages by their batch means."""
        optimizer = self.optimizers[phase[0]]
        values, means = [], []
        for i, (img, c) in enumerate(zip(*(x.split(MICRO) for x in batch), strict=True)):
            seed_step(SEED, phase, step * BATCH + i * MICRO)
            with execution.using(twice_differentiable=phase.endswith("reg")):
                value, found = loss(img, c)
            values.append(value)
            means.append(found)
        total = weight * torch.stack(values).mean()
        optimizer.step(list(torch.autograd.grad(total, optimizer.parameters, materialize_grads=True)))
        for name in means[0]:
            mean = torch.stack([found[name] for found in means]).mean(dim=0).detach()
            if name == "sign":
                self.signs.append(mean)
            else:
                self.running[name] += {"w": W_AVG_RATE, "length": PL_DECAY}[name] * (mean - self.running[name])

    def styles(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ws, labels, and the mean of the first w."""
        z = torch.randn(count, self.G.z_dim)
        c = F.one_hot(self.data.labels[torch.randint(len(self.data), [count])], self.data.c_dim).float()
        ws = self.G.mapping(z, c)
        num_ws = ws.shape[1]
        cut = int(torch.randint(1, num_ws, []))
        if torch.rand([]) >= MIXING:
            cut = num_ws
        others = self.G.mapping(torch.randn_like(z), c)
        return torch.cat([ws[:, :cut], others[:, cut:]], dim=1), c, ws[:, 0].mean(dim=0)

    def g_main(self, img: Tensor, c: Tensor) -> Terms:
        ws, c, mean_w = self.styles(len(img))
        logits = self.D(self.augment(self.G.synthesis(ws, "random")), c)
        return (1 + (-logits).exp()).log().mean(), {"w": mean_w}

    def g_reg(self, img: Tensor, c: Tensor) -> Terms:
        ws, _, mean_w = self.styles(MICRO // 2)
        fake = self.G.synthesis(ws, "random")
        y = torch.randn_like(fake) / fake[0, 0].numel() ** 0.5  # sqrt(H W)
        (gradient,) = torch.autograd.grad((fake * y).sum(), ws, create_graph=True)
        lengths = torch.stack([sum((w @ w for w in image), torch.zeros([])) / len(image) for image in gradient]).sqrt()
        mean = (1 - PL_DECAY) * self.running["length"] + PL_DECAY * lengths.mean()
        return PL_WEIGHT * ((lengths - mean) ** 2).mean(), {"w": mean_w, "length": lengths.mean()}

    def d_main(self, img: Tensor, c: Tensor) -> Terms:
        ws, fake_c, mean_w = self.styles(len(img))
        images = self.augment(torch.cat([self.G.synthesis(ws, "random").detach(), img]))
        fake, real = (self.D(x, y) for x, y in zip(images.chunk(2), (fake_c, c), strict=True))
        loss = (1 + fake.exp()).log().mean() + (1 + (-real).exp()).log().mean()
        return loss, {"w": mean_w, "sign": real.sign().mean()}

    def d_reg(self, img: Tensor, c: Tensor) -> Terms:
        img = img.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.D(self.augment(img), c).sum(), img, create_graph=True)
        return GAMMA / 2 * (gradient**2).sum() / len(img), {}

    @torch.no_grad()
    def follow(self) -> None:
        beta = 0.5 ** (BATCH / (1000 * EMA_KIMG))
        for average, weight in zip(self.G_ema.parameters(), self.G.parameters(), strict=True):
            average += (1 - beta) * (weight - average)

    def adjust(self) -> None:
        direction = (torch.stack(self.signs).mean() - ADA_TARGET).sign()
        self.augment.p += direction * BATCH * ADA_INTERVAL / (1000 * ADA_KIMG)
        self.augment.p.clamp_(0, 1)
        self.signs.clear()


def test_three_training_steps_equal_the_reference(shapes_zip: Path) -> None:
    config = small_config(shapes_zip, **CONFIG)
    trainer = Trainer(config, ImageDataset(config.data), torch.device("cpu"))
    trainer.augment.p.fill_(0.5)
    trainer.pl_mean.value.fill_(0.2)
    reference = Reference(trainer, p=0.5)
    before = {name: copy.deepcopy(network.state_dict()) for name, network in networks(trainer).items()}
    trainer.total_nimg = STEPS * BATCH
    trainer.train()
    reference.train()

    for name, network in networks(trainer).items():
        expected = getattr(reference, name)
        for key, p in network.named_parameters():
            moved, error = (p - before[name][key]).norm(), (p - expected.get_parameter(key)).norm()
            assert error <= 2e-4 * moved, f"{name} {key}"
    torch.testing.assert_close(trainer.G.mapping.w_avg, reference.running["w"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trainer.pl_mean.value, reference.running["length"], rtol=1e-4, atol=0)
    assert float(trainer.augment.p) == pytest.approx(float(reference.augment.p), abs=1e-6)
    assert float(trainer.augment.p) != 0.5


def networks(trainer: Trainer) -> dict[str, Any]:
    return {"G": trainer.G, "D": trainer.D, "G_ema": trainer.ema.module}
