"""A power of the Kronecker-factored Fisher matrix, as a link in a chain."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, ValueFn, at_least_float32, by_path, checked, scalar_fn, scheduled, wide_dtype
from optcurv.convolutions import with_canonical_convolutions
from optcurv.curvature import Composite
from optcurv.kronecker.averages import PROBATION, Averages, Statistics, average
from optcurv.kronecker.factors import KRONECKER, Factors, Powers, Structure, damp, init_powers, is_early, refresh_powers
from optcurv.kronecker.layers import Layers
from optcurv.kronecker.options import Options
from optcurv.kronecker.recording import Recording, record
from optcurv.kronecker.samplers import OutputGradientSampler
from optcurv.sharding import mean_over_devices, own_key


class KroneckerInfo(NamedTuple):
    """What one step did; scalars for the log.

    Attributes:
      num_layers: the number of layers in the loss; parameters in none are preconditioned diagonally.
      largest_eigenvalue: of the damped Fisher matrix.
      smallest_eigenvalue: likewise.
      age: steps since the oldest powers were computed.
      norm_ratio: the norm of the outgoing updates divided by that of the incoming ones.
      finite: whether the updates were finite and there are statistics; otherwise the outgoing ones are zero.
      refused: whether the last batch measured was kept out of the averages.
    """

    num_layers: jax.Array
    largest_eigenvalue: jax.Array
    smallest_eigenvalue: jax.Array
    age: jax.Array
    norm_ratio: jax.Array
    finite: jax.Array
    refused: jax.Array


class ScaleByKroneckerState(NamedTuple):
    """State of `scale_by_kronecker`.

    A layer's statistics belong to its kernel and bias together and have the shape of neither. So the state holds
    dictionaries by path and no trees like the parameters, and `optax.tree.map_params` cannot map it;
    `optcurv.state_shardings` says where its arrays belong.

    Attributes:
      count: steps taken.
      key: for the sampled labels, as key data.
      weight: the sum of the weights in the averages; less than one at first.
      num_averaged: batches averaged in since the averages last started afresh, counted up to ten; at first it is ten.
      factors: averages of each layer's factors, by the path of its kernel.
      squares: averages of the squared gradients of the other parameters, by path.
      powers: of the factors.
      info: of the last step.
    """

    count: jax.typing.ArrayLike
    key: jax.Array
    weight: jax.Array
    num_averaged: jax.Array
    factors: dict[str, Factors]
    squares: dict[str, jax.Array]
    powers: Powers
    info: KroneckerInfo


def scale_by_kronecker(
    power: chex.Numeric = -0.5,
    *,
    factor_decay: optax.ScalarOrSchedule = 0.95,
    factor_every: int = 10,
    root_every: int = 100,
    damping: optax.ScalarOrSchedule = 1e-3,
    absolute_damping: optax.ScalarOrSchedule = 0.0,
    structure: Structure = KRONECKER,
    sampler: OutputGradientSampler | None = None,
    layers: Layers | None = None,
    batch_size: int | None = None,
    rank: int | None = 16,
    max_factor_size: int = 8192,
    max_positions: int | None = None,
    root_sharding: jax.NamedSharding | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by a power of the Fisher matrix, layer by layer; keeps their sign.

    .. math:: u = (A + \lambda_A I)^p \; g \; (B + \lambda_B I)^p

    for the gradient g of a kernel of `(in, out)`; p = -1/2 is the adaptive stage of TSO-ALRA (Eq. 16, where the factors
    stand the other way round, for the transposed kernel) and p = -1 the natural gradient, as in K-FAC. A and B are
    running averages (Eqs. 17 and 18, debiased) of :math:`a a^\top` over a layer's inputs and of :math:`\beta
    \beta^\top` over the gradients of each example's own loss at the layer's outputs; a bias is one more row of the
    kernel. In convolutions and sequences A sums and B averages over positions (Grosse and Martens 2016). A factor's
    damping is relative to its mean eigenvalue, :math:`\lambda_A = \sqrt{\lambda}\, \mathrm{tr}(A) / n`, plus
    `absolute_damping`, the published :math:`\epsilon`.

    The layers are found in the loss closure (see `optcurv.layers`, also for how to leave one out) and must be the same
    at every step. Parameters in no layer are scaled by the same power of their average squared gradient, each example's
    own as for the factors, or an estimate from the batch's: RMSProp without momentum. If a loss has no layers, this
    goes for all parameters, and it counts as the loss of one example unless `batch_size` is given. `info.num_layers`
    says how many layers were found.

    **The loss must be a mean over examples.** A sum cannot be told from a mean: it is also the mean of losses N times
    as large. Multiplying the loss by c multiplies the updates by :math:`c^{1 + 2p}`. At p = -1/2 nothing changes; at
    p = -1 a sum over N examples makes the updates N times too short. With a `sampler`, the factors do not depend on
    the loss, and the updates of layers become c times as long at any power. (`absolute_damping` breaks these rules.)

    The update takes the extra arguments `value_fn` (required) and `curvature_value_fn` (the loss on a smaller batch,
    for the factors only). Updates that are not finite become zero. Statistics that are not finite are not averaged in,
    nor are those 10⁴ times the averages (gradients a hundred times as long): a single spike of the loss would fade only
    slowly. If two such batches come in a row, the averages start afresh. In the ten batches after that, the same holds
    for statistics as far below the averages, as these may be those of a spike. The averages of the very first batch are
    never given up in this way: if parameters converge early, it looks just as if that batch had been a spike.

    Args:
      power: p < 0.
      factor_decay: how much of the averages remains, in [0, 1], a number or a schedule.
      factor_every: steps from one batch averaged in to the next; early on there are more.
      root_every: :math:`T_{int}`, steps from one decomposition of a factor to the next; likewise.
      damping: λ ≥ 0, relative, a number or a schedule.
      absolute_damping: likewise; published 1e-6, with no relative damping.
      structure: `optcurv.KRONECKER` (default), `optcurv.BLOCK` (all correlations within a layer, for small ones), or
        `optcurv.DIAGONAL`.
      sampler: of gradients at the outputs. None (default) takes the labels of the loss, for the empirical Fisher
        matrix. `optcurv.sample_categorical_gradients` and `optcurv.sample_gaussian_gradients` draw labels from the
        model's predictions, for the true one; the loss must then be a `Composite`.
      layers: of the closure, as `optcurv.layers` returns them; the loss must then have these very layers. By default
        every array of more than one axis may be a kernel, whose last axis alone is the output's, as those of dense
        layers and of ungrouped convolutions. The state then holds room for squared gradients of all parameters beside
        the factors of all such arrays; with `layers`, only what is used.
      batch_size: the number of examples whose mean the loss is, of those on one device within `jax.shard_map`; default:
        the leading axis of the layers' inputs.
      rank: how many leading eigenpairs are computed of factors larger than twice this, by subspace iteration from the
        previous ones; all other eigenvalues count as equal to their mean. None computes all, exactly, at a cost
        proportional to the cube of a layer's width.
      max_factor_size: of larger factors only the diagonal is kept.
      max_positions: how many positions of a convolution's inputs to use, about, on a grid; default: all.
      root_sharding: splits the decompositions, the factors of one size among the devices along the mesh axes of its
        first dimension, as in `jax.NamedSharding(mesh, jax.P("data"))`, and exchanges the results; default: every
        device decomposes all.
      seed: for the sampled labels.

    Returns:
      The transformation.

    Raises:
      ValueError: if a number is out of range, or `update` is called without params or with a gradient or a state that
        does not fit them; if layers are not of the shapes that the state was made for, if the loss lacks one of the
        given `layers`, or if the number of examples cannot be told.
      TypeError: if an argument has the wrong type, `update` is called without `value_fn`, the loss is no scalar, or it
        is no `Composite` where labels are drawn.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optcurv
      >>> x = jax.random.normal(jax.random.key(0), (64, 3)) * jnp.array([1.0, 10.0, 100.0])
      >>> loss = lambda p: jnp.mean((x @ p["w"] - x @ jnp.ones((3, 1))) ** 2)
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> optimizer = optax.chain(optcurv.scale_by_kronecker(), optax.scale_by_learning_rate(0.5))
      >>> state = optimizer.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params, value_fn=loss)
      ...     return optax.apply_updates(params, updates), state
      >>> start = loss(params)
      >>> for _ in range(50):
      ...     params, state = step(params, state)
      >>> print(loss(params) < 1e-3 * start)
      True
    """
    options = Options(
        power=power,
        factor_decay=factor_decay,
        factor_every=factor_every,
        root_every=root_every,
        damping=damping,
        absolute_damping=absolute_damping,
        structure=structure,
        sampler=sampler,
        layers=layers,
        batch_size=batch_size,
        rank=rank,
        max_factor_size=max_factor_size,
        max_positions=max_positions,
        root_sharding=root_sharding,
        seed=seed,
    )
    return checked("scale_by_kronecker", functools.partial(_init, options), functools.partial(_update, options))


def _init(options: Options, params: PyTree) -> ScaleByKroneckerState:
    dtype = wide_dtype(params)
    # Without `layers` only the loss will tell which parameters are in none, so there is room for the squares of all.
    factor_shapes, square_shapes = options.shapes(options.layers, by_path(params))
    factors = {path: tuple(jnp.zeros(shape, dtype) for shape in shapes) for path, shapes in factor_shapes.items()}
    # Arrays of their own, so that all can be donated.
    zero, count, false = (functools.partial(jnp.zeros, (), dtype) for dtype in (jnp.float32, jnp.int32, bool))
    return ScaleByKroneckerState(
        count=count(),
        key=jax.random.key_data(jax.random.key(options.seed)),
        weight=jnp.zeros((), dtype),
        num_averaged=jnp.full((), PROBATION, jnp.int32),
        factors=factors,
        squares={path: jnp.zeros(shape, dtype) for path, shape in square_shapes.items()},
        powers=init_powers(factors, options.rank if options.structure is KRONECKER else None),
        info=KroneckerInfo(count(), zero(), zero(), count(), zero(), ~false(), false()),
    )


def _update(
    options: Options,
    updates: PyTree,
    state: Any,
    params: PyTree = None,
    *,
    value_fn: ValueFn,
    curvature_value_fn: ValueFn | None = None,
    **extra_args: Any,
) -> tuple[PyTree, ScaleByKroneckerState]:
    del extra_args  # those of the other links in a chain
    gradient = at_least_float32(updates)
    gradients = by_path(gradient)
    recording = record_loss(options, curvature_value_fn or value_fn, params)
    # The gradient is that of `value_fn`, so its examples are those of the squares that are estimated from it.
    whole = recording if curvature_value_fn is None else record(scalar_fn(value_fn), params, options.left_out)
    num_examples = whole.num_examples(options.batch_size)
    before = _averages_before(options, recording.layers, state, gradients)

    def average_in(operands: tuple[PyTree, Mapping[str, jax.Array]]) -> Averages:
        params, gradients = operands
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
        alone = {path: gradients[path] for path in before.statistics.squares}
        now = measure(options, recording, key, params, alone, num_examples)
        return average(before, now, scheduled(options.factor_decay, state.count, state.weight.dtype))

    averages = jax.lax.cond(
        is_early(state.count, options.root_every) | (state.count % options.factor_every == 0) | (state.weight == 0),
        with_canonical_convolutions(average_in, (params, gradients)),
        lambda _: before,
        (params, gradients),
    )
    powers, damped_squares = refresh(options, averages, state)
    results = precondition(options, recording.layers, powers, damped_squares, gradients)
    result = jax.tree.unflatten(jax.tree.structure(updates), [results[path] for path in gradients])
    result = optax.tree.cast_like(result, updates)
    norm, result_norm = optax.tree.norm(gradient), optax.tree.norm(at_least_float32(result))
    finite = (averages.weight > 0) & jnp.isfinite(norm) & jnp.isfinite(result_norm)
    norm_ratio = jnp.where(finite, result_norm, 0.0) / jnp.where(norm > 0, norm, 1.0)
    new_state = ScaleByKroneckerState(
        count=optax.safe_increment(state.count),
        key=state.key,
        weight=averages.weight,
        num_averaged=averages.num_averaged,
        factors=state.factors | averages.statistics.factors,
        squares=state.squares | averages.statistics.squares,
        powers=powers,
        info=_info(averages, powers, damped_squares, norm_ratio, finite),
    )
    return optax.tree.where(finite, result, optax.tree.zeros_like(result)), new_state


def record_loss(options: Options, value_fn: ValueFn, params: PyTree) -> Recording:
    """Traces the function that the factors are measured in: the loss, or the model where labels are drawn."""
    if options.sampler is None:
        return record(scalar_fn(value_fn), params, options.left_out)
    if not isinstance(value_fn, Composite):
        raise TypeError("To draw labels, scale_by_kronecker needs the loss as an optcurv.Composite.")

    def outputs_fn(params: PyTree) -> PyTree:
        outputs, _ = value_fn.outputs_and_aux(params)
        jax.eval_shape(scalar_fn(value_fn.loss_of_outputs), outputs)  # raises unless it is a loss
        return outputs

    return record(outputs_fn, params, options.left_out)


def _averages_before(
    options: Options, layers: Layers, state: ScaleByKroneckerState, leaves: Mapping[str, jax.Array]
) -> Averages:
    """Returns the averages for the layers of the loss and for the other parameters; raises if the state lacks some."""
    factor_shapes, square_shapes = options.shapes(layers, leaves)
    made = {path: tuple(factor.shape for factor in several) for path, several in state.factors.items()}
    fits = all(made.get(path) == shapes for path, shapes in factor_shapes.items())
    if not (fits and state.squares.keys() >= square_shapes.keys()):
        if not layers.found:
            raise ValueError(f"No layer was found in the loss: no parameter multiplies activations as it is.\n{layers}")
        raise ValueError(
            "The layers of the loss are not those the state was made for. Without layers= these are guessed from the "
            "shapes of the parameters: make the optimiser with layers=optcurv.layers(value_fn, params), which finds\n"
            f"{layers}"
        )
    factors = {path: state.factors[path] for path in factor_shapes}
    statistics = Statistics(factors, {path: state.squares[path] for path in square_shapes})
    return Averages(statistics, state.weight, state.num_averaged, state.info.refused)


def measure(
    options: Options,
    recording: Recording,
    key: jax.Array,
    params: PyTree,
    alone: Mapping[str, jax.Array],
    num_examples: int,
) -> Statistics:
    """Returns the statistics of one batch.

    Args:
      options: of the optimiser.
      recording: of the loss, or of the model where labels are drawn.
      key: for the labels.
      params: the parameters.
      alone: gradients of the parameters in no layer, by path. Where the squares of each example's own cannot be
        computed, they are estimated as `num_examples` times the square of this one.
      num_examples: whose mean gradient that is.
    """
    sampler, structure = options.sampler, options.structure
    sample = None if sampler is None else lambda outputs: sampler(own_key(key, outputs), outputs)
    factor_shapes, _ = options.shapes(recording.layers, by_path(params))
    factors, own = {}, {}
    if factor_shapes:
        uses, own = recording.taps(params, sample, batch_size=options.batch_size, max_positions=options.max_positions)
        for path, shapes in factor_shapes.items():
            factors[path] = structure.measure(uses[path], [len(shape) == 2 for shape in shapes])
        factors, own = mean_over_devices((factors, own))
    squares = {path: own.get(path, num_examples * gradient**2) for path, gradient in alone.items()}
    return Statistics(factors, squares)


def refresh(options: Options, averages: Averages, state: ScaleByKroneckerState) -> tuple[Powers, dict[str, jax.Array]]:
    """Computes the powers of the debiased factors that are due; returns them with the debiased, damped squares."""
    weight = jnp.where(averages.weight > 0, averages.weight, 1.0)
    dampings = {
        "relative": scheduled(options.damping, state.count),
        "absolute_damping": scheduled(options.absolute_damping, state.count),
    }
    powers = refresh_powers(
        state.powers,
        averages.statistics.factors,
        weight,
        exponent=options.power,
        every=options.root_every,
        count=jnp.asarray(state.count),
        usable=averages.weight > 0,
        sharding=options.root_sharding,
        **dampings,
    )
    unbiased = {path: square / weight for path, square in averages.statistics.squares.items()}
    return powers, {path: damp(square, jnp.mean(square), **dampings) for path, square in unbiased.items()}


def precondition(
    options: Options,
    layers: Layers,
    powers: Powers,
    damped_squares: Mapping[str, jax.Array],
    gradients: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """Multiplies each layer's gradient by the powers of its factors, and every other one by that of its squares."""
    results = {path: gradients[path] * square**options.power for path, square in damped_squares.items()}
    for layer in layers.found if powers.powers else ():
        products = options.structure.apply(powers.powers[layer.path], layer.parts(gradients))
        results |= layer.leaves(products, gradients)
    return dict(gradients) | results


def _info(
    averages: Averages,
    powers: Powers,
    damped_squares: Mapping[str, jax.Array],
    norm_ratio: jax.Array,
    finite: jax.Array,
) -> KroneckerInfo:
    factors = averages.statistics.factors
    spectra = [functools.reduce(jnp.multiply, powers.extremes[path]) for path in factors] + [*damped_squares.values()]
    return KroneckerInfo(
        num_layers=jnp.int32(len(factors)),
        largest_eigenvalue=jnp.float32(functools.reduce(jnp.maximum, map(jnp.max, spectra), 0.0)),
        smallest_eigenvalue=jnp.float32(functools.reduce(jnp.minimum, map(jnp.min, spectra), jnp.inf)),
        age=jnp.max(powers.ages),
        norm_ratio=jnp.float32(norm_ratio),
        finite=finite,
        refused=averages.refused,
    )
