"""Pictures of slices and spectra. The arrays come from the other modules of this folder; matplotlib draws them.

matplotlib is imported when something is first drawn, so that `import optcurv` needs none.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp

from optcurv.landscape.spectra import SpectralDensity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from mpl_toolkits.mplot3d import Axes3D

_T = TypeVar("_T")
_NUM_LEVELS = 12  # of a plane's contours
_COLORS = "viridis"  # its lightness grows evenly: readable in black and white, and by the colour-blind
_DECADES_SHOWN = 6  # of a density, below its highest value


def plot_line(
    coefficients: jax.typing.ArrayLike,
    values: jax.typing.ArrayLike | Mapping[str, jax.typing.ArrayLike],
    *,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws what `optcurv.line` or `optcurv.absolute_line` returned.

    Needs matplotlib: `pip install "optcurv[plots]"`.

    Args:
      coefficients: the points on the line, or their distances, of shape (n,).
      values: the losses there, of shape (n,), or several metrics by name. Gaps are left where they are not finite.
      ax: the matplotlib axes to draw into. Default: those of a new figure.

    Returns:
      The axes, so that you can go on: `ax.set(xlabel="distance", yscale="log")`.

    Raises:
      ImportError: if matplotlib is not installed.
      ValueError: if the shapes do not match.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> metrics = lambda w: {"loss": jnp.sum(w**2), "norm": jnp.linalg.norm(w)}
      >>> coefficients = jnp.linspace(-0.5, 1.5, 21)
      >>> values = optcurv.line(metrics, jnp.array([1.0, 1.0]), jnp.array([-1.0, 2.0]), coefficients)
      >>> ax = optcurv.plot_line(coefficients, values)
      >>> [curve.get_label() for curve in ax.lines]
      ['loss', 'norm']
    """
    axes = ax or _new_axes()
    x = _finite("coefficients", coefficients, (jnp.size(coefficients),))
    for name, curve in _by_name(values).items():
        axes.plot(x, _finite("values", curve, x.shape), label=name)
    if isinstance(values, Mapping):
        axes.legend()
    return axes


def plot_plane(
    xs: jax.typing.ArrayLike,
    ys: jax.typing.ArrayLike,
    values: jax.typing.ArrayLike,
    *,
    paths: Mapping[str, jax.typing.ArrayLike] | None = None,
    label: str = "loss",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws what `optcurv.plane`, `bilinear` or `barycentric` returned, as filled contours.

    Needs matplotlib: `pip install "optcurv[plots]"`.

    Args:
      xs: the first coordinates, of shape (n,), increasing; along the horizontal axis.
      ys: the second, of shape (m,).
      values: the losses, of shape (n, m). Where they span orders of magnitude, pass `jnp.log10(losses)`. Those that
        are not finite stay blank.
      paths: points to draw over the contours, of shape (points, 2), such as what `optcurv.plane_coordinates` returns
        for the parameters along a training run, by the name for the legend. Parts outside the plane are cut off.
      label: for the colour bar.
      ax: the matplotlib axes to draw into. Default: those of a new figure.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is not installed.
      ValueError: if the shapes do not match, or no value is finite.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> loss, center = (lambda w: w @ jnp.array([1.0, 10.0, 0.0]) ** 2), jnp.zeros(3)
      >>> directions = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 1.0, 0.0])
      >>> xs, ys = jnp.linspace(-1, 1, 11), jnp.linspace(-1, 1, 7)
      >>> losses = optcurv.plane(loss, center, directions, xs, ys)
      >>> run = [jnp.array([0.8, 0.5, 0.1]), jnp.array([0.2, 0.0, 0.3])]
      >>> path = optcurv.plane_coordinates(center, directions, run)
      >>> ax = optcurv.plot_plane(xs, ys, losses, paths={"my optimiser": path})
    """
    axes = ax or _new_axes()
    x, y, heights = _grid(xs, ys, values)
    filled = axes.contourf(x, y, heights.T, levels=_NUM_LEVELS, cmap=_COLORS)
    axes.figure.colorbar(filled, ax=axes, label=label)
    for name, points in (paths or {}).items():
        path = _finite(f"paths[{name!r}]", points, (len(jnp.asarray(points)), 2))
        axes.plot(*path.T, color="white", linewidth=3)  # a rim, to stand out from dark and bright
        axes.plot(*path.T, marker=".", label=name)
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    if paths:
        axes.legend()
    return axes


def plot_surface(
    xs: jax.typing.ArrayLike,
    ys: jax.typing.ArrayLike,
    values: jax.typing.ArrayLike,
    *,
    label: str = "loss",
    ax: "Axes3D | None" = None,
) -> "Axes3D":
    """Draws what `optcurv.plane`, `bilinear` or `barycentric` returned, as a surface in three dimensions.

    Needs matplotlib: `pip install "optcurv[plots]"`.

    Args:
      xs: the first coordinates, of shape (n,).
      ys: the second, of shape (m,).
      values: the losses, of shape (n, m), as for `optcurv.plot_plane`.
      label: for the vertical axis.
      ax: three-dimensional matplotlib axes to draw into. Default: those of a new figure.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is not installed.
      TypeError: if `ax` is not three-dimensional.
      ValueError: if the shapes do not match, or no value is finite.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> xs, ys = jnp.linspace(-1, 1, 11), jnp.linspace(-1, 1, 7)
      >>> directions = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> losses = optcurv.plane(lambda w: jnp.sum(w**2), jnp.zeros(2), directions, xs, ys)
      >>> ax = optcurv.plot_surface(xs, ys, losses)
      >>> ax.view_init(elev=20)
    """
    if ax is not None and not hasattr(ax, "plot_surface"):
        raise TypeError('ax must be three-dimensional: make it with plt.subplots(subplot_kw={"projection": "3d"}).')
    axes = ax or _new_axes(projection="3d")
    x, y, heights = _grid(xs, ys, values)
    axes.plot_surface(x[:, None], y[None, :], heights, cmap=_COLORS)
    axes.set_zlabel(label)
    axes.set_box_aspect(None, zoom=0.85)  # pyright: ignore[reportArgumentType]: room for the label of the heights
    return axes


def plot_spectrum(
    density: SpectralDensity | Mapping[str, SpectralDensity] | None = None,
    *,
    eigenvalues: jax.typing.ArrayLike | None = None,
    width: float | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws what `optcurv.spectral_density` and `optcurv.leading_eigenpairs` returned.

    The density's axis is logarithmic, because most eigenvalues of a network's Hessian are near zero and the few that
    stand out would not be seen. Needs matplotlib: `pip install "optcurv[plots]"`.

    Args:
      density: what `optcurv.spectral_density` returned, or several by name.
      eigenvalues: of shape (k,), such as `optcurv.leading_eigenpairs(...).values`; marked at the lower edge.
      width: the standard deviation to which each point of the density is spread, in the unit of the eigenvalues.
        Default: one hundredth of the range drawn.
      ax: the matplotlib axes to draw into. Default: those of a new figure.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is not installed.
      ValueError: if there is neither a density nor an eigenvalue, or a width that is not positive.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> loss = lambda w: 0.5 * jnp.sum(jnp.linspace(1.0, 3.0, 100) * w**2)
      >>> w = jnp.zeros(100)
      >>> product = optcurv.hessian_product(loss, w)
      >>> density = optcurv.spectral_density(product, w, num_steps=20)
      >>> largest = optcurv.leading_eigenpairs(product, w, num_pairs=3)
      >>> ax = optcurv.plot_spectrum(density, eigenvalues=largest.values)
    """
    densities = {} if density is None else _by_name(density)
    marks = jnp.ravel(jnp.asarray([] if eigenvalues is None else eigenvalues))
    drawn = jnp.concatenate([marks, *(one.nodes.ravel() for one in densities.values())])
    if not drawn.size:
        raise ValueError("There is nothing to draw: pass a density, eigenvalues, or both.")
    if width is not None and not width > 0:
        raise ValueError(f"width must be positive, got {width}.")
    axes = ax or _new_axes()
    low, high = float(jnp.nanmin(drawn)), float(jnp.nanmax(drawn))
    spread = width or (high - low) / 100 or 1.0
    grid, highest = jnp.linspace(low - 6 * spread, high + 6 * spread, 1000), 0.0
    for name, one in densities.items():
        x = jnp.sort(jnp.append(grid, one.nodes))  # with the nodes, no peak falls between two points
        y = one.smoothed(x, spread)
        axes.plot(*jax.device_get((x, y)), label=name)
        highest = max(highest, float(jnp.max(y)))
    axes.vlines(jax.device_get(marks), 0, 0.06, transform=axes.get_xaxis_transform(), color="black")
    axes.set_xlabel("eigenvalue")
    if densities:
        axes.set(ylabel="density", yscale="log", ylim=(highest / 10**_DECADES_SHOWN, 3 * highest))
    else:
        axes.set_yticks([])
    if isinstance(density, Mapping):
        axes.legend()
    return axes


def _new_axes(projection: str | None = None) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('Drawing needs matplotlib: pip install "optcurv[plots]".') from error
    return plt.figure(layout="constrained").add_subplot(projection=projection)


def _by_name(values: _T | Mapping[str, _T]) -> Mapping[str | None, _T]:
    return values if isinstance(values, Mapping) else {None: values}  # pyright: ignore[reportReturnType]


def _finite(name: str, values: jax.typing.ArrayLike, shape: tuple[int, ...]) -> Any:
    """A NumPy array of a shape, with NaN, which matplotlib leaves blank, for all that is not finite."""
    array = jnp.asarray(values, float)
    if array.shape != shape:
        raise ValueError(f"{name} must be of shape {shape}, got {array.shape}.")
    return jax.device_get(jnp.where(jnp.isfinite(array), array, jnp.nan))


def _grid(xs: jax.typing.ArrayLike, ys: jax.typing.ArrayLike, values: jax.typing.ArrayLike) -> tuple[Any, Any, Any]:
    x, y = _finite("xs", xs, (jnp.size(xs),)), _finite("ys", ys, (jnp.size(ys),))
    heights = _finite("values", values, (x.size, y.size))
    if not jnp.isfinite(heights).any():
        raise ValueError("values must hold at least one finite number.")
    return x, y, heights
