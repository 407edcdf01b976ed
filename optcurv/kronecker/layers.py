"""The layers of a network, found from the loss closure alone."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optcurv.arguments import PyTree, ValueFn, path_name, scalar_fn
from optcurv.kronecker.places import Lookup, Product, Spread
from optcurv.kronecker.recording import Recording, record_places
from optcurv.kronecker.uses import Added, LookedUp, Multiplied, Repeated, Use


@dataclasses.dataclass(frozen=True)
class Layer:
    r"""A kernel W, perhaps with a bias, that multiplies activations: :math:`s = W^\top a`.

    Attributes:
      path: of the kernel, as `path_name` writes it.
      kind: `dense` or `convolution`.
      kernel: its place among the parameters' leaves.
      bias: likewise; None without one.
      stack: how many such matrices the kernel holds (groups of a convolution, layers under `nn.scan`).
      in_size: the length of a, without what a bias multiplies.
      out_size: the length of s.
      num_uses: how many products the kernel takes part in.
    """

    path: str
    kind: str
    kernel: int
    bias: int | None
    stack: int
    in_size: int
    out_size: int
    num_uses: int
    matrix_of: Callable[[jax.Array], jax.Array] = dataclasses.field(repr=False, compare=False)
    """Arranges an array like the kernel as `(stack, in_size, out_size)`."""

    def parts(self, leaves: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Arranges kernel and bias, if any, as matrices `(stack, in_size, out_size)` and `(stack, 1, out_size)`."""
        matrix = self.matrix_of(leaves[self.kernel])
        return (matrix,) if self.bias is None else (matrix, leaves[self.bias].reshape(self.stack, 1, -1))

    def leaves(self, parts: Sequence[jax.Array], like: Sequence[jax.Array]) -> dict[int, jax.Array]:
        """Undoes `parts`: returns kernel and bias by their places, in the shapes of the leaves `like`."""
        kernel = jax.ShapeDtypeStruct(jnp.shape(like[self.kernel]), parts[0].dtype)
        # `matrix_of` moves every entry to one place, so its transpose is its inverse.
        (unmoved,) = jax.linear_transpose(self.matrix_of, kernel)(parts[0])
        if self.bias is None:
            return {self.kernel: unmoved}
        return {self.kernel: unmoved, self.bias: parts[1].reshape(jnp.shape(like[self.bias]))}


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a network, and why the other parameters belong to none; `print` shows them as a table.

    Attributes:
      found: the layers, in the order of the parameters' leaves.
      others: for each leaf in no layer, its path and what it goes into.
      estimated: those of the others whose gradient of a single example is not to be had.
      left_out: the paths that were to be left out.
    """

    found: tuple[Layer, ...]
    others: dict[int, tuple[str, str]]
    estimated: frozenset[int] = frozenset()
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("parameter", "kind", "factors")]
        for layer in self.found:
            stack = f"{layer.stack} x " if layer.stack > 1 else ""
            bias = " + bias" if layer.bias is not None else ""
            uses = f", {layer.num_uses} uses" if layer.num_uses > 1 else ""
            sizes = f"{stack}({layer.in_size + (layer.bias is not None)}, {layer.out_size})"
            rows.append((layer.path, layer.kind + bias + uses, sizes))
        for leaf, (path, reason) in self.others.items():
            rows.append((path, "diagonal, estimated" if leaf in self.estimated else "diagonal", reason))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{path:<{widths[0]}}  {kind:<{widths[1]}}  {sizes}" for path, kind, sizes in rows)


def layers(value_fn: ValueFn, params: PyTree, *, leave_out: Sequence[str] = ()) -> Layers:
    r"""Finds a network's layers; nothing is computed.

    A layer is a parameter that multiplies activations, in a matrix product or in a convolution, in whatever library it
    is written: it may be cast, transposed, reshaped, concatenated with others, used several times, or used inside of
    `jit`, `jax.checkpoint` and `scan` (recurrent cells, and stacked layers). A bias added to the result joins it, also
    after the result was transposed or reshaped, or under `vmap`.

    Of every other parameter only the diagonal of the Fisher matrix is taken. The table marks as `diagonal` what is used
    in ways that are understood: scales, offsets, embeddings that are looked up, and kernels used in several ways, such
    as an embedding that is the last layer too. Their diagonal is the mean over examples of the squares of each
    example's own gradient, if one axis of the activations is as long as the batch. Otherwise, and for those marked
    `diagonal, estimated`, it is estimated as N times the square of the mean gradient of N examples. That is about right
    where the gradients are mostly noise, and up to N times too large where they agree. A penalty, that is a number made
    of parameters alone and added to the loss, belongs to no example and is left out of the Fisher matrix.

    A layer that does not see the examples must be left out by name: one on constants, such as the coordinates of
    positions, or one on the slots of a mixture of experts, which hold tokens of any example. An error asks for it where
    the number of rows is not a multiple of the batch size. **Where it is a multiple, the rows are taken for examples,**
    as nothing tells them from the tokens of a text.

    The members of an ensemble under `vmap` that share their inputs are one wide layer, with one factor for the outputs
    of all. With inputs of their own, as in `jax.vmap(net)(params, jnp.broadcast_to(x, (members, *x.shape)))`, they are
    a stack.

    Args:
      value_fn: the loss as a function of params.
      params: the parameters, or their shapes.
      leave_out: the paths of parameters, as the table writes them, whose diagonal is to be estimated.

    Returns:
      The layers.

    Raises:
      ValueError: if there is no parameter of a name in `leave_out`.
      TypeError: if `leave_out` is a single string.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> x = jnp.ones((5, 3))
      >>> loss = lambda p: jnp.mean((p["scale"] * (x @ p["w"] + p["b"])) ** 2) + jnp.mean(jnp.sort(p["c"]))
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "scale": jnp.ones(2), "c": jnp.ones(4)}
      >>> print(optcurv.layers(loss, params))
      parameter  kind                 factors
      ['w']      dense + bias         (4, 2)
      ['c']      diagonal, estimated  goes into sort
      ['scale']  diagonal             goes into mul
      >>> print(optcurv.layers(loss, params, leave_out=["['w']"]).others[3])
      ("['w']", 'left out')
    """
    return describe(record_places(scalar_fn(value_fn), params), params, leave_out)[0]


def describe(
    recording: Recording, params: PyTree, leave_out: Sequence[str] = ()
) -> tuple[Layers, dict[int, list[Any]]]:
    """Tells layers from other parameters; returns them with the uses of each parameter."""
    paths_and_leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [path_name(path) for path, _ in paths_and_leaves]
    _check_left_out(leave_out, paths)
    alone = {leaf for leaf, path in enumerate(paths) if path in leave_out} | set(recording.lost)
    uses = _uses(recording)
    kernels = {leaf: several for leaf, several in uses.items() if leaf not in alone and _share_factors(several)}
    joined = {}
    for bias, added in _biases(uses).items():
        kernel = added[0].view.leaf
        if bias not in {*alone, *uses} and kernel in kernels and [use.kernel for use in added] == kernels[kernel]:
            joined[kernel] = bias
        else:
            uses.setdefault(bias, []).extend(added)

    found = []
    for kernel, several in sorted(kernels.items()):
        first = several[0]
        stack, in_size, out_size = jax.eval_shape(first.matrix, paths_and_leaves[kernel][1]).shape
        kind = "convolution" if first.place.is_convolution else "dense"
        sizes = stack, in_size, out_size
        bias = joined.get(kernel)
        found.append(Layer(paths[kernel], kind, kernel, bias, *sizes, len(several), matrix_of=first.matrix))

    others, estimated = {}, set()
    for leaf in sorted(set(range(len(paths))) - kernels.keys() - set(joined.values())):
        several = uses.get(leaf, [])
        unseen = any(isinstance(use, Added) and paths[use.view.leaf] in leave_out for use in several)
        reason = "left out" if paths[leaf] in leave_out else "is added to a layer left out" if unseen else None
        others[leaf] = paths[leaf], reason or _reason(recording, leaf, several)
        if reason or leaf in alone or not several:
            estimated.add(leaf)
    return Layers(tuple(found), others, frozenset(estimated), tuple(leave_out)), uses


def _check_left_out(leave_out: Sequence[str], paths: Sequence[str]) -> None:
    if isinstance(leave_out, str):
        raise TypeError(f"leave_out must be several paths, as in leave_out=[{leave_out!r}]; got a single string.")
    unknown = [path for path in leave_out if path not in paths]
    if unknown:
        raise ValueError(f"leave_out names no parameter by {', '.join(unknown)}; there are {', '.join(paths)}.")


def _uses(recording: Recording) -> dict[int, list[Any]]:
    """Gathers the places by parameter."""
    uses: dict[int, list[Any]] = {}
    for index, place in enumerate(recording.places):
        for part, view in enumerate(place.views):
            if view.size == 0:
                continue  # an empty parameter has no statistics
            if isinstance(place, Product):
                use = Multiplied(place, index, part)
            elif isinstance(place, Spread):
                use = Repeated(place, index)
            else:
                assert isinstance(place, Lookup)
                use = LookedUp(place, index)
            uses.setdefault(view.leaf, []).append(use)
    return uses


def _share_factors(uses: list[Any]) -> bool:
    return all(isinstance(use, Multiplied) and use.layout() == uses[0].layout() for use in uses)


def _biases(uses: dict[int, list[Any]]) -> dict[int, list[Added]]:
    """Gathers the products that each bias is added to."""
    biases: dict[int, list[Added]] = {}
    for use in itertools.chain.from_iterable(uses.values()):
        bias = use.bias() if isinstance(use, Multiplied) else None
        if bias is not None:
            biases.setdefault(bias, []).append(Added(use.place, use.index, use))
    return biases


def _reason(recording: Recording, leaf: int, uses: list[Use]) -> str:
    """Says what a parameter in no layer goes into."""
    multiplies = any(isinstance(use, Multiplied) for use in uses)
    added = [use.view.leaf for use in uses if isinstance(use, Added)]
    names = {use.place.name for use in uses if isinstance(use, Repeated | LookedUp)} | recording.lost.get(leaf, set())
    names = names or (set() if uses else recording.penalties.get(leaf, set()))
    if names:
        return f"{'multiplies activations and ' * multiplies}goes into {', '.join(sorted(names))}"
    if multiplies:
        return "multiplies activations in several layouts"
    if added:
        return "is added in several places" if len(set(added)) > 1 else "is added to what is no layer"
    return "in no layer"
