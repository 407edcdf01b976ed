"""A power of the Kronecker-factored Fisher matrix, as a link in a chain."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import (
    PyTree,
    ValueFn,
    at_least_float32,
    check_count,
    check_function,
    check_number,
    checked,
    path_name,
    scheduled,
    wide_dtype,
)
from optcurv.convolutions import with_canonical_convolutions
from optcurv.curvature import Composite
from optcurv.kronecker.factors import (
    DIAGONAL,
    KRONECKER,
    Factors,
    Powers,
    Structure,
    damp,
    init_powers,
    is_early,
    refresh_powers,
)
from optcurv.kronecker.layers import Layers
from optcurv.kronecker.layers import layers as find_layers
from optcurv.kronecker.samplers import OutputGradientSampler
from optcurv.kronecker.sizes import check_layers, factor_shapes_of, guessed_sizes, sizes_of
from optcurv.kronecker.statistics import count_examples, pull_back_taps, tap
from optcurv.sharding import check_splits_rows, mean_over_devices, own_key

_OUTLIER = 1e4  # times the average: beyond it a batch's statistics are not averaged in at once
_PROBATION = 10  # batches in which averages are given up again if they prove to be those of a spike


class KroneckerInfo(NamedTuple):
    """What one step did; scalars for the log.

    Attributes:
      num_layers: how many layers the loss has; all parameters in none are preconditioned diagonally.
      largest_eigenvalue: of the damped Fisher matrix's layers.
      smallest_eigenvalue: likewise.
      age: steps since the stalest powers were taken.
      norm_ratio: the norm of the outgoing updates over that of the incoming ones.
      finite: whether the updates were finite and there are statistics; the outgoing ones are zero otherwise.
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

    Attributes:
      count: steps taken.
      key: of the sampled labels, as key data.
      weight: what the averages' weights sum to; less than one at first.
      num_averaged: batches averaged in since the averages began anew; no more than ten are counted, and ten at first.
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
    own as for the factors, or an estimate from the batch's: RMSProp without momentum. A loss without layers is
    preconditioned so as a whole, and counts as that of one example unless `batch_size` is given. `info.num_layers` says
    how many layers were found.

    **The loss must be a mean over examples.** A sum cannot be told from a mean: it is also the mean of losses N times
    as large. Multiplying the loss by c multiplies the updates by :math:`c^{1 + 2p}`. At p = -1/2 nothing changes; at
    p = -1 a sum over N examples makes the updates N times too short. With a `sampler`, the factors do not depend on
    the loss, and the updates of layers become c times as long at any power. (`absolute_damping` breaks these rules.)

    The update takes the extra arguments `value_fn` (required) and `curvature_value_fn` (the loss on a smaller batch,
    for the factors only). Updates that are not finite become zero. Statistics that are not finite are not averaged in,
    nor are those 10⁴ times the averages (gradients a hundred times as long): a single spike of the loss would fade but
    slowly. Where they come twice in a row the averages begin anew. The same holds for statistics as far below the
    averages in the ten batches after such a beginning, which may have been a spike. The very first batch is never given
    up so: parameters that converge early look just as if it had been a spike.

    Args:
      power: p < 0.
      factor_decay: how much of the averages remains, in [0, 1], a number or a schedule.
      factor_every: steps from one batch averaged in to the next; early on there are more.
      root_every: :math:`T_{int}`, steps from one decomposition of a factor to the next; likewise.
      damping: λ ≥ 0, relative, a number or a schedule.
      absolute_damping: likewise; published 1e-6, with no relative one.
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
      rank: of factors larger than twice this only so many leading eigenpairs are found, by subspace iteration from
        the previous ones, and all other eigenvalues count as equal to their mean; None finds all, exactly, at a cost
        in proportion to the cube of a layer's width.
      max_factor_size: of larger factors only the diagonal is kept.
      max_positions: of a convolution's inputs use about so many positions, on a grid; default: all.
      root_sharding: shares the decompositions out: the factors of one size are split among the devices along the mesh
        axes of its first dimension, say `jax.NamedSharding(mesh, jax.P("data"))`, and the results exchanged; default:
        every device decomposes all.
      seed: of the sampled labels.

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
    check_number("power", power, constant=True)
    if isinstance(power, int | float) and power >= 0:
        raise ValueError(f"power must be negative, got {power:g}: -0.5 for TSO-ALRA, -1 for the natural gradient.")
    check_number("factor_decay", factor_decay, minimum=0.0, maximum=1.0)
    check_number("damping", damping, minimum=0.0)
    check_number("absolute_damping", absolute_damping, minimum=0.0)
    counts = {"factor_every": factor_every, "root_every": root_every, "max_factor_size": max_factor_size}
    optional_counts = {"batch_size": batch_size, "max_positions": max_positions, "rank": rank}
    for name, number in (counts | {name: n for name, n in optional_counts.items() if n is not None}).items():
        check_count(name, number)
    if not isinstance(structure, Structure):
        raise TypeError(f"structure must be optcurv.KRONECKER, optcurv.BLOCK or optcurv.DIAGONAL, got {structure!r}.")
    if sampler is not None:
        check_function("sampler", sampler, "key, outputs", "such as optcurv.sample_categorical_gradients")
    if layers is not None and not isinstance(layers, Layers):
        raise TypeError(f"layers must be what optcurv.layers(value_fn, params) returns, got {type(layers).__name__}.")
    if root_sharding is not None:
        check_splits_rows("root_sharding", root_sharding)

    leave_out = () if layers is None else layers.left_out

    def factor_shapes(sizes: dict[str, tuple[int, int, int]]) -> dict[str, list[tuple[int, ...]]]:
        return {path: factor_shapes_of(structure, max_factor_size, path, *size) for path, size in sizes.items()}

    def init(params: PyTree) -> ScaleByKroneckerState:
        dtype, leaves = wide_dtype(params), _by_path(params)
        sizes = {} if structure is DIAGONAL else guessed_sizes(leaves) if layers is None else sizes_of(layers)
        factors = {
            path: tuple(jnp.zeros(shape, dtype) for shape in shapes) for path, shapes in factor_shapes(sizes).items()
        }
        given = () if layers is None else [layer for layer in layers.found if layer.path in factors]
        members = {place for layer in given for place in (layer.kernel, layer.bias)}
        # Without `layers` only the loss will tell which parameters are in none, so each of them has its squares.
        alone = [path for place, path in enumerate(leaves) if place not in members and jnp.size(leaves[path])]
        # Arrays of their own, so that all can be donated.
        zero, count, false = (functools.partial(jnp.zeros, (), dtype) for dtype in (jnp.float32, jnp.int32, bool))
        return ScaleByKroneckerState(
            count=count(),
            key=jax.random.key_data(jax.random.key(seed)),
            weight=jnp.zeros((), dtype),
            num_averaged=jnp.full((), _PROBATION, jnp.int32),
            factors=factors,
            squares={path: jnp.zeros(jnp.shape(leaves[path]), dtype) for path in alone},
            powers=init_powers(factors, rank if structure is KRONECKER else None),
            info=KroneckerInfo(count(), zero(), zero(), count(), zero(), ~false(), false()),
        )

    def measure(value_fn: ValueFn, key: jax.Array, params: PyTree) -> tuple[dict[str, Factors], dict[str, jax.Array]]:
        """Returns the factors of one batch, and the squared gradients that are to be had of other parameters."""
        options = {"batch_size": batch_size, "max_positions": max_positions, "leave_out": leave_out}
        if sampler is None:
            found, taps, squares = tap(value_fn, params, **options)
        elif isinstance(value_fn, Composite):
            draw = sampler
            sample = lambda outputs: draw(own_key(key, outputs), outputs)  # noqa: E731
            found, taps, squares = pull_back_taps(_outputs_fn(value_fn), params, sample, **options)
        else:
            raise TypeError("To draw labels, scale_by_kronecker needs the loss as an optcurv.Composite.")
        shapes = factor_shapes(sizes_of(found))
        factors = {
            layer.path: structure.measure(uses, [len(shape) == 2 for shape in shapes[layer.path]])
            for layer, uses in zip(found.found, taps, strict=True)
        }
        return mean_over_devices((factors, squares))

    def average(
        value_fn: ValueFn,
        num_examples: int,
        state: ScaleByKroneckerState,
        before: tuple[dict[str, Factors], dict[str, jax.Array]],
        params: PyTree,
        gradients: dict[str, jax.Array],
    ) -> tuple[dict[str, Factors], dict[str, jax.Array], jax.Array, jax.Array, jax.Array]:
        """Averages a batch into factors and squares.

        Returns them with their weight, how many batches they hold, and whether this one was refused.
        """
        decay = scheduled(factor_decay, state.count, state.weight.dtype)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
        factors, own = measure(value_fn, key, params) if before[0] else ({}, {})
        now = factors, {path: own.get(path, num_examples * gradients[path] ** 2) for path in before[1]}
        like_this = optax.tree.scale(state.weight, now)  # the averages, had all batches been like this one
        early = state.num_averaged < _PROBATION
        odd = jax.tree.map(lambda a, b: _far_above(a, b) | (_far_above(b, a) & early), like_this, before)
        any_odd = functools.reduce(jnp.logical_or, jax.tree.leaves(odd), jnp.zeros((), bool))
        start = jax.tree.map(jnp.where, odd, like_this, before)
        mixed = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, start, now)
        usable = jnp.isfinite(optax.tree.sum(mixed)) & ~(any_odd & ~state.info.refused)
        factors, squares = optax.tree.where(usable, optax.tree.cast_like(mixed, before), before)
        weight = jnp.where(usable, decay * state.weight + 1 - decay, state.weight)
        more = jnp.where(any_odd, 1, jnp.minimum(state.num_averaged + 1, _PROBATION))
        return factors, squares, weight, jnp.where(usable, more, state.num_averaged), ~usable

    def precondition(
        found: Layers, powers: Powers, damped_squares: dict[str, jax.Array], gradients: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Multiplies each layer's gradient by its powers, and every other parameter's by its own."""
        paths, leaves = list(gradients), list(gradients.values())
        results = {
            path: leaf * damped_squares[path] ** power if path in damped_squares else leaf
            for path, leaf in gradients.items()
        }
        for layer in found.found if powers.powers else ():
            products = structure.apply(powers.powers[layer.path], layer.parts(leaves))
            results |= {paths[place]: leaf for place, leaf in layer.leaves(products, leaves).items()}
        return results

    def update(
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
        gradient_norm = optax.tree.norm(gradient)
        gradients, treedef = _by_path(gradient), jax.tree.structure(gradient)
        curvature_value_fn = curvature_value_fn or value_fn
        found = find_layers(curvature_value_fn, params, leave_out=leave_out)
        in_no_layer = gradients if structure is DIAGONAL else [path for path, _ in found.others.values()]
        alone = [path for path in in_no_layer if jnp.size(gradients[path])]
        shapes = {} if structure is DIAGONAL else factor_shapes(sizes_of(found))
        check_layers(found, shapes, alone, state.factors, state.squares)

        num_examples = count_examples(value_fn, params, batch_size, leave_out) if found.found else batch_size or 1
        before = {path: state.factors[path] for path in shapes}, {path: state.squares[path] for path in alone}
        average_in = lambda operands: average(curvature_value_fn, num_examples, state, before, *operands)  # noqa: E731
        factors, squares, weight, num_averaged, refused = jax.lax.cond(
            is_early(state.count, root_every) | (state.count % factor_every == 0) | (state.weight == 0),
            with_canonical_convolutions(average_in, (params, gradients)),
            lambda _: (*before, state.weight, state.num_averaged, state.info.refused),
            (params, gradients),
        )
        begun, weight_or_one = weight > 0, jnp.where(weight > 0, weight, 1.0)
        dampings = {
            "relative": scheduled(damping, state.count),
            "absolute_damping": scheduled(absolute_damping, state.count),
        }
        powers = refresh_powers(
            state.powers,
            factors,
            weight_or_one,
            exponent=power,
            every=root_every,
            count=state.count,
            usable=begun,
            sharding=root_sharding,
            **dampings,
        )
        unbiased = {path: square / weight_or_one for path, square in squares.items()}
        damped_squares = {path: damp(square, jnp.mean(square), **dampings) for path, square in unbiased.items()}
        results = precondition(found, powers, damped_squares, gradients)
        result = optax.tree.cast_like(jax.tree.unflatten(treedef, list(results.values())), updates)
        result_norm = optax.tree.norm(at_least_float32(result))
        finite = begun & jnp.isfinite(gradient_norm) & jnp.isfinite(result_norm)
        result = optax.tree.where(finite, result, optax.tree.zeros_like(result))
        spectra = [functools.reduce(jnp.multiply, powers.extremes[path]) for path in factors]
        spectra += damped_squares.values()
        info = KroneckerInfo(
            num_layers=jnp.int32(len(factors)),
            largest_eigenvalue=jnp.float32(functools.reduce(jnp.maximum, map(jnp.max, spectra), 0.0)),
            smallest_eigenvalue=jnp.float32(functools.reduce(jnp.minimum, map(jnp.min, spectra), jnp.inf)),
            age=jnp.max(powers.ages),
            norm_ratio=jnp.float32(
                jnp.where(finite, result_norm, 0.0) / jnp.where(gradient_norm > 0, gradient_norm, 1.0)
            ),
            finite=finite,
            refused=refused,
        )
        new_state = ScaleByKroneckerState(
            count=optax.safe_increment(state.count),
            key=state.key,
            weight=weight,
            num_averaged=num_averaged,
            factors=state.factors | factors,
            squares=state.squares | squares,
            powers=powers,
            info=info,
        )
        return result, new_state

    return checked("scale_by_kronecker", init, update)


def _outputs_fn(composite: Composite) -> Callable[[PyTree], PyTree]:
    return lambda params: composite.outputs_and_aux(params)[0]


def _by_path(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves in their order, keyed by path."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _far_above(one: jax.Array, other: jax.Array) -> jax.Array:
    """Whether a statistic is far above another that is not zero; its largest entry is a matrix's largest variance."""
    return (jnp.max(other) > 0) & (jnp.max(one) > _OUTLIER * jnp.max(other))
