"""The machines that a run is planned for: nodes, their devices, and what a device does in a second. Pure data."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from personaspace.store.errors import InputError

GiB = 2**30
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": GiB, "TiB": 2**40}


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU; on machines without GPUs, one CPU core with its share of the node's memory."""

    name: str
    """Such as `H100`."""
    kind: Literal["cuda", "cpu"]
    memory_bytes: int
    """What models and states may fill."""
    flops: float
    """FLOP per second at best: dense, in 16 bits."""
    bandwidth: float
    """Bytes per second from its memory at best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One machine."""

    devices: int
    """GPUs; CPU cores where there are none."""
    memory_bytes: int
    """Of the host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """The cluster: like devices on one or more nodes."""

    nodes: tuple[Node, ...]
    device: Device
    source: str
    """Where this comes from: flags, a live cluster, this machine."""

    @property
    def devices(self) -> int:
        """Of all nodes."""
        return sum(node.devices for node in self.nodes)

    def groups(self, size: int) -> int:
        """How many groups of ``size`` devices there are, each within a node where it can be."""
        within = sum(node.devices // size for node in self.nodes)
        return within if any(node.devices >= size for node in self.nodes) else self.devices // size

    def spans_nodes(self, size: int) -> bool:
        """Whether a group of ``size`` devices is more than any node has."""
        return all(node.devices < size for node in self.nodes)

    def describe(self) -> str:
        """In words, such as `2 nodes x 8 H100 of 79.1 GiB`."""
        shapes = sorted({node.devices for node in self.nodes}, reverse=True)
        counts = [sum(node.devices == shape for node in self.nodes) for shape in shapes]
        what = self.device.name if self.device.kind == "cuda" else "CPU cores"
        each = ", ".join(
            f"{count} node{'s' * (count > 1)} x {shape} {what}" for count, shape in zip(counts, shapes, strict=True)
        )
        return f"{each} of {self.device.memory_bytes / GiB:.1f} GiB ({self.source})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What one device does in a second with one model: a stated share of its best, or measured."""

    forward_flops: float
    """FLOP per second in forward passes over whole rollouts."""
    decode_flops: float
    """FLOP per second while decoding."""
    decode_bandwidth: float
    """Bytes of weights and cache per second while decoding."""
    step_seconds: float
    """Seconds that each decoding step takes besides, however many devices share it."""
    step_device_seconds: float
    """Device-seconds of each decoding step, shared by the devices of a generator: a measured step, where the formula
    of FLOP and bytes does not hold."""
    source: str
    """Where this comes from, in words."""


GPUS: dict[str, Device] = {
    # Dense bfloat16 peak and bandwidth by NVIDIA's data sheets (SXM modules); memory as CUDA reports it.
    "A100-40GB": Device(name="A100-40GB", kind="cuda", memory_bytes=int(39.4 * GiB), flops=312e12, bandwidth=1.555e12),
    "A100": Device(name="A100", kind="cuda", memory_bytes=int(79.1 * GiB), flops=312e12, bandwidth=2.039e12),
    "H100": Device(name="H100", kind="cuda", memory_bytes=int(79.1 * GiB), flops=989e12, bandwidth=3.35e12),
    "H200": Device(name="H200", kind="cuda", memory_bytes=int(139.8 * GiB), flops=989e12, bandwidth=4.8e12),
    "B200": Device(name="B200", kind="cuda", memory_bytes=int(178.3 * GiB), flops=2250e12, bandwidth=8.0e12),
    "L40S": Device(name="L40S", kind="cuda", memory_bytes=int(44.4 * GiB), flops=362e12, bandwidth=0.864e12),
    "L4": Device(name="L4", kind="cuda", memory_bytes=int(22.0 * GiB), flops=121e12, bandwidth=0.3e12),
}
"""By the names that Ray gives them."""


def find_gpu(name: str) -> Device | None:
    """A GPU of the table by any name that holds one of its names, such as `NVIDIA H100 80GB HBM3`."""
    known = sorted(GPUS, key=len, reverse=True)
    plain = name.upper().replace("_", "-")
    exact = next((GPUS[key] for key in known if key.upper() == plain), None)
    words = set(re.split(r"[^A-Z0-9]+", plain))
    return exact or next((GPUS[key] for key in known if key in words), None)


def gpu_rates(device: Device, *, peak_share: float, bandwidth_share: float, layers: int) -> Rates:
    """Rates as shares of the device's best."""
    return Rates(
        forward_flops=device.flops * peak_share,
        decode_flops=device.flops * peak_share,
        decode_bandwidth=device.bandwidth * bandwidth_share,
        step_seconds=LAUNCH_SECONDS * layers,
        step_device_seconds=0.0,
        source=f"{peak_share:.0%} of {device.flops / 1e12:.0f} TFLOP/s, {bandwidth_share:.0%} of "
        f"{device.bandwidth / 1e12:.2f} TB/s",
    )


LAUNCH_SECONDS = 0.0006
"""Host's time to launch one layer's kernels in a decoding step of transformers' `generate`. An assumption: 40 to 60
launches of 10 to 15 microseconds; not measured, since no GPU was at hand."""


def parse_bytes(text: str) -> int:
    """Bytes of `80GiB`, `80 GB` or a plain number. Raises InputError naming what is allowed."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = (match[2] or "B") if match else ""
    found = next((size for name, size in _UNITS.items() if name.lower() == unit.lower()), None)
    if match is None or found is None or not math.isfinite(float(match[1])) or float(match[1]) <= 0:
        raise InputError(f"{text!r} is no amount of memory; give one such as 80GiB. Units: {', '.join(_UNITS)}.")
    return int(float(match[1]) * found)
