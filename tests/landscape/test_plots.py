"""What is drawn is what the slices and spectra returned, the right way round."""

import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import optcurv
from optcurv.landscape.spectra import SpectralDensity

XS, YS = np.linspace(0.0, 1.0, 5), np.linspace(0.0, 10.0, 7)
PLANE = XS[:, None] + 0 * YS  # grows along x alone
DENSITY = SpectralDensity(jnp.array([[-1.0, 2.0], [0.0, 3.0]]), jnp.array([[0.25, 0.75], [0.5, 0.5]]))


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def test_line_draws_every_metric_and_leaves_gaps():
    values = {"loss": XS**2, "accuracy": np.array([0.1, np.inf, 0.3, np.nan, 0.5])}
    axes = optcurv.plot_line(XS, values)
    loss, accuracy = axes.lines
    np.testing.assert_allclose(loss.get_xydata(), np.stack([XS, XS**2], axis=1), rtol=1e-6)
    np.testing.assert_allclose(accuracy.get_ydata(), [0.1, np.nan, 0.3, np.nan, 0.5], rtol=1e-6)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["loss", "accuracy"]


def test_a_single_curve_needs_no_legend():
    axes = optcurv.plot_line(XS, XS**2)
    assert axes.get_legend() is None


def test_plane_has_its_first_coordinate_along_the_horizontal_axis():
    axes = optcurv.plot_plane(XS, YS, PLANE, label="log loss")
    (contours,) = axes.collections
    boxes = [path.get_extents() for path in contours.get_paths() if len(path.vertices)]
    assert len(boxes) > 5
    for box in boxes:
        assert box.width < 0.2
        assert box.height == pytest.approx(10.0)
    assert [other.get_ylabel() for other in axes.figure.axes if other is not axes] == ["log loss"]


def test_paths_lie_where_their_coordinates_say_and_do_not_widen_the_plane():
    center, directions = jnp.zeros(3), (jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 2.0, 0.0]))
    points = [jnp.array([0.5, 2.0, 7.0]), jnp.array([1.0, 40.0, 0.0])]
    paths = {"run": optcurv.plane_coordinates(center, directions, points), "end": [[1.0, 0.0]]}
    axes = optcurv.plot_plane(XS, YS, PLANE, paths=paths)
    run, end = (curve for curve in axes.lines if not curve.get_label().startswith("_"))
    np.testing.assert_allclose(run.get_xydata(), [[0.5, 1.0], [1.0, 20.0]], rtol=1e-6)
    assert end.get_marker() != "None"  # a path of one point is seen too
    assert (axes.get_xlim(), axes.get_ylim()) == ((0.0, 1.0), (0.0, 10.0))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["run", "end"]


def test_plane_leaves_blank_what_is_not_finite():
    values = PLANE.copy()
    values[-1] = np.inf
    axes = optcurv.plot_plane(XS, YS, values)
    assert max(path.get_extents().x1 for path in axes.collections[0].get_paths() if len(path.vertices)) <= 0.75


def test_surface():
    axes = optcurv.plot_surface(XS, YS, PLANE, label="height")
    assert axes.get_zlabel() == "height"
    (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
    assert x_low <= 0 < 1 <= x_high < 2
    assert y_low <= 0 < 10 <= y_high < 20


def test_spectrum_is_a_density_with_all_its_peaks():
    axes = optcurv.plot_spectrum({"one": DENSITY, "two": DENSITY}, width=0.01)
    one, _ = axes.lines
    x, y = one.get_data()
    assert np.trapezoid(y, x) == pytest.approx(1, rel=1e-2)
    np.testing.assert_allclose(y.max(), 0.375 / (0.01 * np.sqrt(2 * np.pi)), rtol=1e-3)
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[1] > y.max()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]


@pytest.mark.parametrize("density", [None, DENSITY], ids=["alone", "under a density"])
def test_eigenvalues_are_marked(density):
    found = jnp.array([5.0, -4.0, jnp.nan])  # of the third there was none
    axes = optcurv.plot_spectrum(density, eigenvalues=found)
    (marks,) = axes.collections
    assert [segment[0][0] for segment in marks.get_segments() if len(segment)] == [5, -4]
    low, high = axes.get_xlim()
    assert low < -4
    assert high > 5


def test_spectrum_of_a_single_point_is_a_peak_there():
    axes = optcurv.plot_spectrum(SpectralDensity(jnp.array([[2.0]]), jnp.array([[1.0]])))
    x, y = axes.lines[0].get_data()
    assert x[np.argmax(y)] == 2
    assert np.all(np.isfinite(y))


DRAWERS = {
    "line": lambda ax=None: optcurv.plot_line(XS, XS, ax=ax),
    "plane": lambda ax=None: optcurv.plot_plane(XS, YS, PLANE, ax=ax),
    "surface": lambda ax=None: optcurv.plot_surface(XS, YS, PLANE, ax=ax),
    "spectrum": lambda ax=None: optcurv.plot_spectrum(DENSITY, ax=ax),
}
every_drawer = pytest.mark.parametrize("draw", DRAWERS.values(), ids=DRAWERS.keys())


@every_drawer
def test_axes_of_your_own_are_drawn_into(draw):
    figure = plt.figure()
    mine = figure.add_subplot(projection="3d" if draw is DRAWERS["surface"] else None)
    assert draw(mine) is mine
    assert plt.get_fignums() == [figure.number]
    assert draw() is not mine


@every_drawer
def test_without_matplotlib_the_error_says_how_to_install_it(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install "optcurv\[plots\]"'):
        draw()


WRONG = {
    "line": (lambda: optcurv.plot_line(XS, YS), ValueError, r"values must be of shape \(5,\), got \(7,\)"),
    "line of a plane": (lambda: optcurv.plot_line(PLANE, PLANE), ValueError, r"coefficients must be of shape"),
    "transposed": (lambda: optcurv.plot_plane(XS, YS, PLANE.T), ValueError, r"values must be of shape \(5, 7\)"),
    "blank": (lambda: optcurv.plot_surface(XS, YS, np.nan * PLANE), ValueError, "values must hold at least one finite"),
    "path": (
        lambda: optcurv.plot_plane(XS, YS, PLANE, paths={"run": np.zeros((2, 9))}),
        ValueError,
        r"paths\['run'\] must be of shape \(2, 2\)",
    ),
    "flat axes": (
        lambda: optcurv.plot_surface(XS, YS, PLANE, ax=plt.figure().add_subplot()),
        TypeError,
        r"ax must be three-dimensional.*projection",
    ),
    "nothing": (lambda: optcurv.plot_spectrum(), ValueError, "pass a density, eigenvalues, or both"),
    "width": (lambda: optcurv.plot_spectrum(DENSITY, width=0.0), ValueError, "width must be positive"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
