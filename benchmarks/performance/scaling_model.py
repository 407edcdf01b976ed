"""On paper: the time of a step on many devices, from its operations and its collectives."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.performance.programs import Traffic

_PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 1}
"""How often a collective sends the array's bytes over a ring: an all-reduce is a reduce-scatter and an all-gather."""


class Machine(NamedTuple):
    """What devices and their network do.

    Attributes:
      flops_rate: operations a second of one device.
      bandwidth: bytes a second that each device sends while it receives as many.
      latency: seconds of a message, however short.
    """

    flops_rate: float
    bandwidth: float
    latency: float


class Work(NamedTuple):
    """What an average step of a method does.

    Attributes:
      fixed_flops: operations that no example adds to, such as those with Kronecker factors; of all devices together if
        they share them.
      flops_per_example: operations that each example adds.
      communication: what each device takes part in.
      sharded: whether devices share the fixed operations, as under FSDP, or each does them all.
    """

    fixed_flops: float
    flops_per_example: float
    communication: dict[str, Traffic]
    sharded: bool

    def compute_seconds(self, machine: Machine, num_devices: int, batch_size: float) -> float:
        """Returns the time of a device's operations."""
        fixed = self.fixed_flops / (num_devices if self.sharded else 1)
        return (fixed + self.flops_per_example * batch_size / num_devices) / machine.flops_rate

    def communication_seconds(self, machine: Machine, num_devices: int) -> float:
        r"""Returns the time of the collectives, one after another.

        A ring moves :math:`2 \frac{n-1}{n}` times the bytes of an all-reduce through each device, and half of that in
        the other kinds, which no algorithm betters; messages wait for one another as in a tree, :math:`2 \log_2 n` of
        an all-reduce and half as many of the others.
        """
        seconds = 0.0
        for kind, traffic in self.communication.items():
            transfer = (num_devices - 1) / num_devices * traffic.num_bytes / machine.bandwidth
            messages = math.log2(num_devices) * traffic.count * machine.latency
            seconds += _PASSES[kind] * (transfer + messages)
        return seconds

    def seconds(self, machine: Machine, num_devices: int, batch_size: float) -> float:
        """Returns the time of a step that computes and communicates in turn, and hides neither behind the other."""
        return self.compute_seconds(machine, num_devices, batch_size) + self.communication_seconds(machine, num_devices)

    def weak_efficiency(self, machine: Machine, num_devices: int, batch_per_device: float) -> float:
        """Returns the share of the ideal speed with a batch that grows with the devices."""
        alone = self.seconds(machine, 1, batch_per_device)
        return alone / self.seconds(machine, num_devices, num_devices * batch_per_device)

    def strong_efficiency(self, machine: Machine, num_devices: int, batch_size: float) -> float:
        """Returns the share of the ideal speed with a fixed batch."""
        return self.seconds(machine, 1, batch_size) / (num_devices * self.seconds(machine, num_devices, batch_size))


def make_work(
    flops: Sequence[float], batch_sizes: Sequence[int], communication: dict[str, Traffic], sharded: bool
) -> Work:
    """Returns the work of a step whose operations were counted at two batch sizes: they grow in a straight line."""
    per_example = (flops[1] - flops[0]) / (batch_sizes[1] - batch_sizes[0])
    return Work(flops[0] - per_example * batch_sizes[0], per_example, communication, sharded)


def predict(
    work: Work, machine: Machine, devices: Iterable[int], weak_batch: int, strong_batch: int
) -> list[dict[str, Any]]:
    """Returns times and efficiencies for each number of devices; the batch per device, or that of all, is fixed."""
    return [
        {
            "devices": count,
            "weak_seconds": work.seconds(machine, count, count * weak_batch),
            "weak_efficiency": work.weak_efficiency(machine, count, weak_batch),
            "strong_seconds": work.seconds(machine, count, strong_batch),
            "strong_efficiency": work.strong_efficiency(machine, count, strong_batch),
        }
        for count in devices
    ]
