"""What a compiled program does, read from its HLO: matrix products, and collectives."""

import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Traffic(NamedTuple):
    """How many collectives of a kind a program runs, and the bytes of the arrays they deal with."""

    count: float
    num_bytes: float


class Cost(NamedTuple):
    """What one device does while a program runs once.

    Attributes:
      flops: operations of matrix products.
      communication: the traffic of each kind of collective; kinds that the program does not use are left out.
    """

    flops: float = 0.0
    communication: dict[str, Traffic] = {}  # noqa: RUF012  nobody writes to it

    def times(self, number: float) -> "Cost":
        """Returns the cost of so many runs, which may be a fraction."""
        traffic = {kind: Traffic(number * a.count, number * a.num_bytes) for kind, a in self.communication.items()}
        return Cost(number * self.flops, traffic if number else {})


def total(costs: Iterable[Cost]) -> Cost:
    """Returns the sum."""
    costs = list(costs)
    every = [(kind, traffic) for cost in costs for kind, traffic in cost.communication.items()]
    communication = {
        kind: Traffic(*map(sum, zip(*(traffic for other, traffic in every if other == kind), strict=True)))
        for kind in KINDS
        if kind in dict(every)
    }
    return Cost(sum(cost.flops for cost in costs), communication)


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.+?) ([a-z][\w\-]*)\((.*)$", re.MULTILINE)
_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*?\{$(.*?)^\}", re.MULTILINE | re.DOTALL)


def read_cost(hlo: str, loop_limit: int | None = None, branch: Callable[..., Cost] = max) -> Cost:
    """Returns what one device does while the program runs once.

    A collective's bytes are those of the whole array: what an all-gather leaves on each device, what a reduce-scatter
    begins with. A loop's body counts as often as it runs.

    Args:
      hlo: the text of a compiled program, as `compiled.as_text()` gives it on a CPU.
      loop_limit: how often a loop runs whose number of trips XLA does not know.
      branch: `max` or `min`, for the dearer or the cheaper branch of a condition: by bytes, then by operations.

    Returns:
      The cost.

    Raises:
      ValueError: if such a loop has a cost and no limit is given.
    """
    computations = {
        name: [_Instruction(*parts) for parts in _INSTRUCTION.findall(body)]
        for _, name, body in _COMPUTATION.findall(hlo)
    }
    (entry,) = (name for marked, name, _ in _COMPUTATION.findall(hlo) if marked)

    @functools.cache
    def of_computation(name: str) -> Cost:
        shapes = {instruction.name: instruction.shape for instruction in computations[name]}
        return total(of_instruction(instruction, shapes) for instruction in computations[name])

    def of_instruction(instruction: _Instruction, shapes: dict[str, str]) -> Cost:
        called = lambda role: re.findall(rf"\b(?:{role})=%?([\w.\-]+)", instruction.rest)  # noqa: E731
        match instruction.opcode:
            case "dot":
                return Cost(flops=_dot_flops(instruction, shapes))
            case opcode if opcode in KINDS:
                arrays = [instruction.shape, ",".join(shapes[name] for name in _operands(instruction))]
                return Cost(communication={opcode: Traffic(1, max(map(_num_bytes, arrays)))})
            case "while":
                body, condition = (of_computation(*called(role)) for role in ("body", "condition"))
                trips = _num_trips(instruction, loop_limit) if body != Cost() or condition != Cost() else 0
                return total([body.times(trips), condition.times(trips + 1)])
            case "conditional":
                listed = re.search(r"branch_computations=\{(.*?)\}", instruction.rest)
                names = re.findall(r"[\w.\-]+", listed[1]) if listed else called("true_computation|false_computation")
                return branch(map(of_computation, names), key=_size)
            case "call" | "fusion":
                return of_computation(*called("to_apply|calls"))
        return Cost()

    return of_computation(entry)


def _size(cost: Cost) -> tuple[float, float]:
    return sum(traffic.num_bytes for traffic in cost.communication.values()), cost.flops


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])


def _num_trips(loop: _Instruction, limit: int | None) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if known is None and limit is None:
        raise ValueError(f"XLA does not know how often a loop runs, {loop.name}: give a limit.")
    return int(known[1]) if known else limit or 0


def _dot_flops(dot: _Instruction, shapes: dict[str, str]) -> int:
    """Two for each entry of the result and each term of its sum."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)
    ((_, left),) = _arrays(shapes[_operands(dot)[0]])
    ((_, result),) = _arrays(dot.shape)
    terms = [left[int(axis)] for axis in contracted[1].split(",") if axis] if contracted else []
    return 2 * math.prod(result) * math.prod(terms)


def _num_bytes(shape: str) -> int:
    return sum(_num_bits(dtype) * math.prod(sizes) for dtype, sizes in _arrays(shape)) // 8


def _arrays(shape: str) -> list[tuple[str, list[int]]]:
    """Returns dtype and sizes of an array, such as `f32[64,10]{1,0}`, or of a tuple of some."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape)
    return [(dtype, [int(size) for size in sizes.split(",") if size]) for dtype, sizes in found]


def _num_bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8  # pred
