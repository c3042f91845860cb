# SPDX-License-Identifier: Apache-2.0
"""Graphs: a source whose batches are one large graph of static shape, padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .nested import leaves_with_names, map_arrays, map_named

_PARTS = ('nodes', 'edges', 'senders', 'receivers', 'globals')
# Computed here; they may be among the keys of an example, as in `graph._asdict()`.
_COUNTS = ('n_node', 'n_edge')


class GraphsTuple(NamedTuple):
    """Several graphs as one, with the fields of `jraph.GraphsTuple`: its models take this too.

    Attributes:
        nodes: features of all nodes, graph after graph: arrays (nodes, ...), or a tree of them.
        edges: features of all edges, (edges, ...); None if they have none.
        receivers: int32 (edges,), index of the node that an edge ends at.
        senders: int32 (edges,), index of the node that it begins at.
        globals: features of the graphs, (graphs, ...); None if they have none.
        n_node: int32 (graphs,), number of nodes of each graph.
        n_edge: int32 (graphs,), number of edges of each graph.
    """

    nodes: Any
    edges: Any
    receivers: Any
    senders: Any
    globals: Any
    n_node: Any
    n_edge: Any


class GraphSource:
    """Graphs of different sizes, in batches of a few static shapes.

    A batch is a dict: 'graph' is a `GraphsTuple` of batch size + 1 graphs, and each other field of
    the examples, such as a label, is an array (batch size + 1, ...). The last graph is padding: it
    has all nodes and edges that a batch lacks, with zeros as features, as in
    `jraph.pad_with_graphs`. If examples are missing too, as in the last batch of a split, there are
    more graphs of padding: the first of them has all of these nodes, the others none.

    Attributes:
        padding_rows: 1, the graph of padding.
        num_shapes: how many shapes batches may have.
    """

    padding_rows = 1

    def __init__(
        self,
        items: Any,
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        num_shapes: int = 3,
    ):
        """Keeps the graphs.

        Args:
            items: an object with a length and items that are dicts of arrays: 'senders' and
                'receivers', (edges,) integers; 'nodes', (nodes, ...), and if there are any 'edges',
                (edges, ...), and 'globals', each an array or a tree of arrays; everything else is a
                field of the graph, such as a label.
            sizes: shapes of batches, as (nodes, edges) including padding, ascending; for all batch
                sizes of a run. A batch has the first that it fits in. By default they are chosen
                for each batch size from the sizes of all graphs, which are read once, here; then
                every batch fits.
            num_shapes: without `sizes`, how many shapes to choose. More of them waste less on
                padding, and each is compiled.

        Raises:
            ValueError: if there are no graphs, or an argument is out of range.
        """
        if not len(items):
            raise ValueError('the source has no graphs')
        if num_shapes < 1:
            raise ValueError(f'num_shapes: {num_shapes}; expected at least 1')
        if sizes is not None:
            sizes = [(int(nodes), int(edges)) for nodes, edges in sizes]
            if not sizes or sorted(sizes) != sizes:
                raise ValueError(f'sizes: {sizes}; expected pairs (nodes, edges), ascending')
        self.num_shapes = len(sizes) if sizes is not None else num_shapes
        self._items = items
        self._given = sizes
        self._counts: np.ndarray | None = None
        if sizes is None:
            # Now, and not at the first batch, which each thread and worker process would wait for.
            self._counts = np.array([_count(items[i]) for i in range(len(items))])
        # By the number of graphs of a batch.
        self._chosen: dict[int, list[tuple[int, int]]] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Returns one graph, as in the items."""
        return self._items[index]

    def sizes(self, graphs: int) -> list[tuple[int, int]]:
        """Returns the shapes of batches of `graphs` graphs: (nodes, edges) with padding."""
        if self._given is not None:
            return self._given
        if graphs not in self._chosen:
            assert self._counts is not None
            self._chosen[graphs] = choose_sizes(self._counts, graphs, self.num_shapes)
        return self._chosen[graphs]

    def collate(self, examples: list[Mapping[str, Any]], rows: int) -> dict[str, Any]:
        """Returns a batch of `rows` graphs, of which at least the last is padding.

        Raises:
            ValueError: if the graphs do not fit in any of the sizes, or have other fields than the
                first one.
        """
        counts = np.array([_count(example) for example in examples])
        nodes, edges = self._choose(counts.sum(0), rows - self.padding_rows)
        fields = [n for n in examples[0] if n not in (*_PARTS, *_COUNTS)]
        if 'graph' in fields:
            raise ValueError("the field name 'graph' is that of the graph itself; rename the field")
        # Of each graph, and of the padding.
        first = np.concatenate([[0], counts[:, 0].cumsum()]).astype(np.int32)
        # The first place of padding has all nodes and edges of padding.
        padding = np.zeros((rows - len(examples), 2), np.int64)
        padding[0] = (nodes, edges) - counts.sum(0)
        n_node, n_edge = np.concatenate([counts, padding]).astype(np.int32).T
        ends = {
            # Edges of padding begin and end at the first node of padding.
            name: _pad(
                name,
                [
                    np.asarray(e[name], np.int32) + offset
                    for e, offset in zip(examples, first, strict=False)
                ],
                edges,
                fill=first[-1],
            )
            for name in ('senders', 'receivers')
        }
        graph = GraphsTuple(
            nodes=_join(examples, 'nodes', nodes),
            edges=_join(examples, 'edges', edges),
            globals=_join([_with_row(e, 'globals') for e in examples], 'globals', rows),
            n_node=n_node,
            n_edge=n_edge,
            **ends,
        )
        labels = {
            name: _join([_with_row(e, name) for e in examples], name, rows) for name in fields
        }
        return {'graph': graph, **labels}

    def _choose(self, needed: np.ndarray, graphs: int) -> tuple[int, int]:
        """Returns the first size with room for the nodes and edges of a batch."""
        sizes = self.sizes(graphs)
        for nodes, edges in sizes:
            # One node more: the edges of padding need a node to end at.
            if nodes > needed[0] and edges >= needed[1]:
                return nodes, edges
        advice = 'add a larger one, or leave `sizes` out to have them chosen from the data'
        if self._given is None:
            advice = (
                'it was chosen from the items, and a transform has made them larger. Set `sizes`'
            )
        raise ValueError(
            f'a batch has {needed[0]} nodes and {needed[1]} edges, and the largest of `sizes` has '
            f'room for {sizes[-1][0] - 1} and {sizes[-1][1]}: {advice}'
        )


def choose_sizes(counts: np.ndarray, graphs: int, number: int) -> list[tuple[int, int]]:
    """Returns shapes for batches of graphs: (nodes, edges) with padding, ascending.

    The first has room for about 98 of 100 batches of random graphs, the last for any: it has room
    for the largest graphs of all.

    Args:
        counts: (examples, 2), the nodes and edges of each graph.
        graphs: graphs of a batch.
        number: how many shapes.
    """
    # A batch that crosses the border of an epoch may have a graph twice, a large batch more often.
    copies = graphs // len(counts) + 2
    most = np.sort(np.repeat(counts, copies, axis=0), axis=0)[-graphs:].sum(0)
    # Sums of many graphs are almost normal: two standard deviations above the mean. For the sum of
    # a few graphs the largest may be less.
    usual = counts.mean(0) * graphs + 2 * counts.std(0) * np.sqrt(graphs)
    parts = np.linspace(0, 1, number) if number > 1 else [1.0]
    sizes = {
        # More nodes than graphs, padding included: an array with as many entries as graphs is taken
        # to have one for each of them.
        (_round_up(max(nodes + 1, graphs + 2)), _round_up(max(edges, 1)))
        for nodes, edges in (np.minimum(usual + part * (most - usual), most) for part in parts)
    }
    return sorted(sizes)


def _round_up(size: float) -> int:
    """Returns a size of few significant bits, at most a sixteenth larger or 16 more.

    A multiple of 16, so that it divides evenly over devices.
    """
    whole = int(np.ceil(size))
    step = max(16, 1 << max(0, whole.bit_length() - 5))
    return -(-whole // step) * step


def _count(example: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the number of nodes and edges of a graph, after checking them."""
    missing = [name for name in ('nodes', 'senders', 'receivers') if example.get(name) is None]
    if missing:
        raise ValueError(
            f'a graph has no {missing[0]!r}; it is a dict of nodes, senders and receivers, and has '
            f'{", ".join(example)}'
        )
    ends = [np.asarray(example[name]) for name in ('senders', 'receivers')]
    nodes = _lengths(example['nodes'])
    edges = _lengths(example.get('edges')) | {len(x) for x in ends}
    if len(nodes) != 1 or len(edges) != 1:
        raise ValueError(
            f'the arrays of a graph differ in length: {sorted(nodes)} for nodes, {sorted(edges)} '
            'for edges, senders and receivers'
        )
    (num_nodes,), (num_edges,) = nodes, edges
    for x in ends:
        if x.size and not 0 <= x.min() <= x.max() < num_nodes:
            raise ValueError(
                f'an edge of a graph of {num_nodes} nodes ends at node '
                f'{x.max() if x.max() >= num_nodes else x.min()}; expected 0 to {num_nodes - 1}'
            )
    return num_nodes, num_edges


def _lengths(tree: Any) -> set[int]:
    if isinstance(tree, np.ndarray):
        return {len(tree)}
    # Below a key, since a list of numbers is an array there.
    return {len(x) for x in leaves_with_names({'': tree}).values()}


def _with_row(example: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a field of a graph with a leading dimension of 1."""
    value = example.get(name)
    if isinstance(value, np.ndarray | np.generic):
        return {name: np.asarray(value)[None]}
    return map_arrays(lambda x: np.asarray(x)[None], {name: value})


def _join(examples: Sequence[Mapping[str, Any]], name: str, size: int) -> Any:
    """Returns the arrays of all examples, concatenated and padded with zeros to `size` entries."""
    values = [example.get(name) for example in examples]
    if all(isinstance(value, np.ndarray) for value in values):
        return _pad(name, values, size)
    # Below a key, since a list of numbers is an array there.
    trees = [{name: value} for value in values]
    return map_named(lambda path, *arrays: _pad(path, arrays, size), *trees)[name]


def _pad(name: str, arrays: Sequence[Any], size: int, fill: float | str = 0) -> np.ndarray:
    # The dtype of text includes its length, which may differ.
    kinds = {
        (x.dtype.kind if x.dtype.kind in 'SU' else x.dtype, x.shape[1:])
        for x in map(np.asarray, arrays)
    }
    if len(kinds) > 1:
        found = ' and '.join(sorted(f'{dtype} {shape}' for dtype, shape in kinds))
        raise ValueError(
            f'{name!r} is {found} in graphs of one batch; all graphs need one dtype, and one shape '
            'but for the number of nodes and edges'
        )
    whole = np.concatenate(arrays)
    fill = '' if whole.dtype.kind in 'SU' else fill
    padding = np.full((size - len(whole), *whole.shape[1:]), fill, whole.dtype)
    return np.concatenate([whole, padding])
