"""Tables and pictures of `scale`."""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from numpy.typing import ArrayLike

from benchmarks.core.figures import draw_panels
from benchmarks.core.report import Row, table
from benchmarks.core.statistics import quartiles
from benchmarks.performance.programs import KINDS

Curves = dict[str, dict[str, tuple[ArrayLike, ArrayLike]]]

_SHOWN_DEVICES = (8, 64, 1024)
_BYTES_OF_A_PARAMETER = 4
_LEAST_WIDTH = 9.0  # inches


def ratios_table(content: Row) -> str:
    """Lays out costs in gradient steps."""
    varied, shown = content["varied"], []
    for row in content["rows"]:
        time = ("needs more memory than there is", "", "")
        if row["fits"]:
            median = row["ratio_quartiles"][1]
            time = quartiles(row["ratio_quartiles"]), f"{median / row['floor']:.2f}", f"{1e3 * row['seconds']:.3g}"
        shown.append(
            {
                "method": row["method"],
                varied.replace("_", " "): f"{row[varied]:,}",
                "floor": f"{row['floor']:.2f}",
                "FLOPs": f"{row['flops_ratio']:.3f}",
                **dict(zip(("time", "time / floor", "ms a step"), time, strict=True)),
                "memory MB": f"{row['bytes'] / 1e6:.3g}",
            }
        )
    caption = f"{content['title']}. Floor, FLOPs and time are ratios to the gradient step; time: median of the rounds "
    caption += (
        "(quartiles). FLOPs: of matrix products, from XLA's program. TSO-ALRA: an average step of its first stage, "
    )
    return table(shown, caption + "with its refreshes.")


def devices_table(content: Row) -> str:
    """Lays out times beside those of one device with all of the work."""
    columns = [(scaling, count) for scaling in ("strong", "weak") for count in (2, 4)]
    rows = [
        {"method": row["method"], "placement": row["placement"]}
        | {f"{scaling}, {count} devices": quartiles(row[f"{scaling} {count}"]) for scaling, count in columns}
        for row in content["rows"]
    ]
    batch = content["strong_batch"]
    caption = (
        f"{content['title']}. Time of a step over that of one device that does all of the work. The devices share the "
    )
    caption += (
        "cores, so more of them cannot be faster: what lies above 1 is overhead. Median of the rounds (quartiles). "
    )
    return table(rows, caption + f"Strong: a batch of {batch} in all; weak: of {batch // 2} a device.")


def collectives_table(content: Row) -> str:
    """Lays out how many collectives of each kind a step runs, and of how many bytes, in vectors of all parameters."""
    rows = content["rows"]
    kinds = [kind for kind in KINDS if any(kind in row["communication"] for row in rows)]

    def cell(row: Row, kind: str) -> str:
        traffic, vector = row["communication"].get(kind), _BYTES_OF_A_PARAMETER * row["parameters"]
        return f"{traffic['count']:.4g}: {traffic['num_bytes'] / vector:.3f}" if traffic else "-"

    caption = (
        f"Communicated in a step, {rows[0]['parameters']:,} parameters: how many collectives, of how many bytes, 1 "
    )
    caption += "being a vector of all parameters. From XLA's programs for 4 CPU devices; loops by their iterations, "
    caption += (
        "TSO-ALRA's refreshes by how often they are. XLA for CPUs has no reduce-scatter: where there is one, FSDP's "
    )
    caption += "all-reduces send half as much."
    shown = [
        {"method": row["method"], "placement": row["placement"]} | {k: cell(row, k) for k in kinds} for row in rows
    ]
    return table(shown, caption)


def model_table(content: Row) -> str:
    """Lays out predicted efficiencies, and times beside the gradient step's."""
    most, rows = _SHOWN_DEVICES[-1], content["rows"]
    yardsticks = {row["placement"]: _by_devices(row) for row in reversed(rows)}  # the gradient step is the first

    def shown(row: Row) -> dict[str, str]:
        found, yardstick = _by_devices(row), yardsticks[row["placement"]]
        ways = [(way, count) for way in ("weak", "strong") for count in _SHOWN_DEVICES]
        ratio = {count: found[count]["weak_seconds"] / yardstick[count]["weak_seconds"] for count in (1, most)}
        efficiencies = {f"{way}, {count}": f"{found[count][f'{way}_efficiency']:.3f}" for way, count in ways}
        times = {"in gradient steps, 1 device": f"{ratio[1]:.2f}", f"of {most}": f"{ratio[most]:.2f}"}
        return {"method": row["method"], "placement": row["placement"], **efficiencies, **times}

    caption = f"{content['title']}. Efficiency: the share of the ideal speed. Weak: {content['weak_batch']} examples a "
    caption += (
        f"device; strong: {content['strong_batch']} in all. In gradient steps: the time of a step over the gradient "
    )
    caption += (
        "step's, weak, on as many devices. Computing and communicating take turns; bytes go round a ring, messages "
    )
    caption += (
        "wait for one another as in a tree. Arithmetic on vectors of parameters, which the memory bounds, is left out."
    )
    return table(map(shown, rows), caption)


def _by_devices(row: Row) -> dict[int, Row]:
    return {prediction["devices"]: prediction for prediction in row["predictions"]}


def draw_against(content: Row) -> Figure:
    """Draws times over parameters or batches: beside the gradient step's, and beside the floor."""
    varied, panels = content["varied"], dict[str, dict[str, tuple[ArrayLike, ArrayLike]]]()
    for heading, unit in (("of the gradient step's", None), ("of the floor", "floor")):
        panels[heading] = {
            name: (
                [row[varied] for row in mine],
                [row["ratio_quartiles"][1] / (row[unit] if unit else 1) for row in mine],
            )
            for name, mine in _by_method([row for row in content["rows"] if row["fits"]]).items()
        }
    figure = draw_panels(
        content["title"], panels, varied.replace("_", " "), "time of a step, as a multiple", num_columns=2, log=True
    )
    return _log_x(figure, base=10 if varied == "parameters" else 2)


def draw_orders(content: Row) -> Figure:
    """Draws times over Krylov orders, beside the floors: a panel each."""
    panels, rows = dict[str, dict[str, tuple[ArrayLike, ArrayLike]]](), content["rows"]
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == family and row["fits"]]
        orders = [row["order"] for row in mine]
        panels[family] = {
            "time": (orders, [row["ratio_quartiles"][1] for row in mine]),
            "FLOPs": (orders, [row["flops_ratio"] for row in mine]),
            "floor": (orders, [row["floor"] for row in mine]),
        }
    figure = draw_panels(content["title"], panels, "products a step", "gradient steps", num_columns=3, log=True)
    return _log_x(figure)


def draw_devices(content: Row) -> Figure:
    """Draws times on virtual devices beside those of one that does the same work."""
    panels = _scaling_panels(
        ("strong", "weak"),
        content["rows"],
        lambda row, scaling: ([1, 2, 4], [1.0, *(row[f"{scaling} {count}"][1] for count in (2, 4))]),
    )
    figure = draw_panels(
        content["title"], panels, "devices, on the same cores", "time over one device's, same work", num_columns=2
    )
    return _log_x(figure)


def draw_model(content: Row) -> Figure:
    """Draws predicted efficiencies over the number of devices."""

    def curve(row: Row, scaling: str) -> tuple[ArrayLike, ArrayLike]:
        predictions = row["predictions"]
        return [each["devices"] for each in predictions], [each[f"{scaling}_efficiency"] for each in predictions]

    panels = _scaling_panels(("weak", "strong"), content["rows"], curve)
    figure = draw_panels(content["title"], panels, "devices", "efficiency", num_columns=2)
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
