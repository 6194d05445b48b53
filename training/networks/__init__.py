"""Registry of network families, keyed by the name used in configuration files.

To add a family, write one file and add one line here; docs/adding_a_model.md shows an example. The config of a
generator is a `GeneratorConfig` (generator.py) whose `build()` returns the network. A generator has the attributes
z_dim, w_dim, c_dim, num_ws and img_shape and the submodules `mapping` and `synthesis`; `forward` composes the two. The
config of a discriminator is a `DiscriminatorConfig` (discriminator.py). A discriminator maps (img, c) to logits (B, 1)
and lists its layers in `layers_from_image()`.
"""

from training.networks.discriminator import DiscriminatorConfig
from training.networks.generator import GeneratorConfig
from training.networks.r3gan import R3GANConfig
from training.networks.r3gan_discriminator import R3GANDiscriminatorConfig
from training.networks.styleformer import StyleformerConfig
from training.networks.styleformer2 import Styleformer2Config
from training.networks.styleformer_a import StyleformerAConfig
from training.networks.styleformer_c import StyleformerCConfig
from training.networks.styleformer_discriminator import StyleformerDiscriminatorConfig
from training.networks.stylegan2 import StyleGAN2Config
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig
from training.networks.stylegan3 import StyleGAN3Config
from training.networks.transgan import TransGANConfig
from training.networks.transgan_discriminator import TransGANDiscriminatorConfig

GENERATORS: dict[str, type[GeneratorConfig]] = {
    "styleformer": StyleformerConfig,
    "stylegan2": StyleGAN2Config,
    "styleformer-c": StyleformerCConfig,
    "styleformer2": Styleformer2Config,
    "transgan": TransGANConfig,
    "r3gan": R3GANConfig,
    "stylegan3": StyleGAN3Config,
    "styleformer-a": StyleformerAConfig,
}
DISCRIMINATORS: dict[str, type[DiscriminatorConfig]] = {
    "stylegan2": StyleGAN2DiscriminatorConfig,
    "styleformer": StyleformerDiscriminatorConfig,
    "transgan": TransGANDiscriminatorConfig,
    "r3gan": R3GANDiscriminatorConfig,
}
