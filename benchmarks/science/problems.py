"""The problems: residuals of differential equations and two fits, on small tanh networks, each with an error.

An equation is a function of a solution u and a point, so that the same code is asked about a network and, by the tests,
about the exact solution. Points of problems that depend on time are (x, t).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optcurv
from benchmarks.core import data

Params = Any
Field = Callable[[jax.Array], Any]
"""Maps one point to a number; that of the inverse problem to two."""


class Problem(NamedTuple):
    """A problem to solve in float64.

    Attributes:
      title: for tables and pictures.
      init: maps a random key to the network's parameters.
      loss: the mean square of each residual, halved and summed; for classification the mean cross-entropy.
      error: of the parameters: relative L2 error at points that were not trained on; for classification the loss.
      solution: the exact or reference solution; None for classification.
      equation: maps a solution and a point to the residual there; None where there is no equation.
    """

    title: str
    init: Callable[[jax.Array], Params]
    loss: optcurv.Composite
    error: Callable[[Params], jax.Array]
    solution: Field | None = None
    equation: Callable[[Field, jax.Array], jax.Array] | None = None


def network(params: Params, x: jax.Array) -> jax.Array:
    """A plain tanh network, whose outputs are numbers where it has one unit in the last layer."""
    for kernel, bias in params[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    kernel, bias = params[-1]
    outputs = x @ kernel + bias
    return outputs[..., 0] if outputs.shape[-1] == 1 else outputs


def init_network(sizes: Sequence[int], key: jax.Array) -> Params:
    """Kernels with entries of variance 1 / inputs, and no biases."""
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [(jax.random.normal(k, (n, m)) / np.sqrt(n), jnp.zeros(m)) for k, n, m in shapes]


def derivative(u: Field, x: jax.Array, axis: int, order: int = 1) -> jax.Array:
    """The derivative of u along an axis at a point, by `jax.jvp`."""
    along = jnp.zeros_like(x).at[axis].set(1.0)
    for _ in range(order):
        u = functools.partial(_slope, u, along)
    return u(x)


def _slope(u: Field, along: jax.Array, x: jax.Array) -> jax.Array:
    return jax.jvp(u, (x,), (along,))[1]


def laplacian(u: Field, x: jax.Array) -> jax.Array:
    """The sum of the second derivatives along all axes."""
    return sum((derivative(u, x, axis, 2) for axis in range(len(x))), start=jnp.zeros_like(x[0]))


def sum_of_squares(residuals: Sequence[jax.Array]) -> jax.Array:
    """Half the mean square of each residual, summed."""
    return sum((0.5 * jnp.mean(r**2) for r in residuals), start=jnp.zeros(()))


def relative_error(
    u: Callable[[Params, jax.Array], jax.Array], exact: jax.Array, points: jax.Array
) -> Callable[[Params], jax.Array]:
    """Returns a function of the parameters: the relative L2 error over some points."""
    return lambda params: jnp.linalg.norm(u(params, points) - exact) / jnp.linalg.norm(exact)


def solved_by_network(
    title: str,
    sizes: Sequence[int],
    equation: Callable[[Field, jax.Array], jax.Array],
    solution: Field,
    interior: jax.Array,
    known: jax.Array,
    test: jax.Array,
) -> Problem:
    """A problem whose residuals are the equation in the interior, and the difference where the solution is known."""
    return Problem(
        title,
        functools.partial(init_network, sizes),
        optcurv.Composite(
            optcurv.per_example(
                (lambda params, x: equation(functools.partial(network, params), x), interior),
                (lambda params, x: network(params, x) - solution(x), known),
            ),
            sum_of_squares,
        ),
        relative_error(network, jax.vmap(solution)(test), test),
        solution,
        equation,
    )


def uniform(seed: int, num: int, low: Sequence[float], high: Sequence[float]) -> jax.Array:
    """Points drawn from a box."""
    return jax.random.uniform(jax.random.key(seed), (num, len(low)), minval=jnp.array(low), maxval=jnp.array(high))


def on_faces(points: jax.Array) -> jax.Array:
    """Moves points of the unit cube to its faces, one face after the other."""
    index, (num, dim) = jnp.arange(len(points)), points.shape
    assert num >= 2 * dim
    return points.at[index, index % dim].set((index // dim % 2).astype(points.dtype))


def start_and_ends(seed: int, num: int) -> jax.Array:
    """Points (x, t) with t = 0, x = -1 and x = 1, equally many of each."""
    x, t = jax.random.uniform(jax.random.key(seed), (2, num))
    ends = jnp.ones(num)
    edges = ((2 * x - 1, jnp.zeros(num)), (-ends, t), (ends, t))
    return jnp.concatenate([jnp.stack(edge, 1) for edge in edges])


def poisson_2d() -> Problem:
    """Laplace u = f on the unit square, with u = sin πx sin πy; 129 parameters."""

    def solution(x: jax.Array) -> jax.Array:
        return jnp.prod(jnp.sin(jnp.pi * x))

    def equation(u: Field, x: jax.Array) -> jax.Array:
        return laplacian(u, x) + 2 * jnp.pi**2 * solution(x)

    box = (0.0, 0.0), (1.0, 1.0)
    interior, boundary, test = uniform(1, 900, *box), on_faces(uniform(2, 120, *box)), uniform(3, 4000, *box)
    return solved_by_network("Poisson 2-D", (2, 32, 1), equation, solution, interior, boundary, test)


def poisson_5d() -> Problem:
    """Laplace u = f on the unit cube of five dimensions, with u = Σ cos πxᵢ; 449 parameters."""

    def solution(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.cos(jnp.pi * x))

    def equation(u: Field, x: jax.Array) -> jax.Array:
        return laplacian(u, x) + jnp.pi**2 * solution(x)

    box = (0.0,) * 5, (1.0,) * 5
    interior, boundary, test = uniform(1, 1500, *box), on_faces(uniform(2, 250, *box)), uniform(3, 4000, *box)
    return solved_by_network("Poisson 5-D", (5, 64, 1), equation, solution, interior, boundary, test)


def heat() -> Problem:
    """u_t = 0.1 u_xx on [-1, 1], with u = e^(-0.1π²t) sin πx + ½ e^(-0.9π²t) sin 3πx; 129 parameters."""

    def solution(point: jax.Array) -> jax.Array:
        x, t = point
        slow, fast = jnp.exp(-0.1 * jnp.pi**2 * t), jnp.exp(-0.9 * jnp.pi**2 * t)
        return slow * jnp.sin(jnp.pi * x) + 0.5 * fast * jnp.sin(3 * jnp.pi * x)

    def equation(u: Field, point: jax.Array) -> jax.Array:
        return derivative(u, point, 1) - 0.1 * derivative(u, point, 0, 2)

    box = (-1.0, 0.0), (1.0, 1.0)
    interior, known, test = uniform(1, 900, *box), start_and_ends(2, 50), uniform(3, 4000, *box)
    return solved_by_network("heat equation", (2, 32, 1), equation, solution, interior, known, test)


BURGERS_VISCOSITY = 0.02
"""It steepens to a front of width 0.1 or so."""


def cole_hopf(point: jax.Array, viscosity: float = BURGERS_VISCOSITY) -> jax.Array:
    """Burgers' solution from -sin πx, by Cole and Hopf's transform and Gauss-Hermite quadrature."""
    x, t = point
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    y = x - 2 * jnp.sqrt(viscosity * t) * nodes
    log_potential = -jnp.cos(jnp.pi * y) / (2 * jnp.pi * viscosity)
    terms = weights * jnp.exp(log_potential - jax.lax.stop_gradient(jnp.max(log_potential)))
    return -jnp.sum(terms * jnp.sin(jnp.pi * y)) / jnp.sum(terms)


def burgers() -> Problem:
    """u_t + u u_x = 0.02 u_xx on [-1, 1] from -sin πx; 337 parameters."""

    def equation(u: Field, point: jax.Array) -> jax.Array:
        flow = u(point) * derivative(u, point, 0)
        return derivative(u, point, 1) + flow - BURGERS_VISCOSITY * derivative(u, point, 0, 2)

    box = (-1.0, 0.0), (1.0, 1.0)
    interior, known, test = uniform(1, 1000, *box), start_and_ends(2, 50), uniform(3, 4000, *box)
    return solved_by_network("Burgers", (2, 16, 16, 1), equation, cole_hopf, interior, known, test)


DIFFUSION, REACTION = 0.01, 1.0
"""Of Allen and Cahn's equation."""


def allen_cahn_start(x: Any) -> Any:
    """Its initial values, periodic on [-1, 1]."""
    return 0.5 * jnp.sin(jnp.pi * x) + 0.5 * jnp.cos(2 * jnp.pi * x)


def allen_cahn_reference(
    num_modes: int = 128, num_steps: int = 4000, num_times: int = 20
) -> tuple[np.ndarray, np.ndarray]:
    """Solves Allen and Cahn's equation by Fourier modes in x and Runge and Kutta's method of order 4 in t, in numpy.

    Returns:
      times up to 1, and the solution at them on 2 num_modes points of [-1, 1).
    """
    x = -1 + np.arange(2 * num_modes) / num_modes
    frequency, u, step = np.pi * np.arange(num_modes + 1), np.asarray(allen_cahn_start(x)), 1 / num_steps

    def velocity(u: np.ndarray) -> np.ndarray:
        return np.fft.irfft(-DIFFUSION * frequency**2 * np.fft.rfft(u), 2 * num_modes) + REACTION * (u - u**3)

    kept = [u]
    for count in range(1, num_steps + 1):
        a = velocity(u)
        b = velocity(u + step / 2 * a)
        c = velocity(u + step / 2 * b)
        u = u + step / 6 * (a + 2 * b + 2 * c + velocity(u + step * c))
        if count % (num_steps // num_times) == 0:
            kept.append(u)
    return np.linspace(0, 1, num_times + 1), np.stack(kept)


def allen_cahn_equation(u: Field, point: jax.Array) -> jax.Array:
    """u_t - 0.01 u_xx - (u - u³)."""
    value = u(point)
    return derivative(u, point, 1) - DIFFUSION * derivative(u, point, 0, 2) - REACTION * (value - value**3)


def allen_cahn() -> Problem:
    """u_t = 0.01 u_xx + u - u³, periodic on [-1, 1]; 337 parameters. The reference is spectral."""

    def start(params: Params, x: jax.Array) -> jax.Array:
        return network(params, jnp.stack([x, jnp.zeros_like(x)])) - allen_cahn_start(x)

    def ends_differ(params: Params, t: jax.Array) -> jax.Array:
        u = functools.partial(network, params)
        left, right = jnp.stack([-jnp.ones_like(t), t]), jnp.stack([jnp.ones_like(t), t])
        return jnp.stack([u(right) - u(left), derivative(u, right, 0) - derivative(u, left, 0)])

    interior = uniform(1, 1000, (-1.0, 0.0), (1.0, 1.0))
    x, t = uniform(2, 60, (-1.0,), (1.0,))[:, 0], uniform(4, 40, (0.0,), (1.0,))[:, 0]
    times, exact = allen_cahn_reference()
    places = -1 + np.arange(exact.shape[1]) / (exact.shape[1] // 2)
    grid = jnp.stack(jnp.meshgrid(jnp.asarray(places), jnp.asarray(times)), -1)
    model = optcurv.per_example(
        (lambda params, point: allen_cahn_equation(functools.partial(network, params), point), interior),
        (start, x),
        (ends_differ, t),
    )
    return Problem(
        "Allen-Cahn",
        functools.partial(init_network, (2, 16, 16, 1)),
        optcurv.Composite(model, sum_of_squares),
        relative_error(network, jnp.asarray(exact), grid),
        None,
        allen_cahn_equation,
    )


def inverse_solution(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The state and the coefficient of the inverse problem."""
    return jnp.sin(jnp.pi * x) + x, 1 + 0.5 * jnp.sin(2 * jnp.pi * x)


def diffusion(state: Callable, coefficient: Callable, x: jax.Array) -> jax.Array:
    """-(a u')' at a number x."""
    return -jax.grad(lambda x: coefficient(x) * jax.grad(state)(x))(x)


def inverse() -> Problem:
    """Finds a(x) in -(a u')' = f from 64 values of u = x + sin πx and f; a = 1 + ½ sin 2πx; 194 parameters."""

    def equation(u: Field, x: jax.Array) -> jax.Array:
        """The residual for a function whose value is the state and the coefficient."""
        exact = diffusion(lambda x: inverse_solution(x)[0], lambda x: inverse_solution(x)[1], x)
        return diffusion(lambda x: u(x)[0], lambda x: u(x)[1], x) - exact

    def both(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return network(params["state"], x[None]), network(params["coefficient"], x[None])

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key)
        return {name: init_network((1, 32, 1), k) for name, k in zip(("state", "coefficient"), keys, strict=True)}

    interior, measured, test = (jnp.linspace(0, 1, num) for num in (200, 64, 1001))
    model = optcurv.per_example(
        (lambda params, x: equation(functools.partial(both, params), x), interior),
        (lambda params, x: both(params, x)[0] - inverse_solution(x)[0], measured),
    )
    error = relative_error(
        lambda params, x: network(params["coefficient"], x[:, None]), jax.vmap(inverse_solution)(test)[1], test
    )
    return Problem("inverse problem", init, optcurv.Composite(model, sum_of_squares), error, inverse_solution, equation)


def regression() -> Problem:
    """Fits sin 10x + ½ cos 23x at 512 points of [-1, 1]; 1 153 parameters."""

    def solution(x: jax.Array) -> jax.Array:
        return jnp.sin(10 * x[0]) + 0.5 * jnp.cos(23 * x[0])

    points, test = jnp.linspace(-1, 1, 512)[:, None], uniform(3, 2000, (-1.0,), (1.0,))
    model = optcurv.per_example((lambda params, x: network(params, x) - solution(x), points))
    return Problem(
        "1-D regression",
        functools.partial(init_network, (1, 32, 32, 1)),
        optcurv.Composite(model, lambda residuals: 0.5 * jnp.mean(residuals**2)),
        relative_error(network, jax.vmap(solution)(test), test),
        solution,
    )


def digits() -> Problem:
    """Classifies scikit-learn's 1 437 digits for training, on full batches; 1 210 parameters; the error is the loss."""
    train = data.digits().train
    images, labels = jnp.asarray(train.images, jnp.float64).reshape(-1, 64), train.labels
    loss = optcurv.Composite(
        optcurv.per_example((network, images)),
        lambda logits: optcurv.softmax_cross_entropy_with_integer_labels(logits, labels).mean(),
    )
    return Problem("digits (error: loss)", functools.partial(init_network, (64, 16, 10)), loss, loss)


PROBLEMS: Mapping[str, Callable[[], Problem]] = {
    "poisson-2d": poisson_2d,
    "poisson-5d": poisson_5d,
    "heat": heat,
    "burgers": burgers,
    "allen-cahn": allen_cahn,
    "inverse": inverse,
    "regression": regression,
    "digits": digits,
}
"""To be made, and everything done with them, in float64."""
