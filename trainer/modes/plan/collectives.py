# SPDX-License-Identifier: Apache-2.0
"""Collective operations of a compiled program, parsed from its HLO text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')

# Text and not an API: the compiled program has no public object form. tests/test_compat.py checks
# the format with the installed XLA.
_OPERATION = re.compile(rf'= (.*?) ({"|".join(KINDS)})\(')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_CALLED = re.compile(
    r'(?:calls|to_apply|body|condition|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)'
)
_TRIPS = re.compile(r'known_trip_count\D*?(\d+)')
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_LISTED = re.compile(r'replica_groups=\{\{([\d,]*)\}')
_IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_NAMED = re.compile(
    r'replica_groups=mesh\[([^\]]*)\]'
    r'(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}'
)
_PAIRS = re.compile(r'source_target_pairs=\{(.*?)\}\}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All operations of one kind over the same mesh axes.

    Attributes:
        kind: one of `KINDS`.
        axes: mesh axes that the devices of a group span.
        group: number of devices in a group.
        count: operations per step; those in a loop count once per iteration.
        nbytes: bytes per step of the arrays that a group communicates, each at its full size.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    nbytes: int

    @property
    def sent_bytes(self) -> float:
        """Bytes per step that a device sends, assuming ring collectives."""
        if self.kind == 'collective-permute':
            return float(self.nbytes)
        # In a ring each device passes on all shards but one. An all-reduce does so twice: it
        # reduces, then gathers.
        once = self.nbytes * (self.group - 1) / self.group
        return 2 * once if self.kind == 'all-reduce' else once


def find(text: str, mesh: Mapping[str, int]) -> tuple[list[Collective], bool]:
    """Returns the collectives of a program, largest first, and whether all counts are exact.

    They are not exact if the compiler does not know the length of a loop, which then counts as one
    iteration.

    Args:
        text: a compiled program, from `jax.stages.Compiled.as_text()`.
        mesh: axis sizes, in the order of the devices.
    """
    # Loop bodies and branches are computations of their own, which the operations of others call by
    # name.
    bodies = dict(_computations(text))
    entry = next(name for name, (is_entry, _) in bodies.items() if is_entry)
    counts: collections.Counter[tuple[str, tuple[str, ...], int]] = collections.Counter()
    sizes: collections.Counter[tuple[str, tuple[str, ...], int]] = collections.Counter()
    complete = True

    def visit(name: str, times: int) -> None:
        nonlocal complete
        for line in bodies[name][1]:
            if operation := _OPERATION.search(line):
                result, kind = operation.groups()
                group = devices_of_group(line, mesh)
                key = (kind, _axes(group, mesh), len(group))
                counts[key] += times
                # The text has the shape of the result, which for reduce-scatter is one shard.
                num_shards = len(group) if kind == 'reduce-scatter' else 1
                sizes[key] += times * num_shards * _nbytes(result)
            inner = times
            if ' while(' in line:
                trips = _TRIPS.search(line)
                # XLA annotates a loop with its trip count only if that is a constant.
                complete &= trips is not None
                inner *= int(trips[1]) if trips else 1
            for called in _CALLED.findall(line):
                for callee in re.findall(r'%([\w.\-]+)', called):
                    visit(callee, inner)

    visit(entry, 1)
    result = [
        Collective(kind=kind, axes=axes, group=group, count=count, nbytes=sizes[kind, axes, group])
        for (kind, axes, group), count in counts.items()
        if group > 1  # A group of one device communicates nothing.
    ]
    return sorted(result, key=lambda c: -c.nbytes), complete


def devices_of_group(line: str, mesh: Mapping[str, int]) -> list[int]:
    """Returns the first device group of an operation, as flat indices into the mesh.

    XLA writes groups in several forms, depending on its version and the operation: as a list,
    as an iota with a transposition, as named mesh axes, or as source-target pairs.

    Args:
        line: the operation's line of HLO text.
        mesh: axis sizes, in the order of the devices.
    """
    if listed := _LISTED.search(line):
        return _numbers(listed[1])
    if iota := _IOTA.search(line):
        groups = _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
        return [int(i) for i in groups[0]]
    if named := _NAMED.search(line):
        axes = re.findall(r"'([^']+)'=(\d+)", named[1])
        shape = [int(size) for _, size in axes]
        devices = np.arange(math.prod(shape)) if named[2] is None else _iota(named[2], named[3])
        group_axes = re.findall(r"'([^']+)'", named[4])
        index = tuple(slice(None) if axis in group_axes else 0 for axis, _ in axes)
        return [int(i) for i in devices.reshape(shape)[index].ravel()]
    if pairs := _PAIRS.search(line):
        # Pairs of a device with itself move nothing; any other pair shows the axis.
        moves = [(int(a), int(b)) for a, b in re.findall(r'(\d+),(\d+)', pairs[1])]
        return list(next(((a, b) for a, b in moves if a != b), ()))
    # No groups means one group of all devices.
    return list(range(math.prod(mesh.values())))


def _computations(text: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    """Yields each computation's name, whether it is the program's entry, and its lines."""
    name, is_entry = '', False
    lines: list[str] = []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, is_entry, lines = header[2], bool(header[1]), []
        elif line.startswith('}') and name:
            yield name, (is_entry, lines)
            name = ''
        elif name:
            lines.append(line)


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Returns the device numbers that HLO writes as `<=[shape]T(order)`, flat."""
    numbers = _numbers(shape)
    devices = np.arange(math.prod(numbers)).reshape(numbers)
    return (devices.transpose(_numbers(order)) if order else devices).ravel()


def _axes(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the coordinates of the group's devices differ."""
    # Devices are numbered in the order of the mesh, so their coordinates follow from its shape.
    coordinates = np.array(np.unravel_index(group, tuple(mesh.values())))
    return tuple(name for name, row in zip(mesh, coordinates, strict=True) if len(set(row)) > 1)


def _nbytes(shape: str) -> int:
    return sum(
        _itemsize(dtype) * math.prod(_numbers(dims)) for dtype, dims in _ARRAY.findall(shape)
    )


def _itemsize(dtype: str) -> int:
    bits = re.search(r'\d+', dtype)
    # The number in a dtype is its bits ('f32', 'bf16', 's8'); 'pred' has none, and takes a byte.
    return max(1, int(bits[0]) // 8) if bits else 1


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(',') if number]
