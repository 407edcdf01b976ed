"""kfac-jax's side of the comparison, run by the Python of its own environment.

Reads from standard input a JSON object, the arguments of `KfacSide`, then lines `[method, arguments]`, and answers each
on standard output by a line of JSON.
"""

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax  # pyright: ignore[reportMissingImports]  it is in that environment alone
import optax

from benchmarks.tso_alra.sides import Side, State

Params = list[dict[str, jax.Array]]

_SHAPES = {
    "autoencoder": [(784, 256), (256, 64), (64, 16), (16, 64), (64, 256), (256, 784)],
    "cnn": [(3, 3, 1, 8), (3, 3, 8, 16), (144, 64), (64, 10)],
}
_CONVOLVE = functools.partial(jax.lax.conv_general_dilated, padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
_POOL = {"window_dimensions": (1, 2, 2, 1), "window_strides": (1, 2, 2, 1), "padding": "VALID"}


def init_params(network: str, key: jax.Array) -> Params:
    """Returns kernels as Flax draws them, and biases of zero."""
    draw, shapes = jax.nn.initializers.lecun_normal(), _SHAPES[network]
    keys = jax.random.split(key, len(shapes))
    return [{"w": draw(key, shape), "b": jnp.zeros(shape[-1])} for key, shape in zip(keys, shapes, strict=True)]


def autoencoder_loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Sigmoid cross-entropy, summed over pixels, of `benchmarks.models.Autoencoder`."""
    del labels
    pixels = images.reshape(images.shape[0], -1)
    x = pixels
    for i, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"]
        if i not in (2, 5):  # the code and the logits
            x = jnp.tanh(x)
    kfac_jax.register_sigmoid_cross_entropy_loss(x, pixels)
    return optax.sigmoid_binary_cross_entropy(x, pixels).sum(axis=1).mean()


def cnn_loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy of `benchmarks.models.Cnn` with stride 2."""
    x = jax.nn.relu(_CONVOLVE(images, params[0]["w"], window_strides=(2, 2)) + params[0]["b"])
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, **_POOL)
    x = jax.nn.relu(_CONVOLVE(x, params[1]["w"], window_strides=(1, 1)) + params[1]["b"])
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, **_POOL) / 4
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params[2]["w"] + params[2]["b"])
    x = x @ params[3]["w"] + params[3]["b"]
    kfac_jax.register_softmax_cross_entropy_loss(x, labels)
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


class KfacSide(Side):
    """K-FAC with the empirical Fisher matrix, fixed rate and damping, and momentum 0.9.

    Args:
      network: "autoencoder" or "cnn".
      power: of the curvature matrix.
      factor_every: steps from one batch averaged into the factors to the next.
      root_every: steps from one inversion to the next.
      data: as in `Side`.
    """

    def __init__(self, network: str, power: float, factor_every: int, root_every: int, data: str) -> None:
        loss = {"autoencoder": autoencoder_loss, "cnn": cnn_loss}[network]
        super().__init__(loss, init_params(network, jax.random.key(0)), data)
        self.optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(lambda params, batch: loss(params, *batch)),
            l2_reg=0.0,
            estimation_mode="fisher_empirical",
            curvature_update_period=factor_every,
            inverse_update_period=root_every,
            num_burnin_steps=0,
            precon_power=power,
            use_exact_inverses=power != -1,  # the only ones it has for other powers
        )

    def start(self) -> State:
        """See `Side`."""
        params = self.fresh_params()
        return params, self.optimizer.init(params, jax.random.PRNGKey(0), self.batch(0))

    def step(self, state: State, count: int, setting: dict[str, float]) -> State:
        """See `Side`."""
        params, opt_state, *_ = self.optimizer.step(
            *state,
            jax.random.PRNGKey(count),
            batch=self.batch(count),
            learning_rate=jnp.asarray(setting["learning rate"]),
            momentum=jnp.asarray(0.9),
            damping=jnp.asarray(setting["damping"]),
            global_step_int=count,
        )
        return params, opt_state


def serve() -> None:
    """Answers calls until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed must not mix with the answers

    def answer(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    side = KfacSide(**json.loads(sys.stdin.readline()))
    answer("ready")
    for line in sys.stdin:
        method, arguments = json.loads(line)
        answer(getattr(side, method)(*arguments))


if __name__ == "__main__":
    serve()
