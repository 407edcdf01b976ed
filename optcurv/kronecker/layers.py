"""The layers of a network, told from the places where its parameters meet activations."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from optcurv.arguments import PyTree, by_path
from optcurv.kronecker.interpreter import Findings
from optcurv.kronecker.places import Lookup, Product, Spread
from optcurv.kronecker.uses import Added, LookedUp, Multiplied, Repeated, Use


@dataclasses.dataclass(frozen=True)
class Layer:
    r"""A kernel W, perhaps with a bias, that multiplies activations: :math:`s = W^\top a`.

    Attributes:
      path: of the kernel, as `path_name` writes it.
      kind: `dense` or `convolution`.
      bias: the path of the bias; None without one.
      stack: how many such matrices the kernel holds (groups of a convolution, layers under `nn.scan`).
      in_size: the length of a, without the entry that the bias multiplies.
      out_size: the length of s.
      num_uses: how many products the kernel takes part in.
    """

    path: str
    kind: str
    bias: str | None
    stack: int
    in_size: int
    out_size: int
    num_uses: int
    matrix_of: Callable[[jax.Array], jax.Array] = dataclasses.field(repr=False, compare=False)
    """Arranges an array of the kernel's shape as `(stack, in_size, out_size)`."""

    def parts(self, leaves: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        """Arranges kernel and bias, if any, as matrices `(stack, in_size, out_size)` and `(stack, 1, out_size)`."""
        matrix = self.matrix_of(leaves[self.path])
        return (matrix,) if self.bias is None else (matrix, leaves[self.bias].reshape(self.stack, 1, -1))

    def leaves(self, parts: Sequence[jax.Array], like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Undoes `parts`: returns kernel and bias by their paths, in the shapes of the leaves `like`."""
        kernel = jax.ShapeDtypeStruct(jnp.shape(like[self.path]), parts[0].dtype)
        # `matrix_of` moves every entry to a place of its own, so its transpose is its inverse.
        (unmoved,) = jax.linear_transpose(self.matrix_of, kernel)(parts[0])
        if self.bias is None:
            return {self.path: unmoved}
        return {self.path: unmoved, self.bias: parts[1].reshape(jnp.shape(like[self.bias]))}


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a network, and why the other parameters belong to none; `print` shows them as a table.

    Attributes:
      found: the layers, in the order of the parameters.
      others: for each parameter in no layer, by path, what it goes into.
      estimated: the paths of those others of which the gradient of a single example cannot be computed.
      left_out: the paths that were to be left out.
    """

    found: tuple[Layer, ...]
    others: dict[str, str]
    estimated: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("parameter", "kind", "factors")]
        for layer in self.found:
            stack = f"{layer.stack} x " if layer.stack > 1 else ""
            bias = " + bias" if layer.bias is not None else ""
            uses = f", {layer.num_uses} uses" if layer.num_uses > 1 else ""
            sizes = f"{stack}({layer.in_size + (layer.bias is not None)}, {layer.out_size})"
            rows.append((layer.path, layer.kind + bias + uses, sizes))
        for path, reason in self.others.items():
            rows.append((path, "diagonal, estimated" if path in self.estimated else "diagonal", reason))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{path:<{widths[0]}}  {kind:<{widths[1]}}  {sizes}" for path, kind, sizes in rows)


def tell_layers(
    findings: Findings, params: PyTree, leave_out: Sequence[str] = ()
) -> tuple[Layers, dict[str, list[Use]]]:
    """Tells layers from other parameters; returns them with the uses of each parameter."""
    leaves = by_path(params)
    _check_left_out(leave_out, list(leaves))
    alone = {*leave_out, *findings.lost}
    uses = _uses(findings)
    kernels = {
        path: _multiplied(uses[path])
        for path in leaves
        if path in uses and path not in alone and _share_factors(uses[path])
    }
    joined = {}
    for bias, added in _biases(uses).items():
        kernel = added[0].view.path
        if bias not in {*alone, *uses} and kernel in kernels and [use.kernel for use in added] == kernels[kernel]:
            joined[kernel] = bias
        else:
            uses.setdefault(bias, []).extend(added)

    found = []
    for path, several in kernels.items():
        first = several[0]
        stack, in_size, out_size = jax.eval_shape(first.matrix, leaves[path]).shape
        kind = "convolution" if first.place.is_convolution else "dense"
        sizes = stack, in_size, out_size
        found.append(Layer(path, kind, joined.get(path), *sizes, len(several), matrix_of=first.matrix))

    others, estimated = {}, set()
    for path in leaves:
        if path in kernels or path in joined.values():
            continue
        several = uses.get(path, [])
        unseen = any(isinstance(use, Added) and use.view.path in leave_out for use in several)
        reason = "left out" if path in leave_out else "is added to a layer left out" if unseen else None
        others[path] = reason or _reason(findings, path, several)
        if reason or path in alone or not several:
            estimated.add(path)
    return Layers(tuple(found), others, frozenset(estimated), tuple(leave_out)), uses


def _check_left_out(leave_out: Sequence[str], paths: Sequence[str]) -> None:
    if isinstance(leave_out, str):
        raise TypeError(f"leave_out must be several paths, as in leave_out=[{leave_out!r}]; got a single string.")
    unknown = [path for path in leave_out if path not in paths]
    if unknown:
        raise ValueError(f"leave_out names no parameter by {', '.join(unknown)}; there are {', '.join(paths)}.")


def _uses(findings: Findings) -> dict[str, list[Use]]:
    """Gathers the places by parameter."""
    uses: dict[str, list[Use]] = {}
    for index, place in enumerate(findings.places):
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
            uses.setdefault(view.path, []).append(use)
    return uses


def _multiplied(uses: Sequence[Use]) -> list[Multiplied]:
    return [use for use in uses if isinstance(use, Multiplied)]


def _share_factors(uses: Sequence[Use]) -> bool:
    """Tells whether a parameter is only ever a kernel, and always in the same layout."""
    kernels = _multiplied(uses)
    return len(kernels) == len(uses) and all(use.layout() == kernels[0].layout() for use in kernels)


def _biases(uses: Mapping[str, Sequence[Use]]) -> dict[str, list[Added]]:
    """Gathers the products that each bias is added to."""
    biases: dict[str, list[Added]] = {}
    for use in _multiplied([*itertools.chain.from_iterable(uses.values())]):
        if (bias := use.bias()) is not None:
            biases.setdefault(bias, []).append(Added(use.place, use.index, use))
    return biases


def _reason(findings: Findings, path: str, uses: Sequence[Use]) -> str:
    """Says what a parameter in no layer goes into."""
    multiplies = bool(_multiplied(uses))
    added = {use.view.path for use in uses if isinstance(use, Added)}
    names = {use.place.name for use in uses if isinstance(use, Repeated | LookedUp)} | findings.lost.get(path, set())
    names = names or (set() if uses else findings.penalties.get(path, set()))
    if names:
        return f"{'multiplies activations and ' * multiplies}goes into {', '.join(sorted(names))}"
    if multiplies:
        return "multiplies activations in several layouts"
    if added:
        return "is added in several places" if len(added) > 1 else "is added to what is no layer"
    return "in no layer"
