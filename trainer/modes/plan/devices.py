# SPDX-License-Identifier: Apache-2.0
"""Published memory sizes and speeds of accelerators, which a plan is compared with."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """An accelerator, by its vendor's data sheet (TPU: cloud.google.com/tpu/docs; NVIDIA: SXM).

    Attributes:
        memory: size of its memory in bytes.
        bandwidth: memory bandwidth in bytes per second.
        flops: peak of dense bfloat16 matrix products, per second.
        links: bytes per second to other devices, both directions added.
    """

    memory: float
    bandwidth: float
    flops: float
    links: float


_GIB, _GB, _TERA = 2.0**30, 1e9, 1e12

KINDS = {
    'v4': DeviceKind(32 * _GIB, 1228 * _GB, 275 * _TERA, 300 * _GB),
    'v5e': DeviceKind(16 * _GIB, 819 * _GB, 197 * _TERA, 200 * _GB),
    'v5p': DeviceKind(95 * _GIB, 2765 * _GB, 459 * _TERA, 600 * _GB),
    'v6e': DeviceKind(32 * _GIB, 1640 * _GB, 918 * _TERA, 448 * _GB),
    'a100': DeviceKind(80 * _GIB, 2039 * _GB, 312 * _TERA, 600 * _GB),
    'h100': DeviceKind(80 * _GIB, 3350 * _GB, 989 * _TERA, 900 * _GB),
    'h200': DeviceKind(141 * _GB, 4800 * _GB, 989 * _TERA, 900 * _GB),
    'l4': DeviceKind(24 * _GIB, 300 * _GB, 121 * _TERA, 64 * _GB),
}
