# SPDX-License-Identifier: Apache-2.0
"""Nested targets of an optimizer: what is below a node, and which argument a key path is."""

from __future__ import annotations

from typing import Any

from trainer.builders import nodes

SGD: dict[str, Any] = {'target': 'optax:sgd', 'args': (0.1,), 'momentum': 0.9}
CHAIN: dict[str, Any] = {'target': 'optax:chain', 'args': (SGD, [1])}


def test_a_walk_visits_each_node_before_what_is_below_it() -> None:
    found = [keys for keys, _ in nodes.walk(CHAIN)]
    assert found[:4] == [[], ['target'], ['args'], ['args', 0]]
    assert found[4:] == [
        ['args', 0, 'target'], ['args', 0, 'args'], ['args', 0, 'args', 0],
        ['args', 0, 'momentum'], ['args', 1], ['args', 1, 0],
    ]  # fmt: skip


def test_arguments_are_named_by_position_or_by_name() -> None:
    known, names = nodes.parameters(SGD, 'config.optimizer')
    assert names == {('args', 0): 'learning_rate', ('momentum',): 'momentum'}
    assert 'nesterov' in known


def test_an_argument_belongs_to_the_target_around_it() -> None:
    assert nodes.owner(['args', 0, 'args', 0]) == ['args', 0]
    assert nodes.owner(['args', 0, 'momentum']) == ['args', 0]
    assert nodes.owner(['learning_rate']) == []
