"""Tables and pictures of `scale`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from numpy.typing import ArrayLike
from rich.table import Table

from benchmarks.core.surface_plots import draw_panels
from benchmarks.performance.programs import KINDS

Row = Mapping[str, Any]
Curves = dict[str, dict[str, tuple[ArrayLike, ArrayLike]]]

_SHOWN_DEVICES = (8, 64, 1024)
_BYTES_OF_A_PARAMETER = 4
_LEAST_WIDTH = 9.0  # inches


def ratios_table(title: str, varied: str, rows: Sequence[Row]) -> Table:
    """Lays out costs in gradient steps."""
    caption = (
        "Floor, FLOPs and time are ratios to the gradient step; time: median of the rounds (quartiles). FLOPs: of "
        "matrix products, from XLA's program. TSO-ALRA: an average step of its first stage, with its refreshes."
    )
    table = Table(title=title, caption=caption)
    for column in (
        varied.replace("_", " "),
        "method",
        "floor",
        "FLOPs",
        "time",
        "time / floor",
        "ms a step",
        "memory MB",
    ):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
    section = lambda row: row.get("family", row[varied])  # noqa: E731
    for i, row in enumerate(rows):
        time = ("needs more memory than there is", "", "")
        if row["fits"]:
            low, median, high = row["ratio_quartiles"]
            ratio = f"{median:.2f} ({low:.2f}-{high:.2f})"
            time = ratio, f"{median / row['floor']:.2f}", f"{1e3 * row['seconds']:.3g}"
        table.add_row(
            f"{row[varied]:,}",
            row["method"],
            f"{row['floor']:.2f}",
            f"{row['flops_ratio']:.3f}",
            *time,
            f"{row['bytes'] / 1e6:.3g}",
            end_section=i + 1 == len(rows) or section(rows[i + 1]) != section(row),
        )
    return table


def devices_table(title: str, strong_batch: int, rows: Sequence[Row]) -> Table:
    """Lays out times beside those of one device with all of the work."""
    caption = (
        f"Time of a step over that of one device that does all of the work. The devices share the cores, so more of "
        f"them cannot be faster: what lies above 1 is overhead. Median of the rounds (quartiles). Strong: a batch of "
        f"{strong_batch} in all; weak: of {strong_batch // 2} a device."
    )
    table = Table(title=title, caption=caption)
    table.add_column("method", no_wrap=True)
    table.add_column("placement")
    columns = [(scaling, count) for scaling in ("strong", "weak") for count in (2, 4)]
    for scaling, count in columns:
        table.add_column(f"{scaling}, {count} devices", justify="right")
    for row in rows:
        cells = [
            "{1:.2f} ({0:.2f}-{2:.2f})".format(*row[f"{scaling} {count}"])  # median, then quartiles
            for scaling, count in columns
        ]
        table.add_row(row["method"], row["placement"], *cells)
    return table


def collectives_table(title: str, rows: Sequence[Row]) -> Table:
    """Lays out how many collectives of each kind a step runs, and of how many bytes, in vectors of all parameters."""
    caption = (
        "How many, of how many bytes: 1 is a vector of all parameters. From XLA's programs for 4 CPU devices; loops by "
        "their iterations, TSO-ALRA's refreshes by how often they are. XLA for CPUs has no reduce-scatter: where there "
        "is one, FSDP's all-reduces send half as much."
    )
    table = Table(title=title, caption=caption)
    table.add_column("method", no_wrap=True)
    table.add_column("placement")
    kinds = [kind for kind in KINDS if any(kind in row["communication"] for row in rows)]
    for kind in kinds:
        table.add_column(kind, justify="right")
    for row in rows:
        vector = _BYTES_OF_A_PARAMETER * row["parameters"]
        cells = [
            f"{traffic['count']:.4g}: {traffic['num_bytes'] / vector:.3f}"
            if (traffic := row["communication"].get(kind))
            else "-"
            for kind in kinds
        ]
        table.add_row(row["method"], row["placement"], *cells)
    return table


def model_table(title: str, weak_batch: int, strong_batch: int, rows: Sequence[Row]) -> Table:
    """Lays out predicted efficiencies, and times beside the gradient step's."""
    most = _SHOWN_DEVICES[-1]
    caption = (
        f"Efficiency: the share of the ideal speed. Weak: {weak_batch} examples a device; strong: {strong_batch} in "
        "all. In gradient steps: the time of a step over the gradient step's, weak, on as many devices. Computing and "
        "communicating take turns; bytes go round a ring, messages wait for one another as in a tree. Arithmetic on "
        "vectors of parameters, which the memory bounds, is left out."
    )
    table = Table(title=title, caption=caption)
    table.add_column("method", no_wrap=True)
    table.add_column("placement")
    for scaling in ("weak", "strong"):
        for count in _SHOWN_DEVICES:
            table.add_column(f"{scaling}, {count}", justify="right")
    table.add_column("in gradient steps, 1 device", justify="right")
    table.add_column(f"of {most}", justify="right")
    yardsticks = {row["placement"]: _by_devices(row) for row in reversed(rows)}  # the gradient step is the first
    for row in rows:
        found, yardstick = _by_devices(row), yardsticks[row["placement"]]
        table.add_row(
            row["method"],
            row["placement"],
            *(f"{found[count][f'{way}_efficiency']:.3f}" for way in ("weak", "strong") for count in _SHOWN_DEVICES),
            *(f"{found[count]['weak_seconds'] / yardstick[count]['weak_seconds']:.2f}" for count in (1, most)),
        )
    return table


def _by_devices(row: Row) -> dict[int, Row]:
    return {prediction["devices"]: prediction for prediction in row["predictions"]}


def draw_against(title: str, varied: str, rows: Sequence[Row]) -> Figure:
    """Draws times over parameters or batches: beside the gradient step's, and beside the floor."""
    panels: Curves = {}
    for heading, unit in (("of the gradient step's", None), ("of the floor", "floor")):
        panels[heading] = {
            name: (
                [row[varied] for row in mine],
                [row["ratio_quartiles"][1] / (row[unit] if unit else 1) for row in mine],
            )
            for name, mine in _by_method([row for row in rows if row["fits"]]).items()
        }
    figure = draw_panels(
        title, panels, varied.replace("_", " "), "time of a step, as a multiple", num_columns=2, log=True
    )
    return _log_x(figure, base=10 if varied == "parameters" else 2)


def draw_orders(title: str, rows: Sequence[Row]) -> Figure:
    """Draws times over Krylov orders, beside the floors: a panel each."""
    panels: Curves = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == family and row["fits"]]
        orders = [row["order"] for row in mine]
        panels[family] = {
            "time": (orders, [row["ratio_quartiles"][1] for row in mine]),
            "FLOPs": (orders, [row["flops_ratio"] for row in mine]),
            "floor": (orders, [row["floor"] for row in mine]),
        }
    figure = draw_panels(title, panels, "products a step", "gradient steps", num_columns=3, log=True)
    return _log_x(figure)


def draw_devices(title: str, rows: Sequence[Row]) -> Figure:
    """Draws times on virtual devices beside those of one that does the same work."""
    panels = _scaling_panels(
        ("strong", "weak"),
        rows,
        lambda row, scaling: ([1, 2, 4], [1.0, *(row[f"{scaling} {count}"][1] for count in (2, 4))]),
    )
    figure = draw_panels(
        title, panels, "devices, on the same cores", "time over one device's, same work", num_columns=2
    )
    return _log_x(figure)


def draw_model(title: str, rows: Sequence[Row]) -> Figure:
    """Draws predicted efficiencies over the number of devices."""

    def curve(row: Row, scaling: str) -> tuple[ArrayLike, ArrayLike]:
        predictions = row["predictions"]
        return [each["devices"] for each in predictions], [each[f"{scaling}_efficiency"] for each in predictions]

    panels = _scaling_panels(("weak", "strong"), rows, curve)
    figure = draw_panels(title, panels, "devices", "efficiency", num_columns=2)
    for panel in figure.axes:
        panel.set_ylim(0, 1.05)
    return _log_x(figure)


def _scaling_panels(
    scalings: Sequence[str], rows: Sequence[Row], curve: Callable[[Row, str], tuple[ArrayLike, ArrayLike]]
) -> Curves:
    """Returns a panel for each way of scaling and placement, with a curve for each method."""
    return {
        f"{scaling} scaling, {placement}": {
            row["method"]: curve(row, scaling) for row in rows if row["placement"] == placement
        }
        for scaling in scalings
        for placement in dict.fromkeys(row["placement"] for row in rows)
    }


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {
        name: [row for row in rows if row["method"] == name] for name in dict.fromkeys(row["method"] for row in rows)
    }


def _log_x(figure: Figure, base: int = 2) -> Figure:
    """Makes the horizontal axes logarithmic, in plain numbers where these are short; the legend needs some width."""
    figure.set_figwidth(max(_LEAST_WIDTH, figure.get_figwidth()))
    for panel in figure.axes:
        panel.set_xscale("log", base=base)
        panel.grid(visible=False, which="minor", axis="x")
        if base == 2:
            panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return figure
