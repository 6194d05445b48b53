"""Network families by the name that a configuration file uses.

To add a family, write one file and add a line here; docs/adding_a_model.md does it once. A generator's config is a
`GeneratorConfig` (generator.py) whose `build()` returns the network; the network has z_dim, w_dim, c_dim, num_ws,
img_shape, `mapping`, `synthesis` and their composition as its call. A discriminator's is a `DiscriminatorConfig`
(discriminator.py); the network maps (img, c) to logits (B, 1) and lists its layers in `layers_from_image()`.
"""

from training.networks.discriminator import DiscriminatorConfig
from training.networks.generator import GeneratorConfig
from training.networks.styleformer import StyleformerConfig
from training.networks.styleformer_c import StyleformerCConfig
from training.networks.stylegan2 import StyleGAN2Config
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig
from training.networks.transgan import TransGANConfig
from training.networks.transgan_discriminator import TransGANDiscriminatorConfig

GENERATORS: dict[str, type[GeneratorConfig]] = {
    "styleformer": StyleformerConfig,
    "stylegan2": StyleGAN2Config,
    "styleformer-c": StyleformerCConfig,
    "transgan": TransGANConfig,
}
DISCRIMINATORS: dict[str, type[DiscriminatorConfig]] = {
    "stylegan2": StyleGAN2DiscriminatorConfig,
    "transgan": TransGANDiscriminatorConfig,
}
