"""Network families by the name that a configuration file uses.

To add a family, write one file with a frozen, keyword-only config dataclass whose `build()` returns the network, and
add a line here. A generator config has c_dim, img_channels, `img_size` and `check_img_size(height, width)`; the
network has z_dim, w_dim, c_dim, num_ws, img_shape, `mapping`, `synthesis` and their composition as its call. A
discriminator config has c_dim, img_channels and img_size; the network maps (img, c) to logits (B, 1) and lists its
layers in `layers_from_image()`.
"""

from training.networks.discriminator import StyleGAN2DiscriminatorConfig
from training.networks.styleformer import StyleformerConfig

GENERATORS = {"styleformer": StyleformerConfig}
DISCRIMINATORS = {"stylegan2": StyleGAN2DiscriminatorConfig}
