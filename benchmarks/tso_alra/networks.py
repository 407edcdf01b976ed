"""The networks of the two-stage experiments."""

import jax
from flax import linen as nn

from benchmarks.core.models import NUM_CLASSES, Vgg, dense


class AlexNet(nn.Module):
    """Five convolutions and three dense layers, after Krizhevsky et al. (2012), for small images; returns logits."""

    channels: tuple[int, int, int, int, int] = (8, 16, 16, 16, 16)
    hidden: int = 64

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits."""
        first, second, *rest = self.channels
        x = nn.relu(nn.Conv(first, (5, 5), strides=2)(images))
        x = nn.max_pool(nn.relu(nn.Conv(second, (5, 5))(x)), (2, 2), strides=(2, 2))
        for width in rest:
            x = nn.relu(nn.Conv(width, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(NUM_CLASSES)(dense(x, (self.hidden, self.hidden), nn.relu))


NETWORKS: dict[str, dict[str, nn.Module]] = {
    "small": {"alexnet": AlexNet(), "vgg": Vgg(hidden=(64, 64))},
    "full": {
        "alexnet": AlexNet(channels=(64, 192, 384, 256, 256), hidden=4096),
        "vgg": Vgg(blocks=((64, 64), (128, 128), (256, 256, 256), (512, 512, 512)), hidden=(4096, 4096)),
    },
}
"""By size: some minutes on two cores, and the paper's, for a GPU."""
