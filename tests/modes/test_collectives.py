# SPDX-License-Identifier: Apache-2.0
"""Collectives parsed from a program's text, in each form that XLA writes groups."""

from __future__ import annotations

import pytest

from trainer.modes.plan import collectives
from trainer.modes.plan.collectives import Collective

MESH = {'data': 2, 'fsdp': 2, 'model': 2}
TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: f32[4,8]) -> f32[4,8] {
  ROOT %g = f32[4,8]{1,0} all-gather(%p), replica_groups=[4,2]<=[8], dimensions={0}
}

%body (x: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %r = f32[4,8]{1,0} all-reduce(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %c = f32[4,8]{1,0} call(%r), to_apply=%inner
}

%condition (x: (s32[], f32[4,8])) -> pred[] {
  ROOT %less = pred[] compare(%x, %x), direction=LT
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %w = (s32[], f32[4,8]) while(%x), condition=%condition, body=%body, backend_config={TRIPS}
  %s = bf16[2,8]{1,0} reduce-scatter(%w), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %t = (f32[4], s8[2]) all-reduce(%a, %b), replica_groups={{0,1,2,3},{4,5,6,7}}
}
"""


def test_collectives_in_loops_count_once_per_iteration() -> None:
    text = TEXT.replace('TRIPS', '{"known_trip_count":{"n":"20"}}')
    found, complete = collectives.find(text, MESH)
    assert complete
    assert {(c.kind, c.axes): (c.group, c.count, c.nbytes) for c in found} == {
        ('all-reduce', ('data',)): (2, 20, 20 * 128),
        ('all-gather', ('model',)): (2, 20, 20 * 128),
        ('reduce-scatter', ('data',)): (2, 1, 2 * 32),
        ('all-reduce', ('fsdp', 'model')): (4, 1, 18),
    }
    assert [c.nbytes for c in found] == sorted((c.nbytes for c in found), reverse=True)


def test_a_loop_of_unknown_length_is_reported() -> None:
    found, complete = collectives.find(TEXT.replace('TRIPS', '{}'), MESH)
    assert not complete
    assert max(c.count for c in found) == 1


@pytest.mark.parametrize(
    ('text', 'group'),
    [
        ('replica_groups={{0,2},{1,3}}', [0, 2]),
        ('replica_groups=[2,4]<=[8]', [0, 1, 2, 3]),
        ('replica_groups=[4,2]<=[2,4]T(1,0)', [0, 4]),
        ('replica_groups=[2,4]<=[2,2,2]T(1,0,2)', [0, 1, 4, 5]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [0, 1]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
        ('source_target_pairs={{0,0},{1,3},{3,1}}', [1, 3]),
        ('replica_groups={}', list(range(8))),
    ],
)
def test_groups(text: str, group: list[int]) -> None:
    line = f'%x = f32[2] all-reduce(%y), channel_id=1, {text}, use_global_device_ids=true'
    assert collectives.devices_of_group(line, MESH) == group


def test_bytes_sent_by_ring_collectives() -> None:
    def sent_bytes(kind: str) -> float:
        return Collective(kind=kind, axes=('data',), group=4, count=1, nbytes=400).sent_bytes

    assert (sent_bytes('all-reduce'), sent_bytes('all-gather'), sent_bytes('reduce-scatter')) == (
        600,
        300,
        300,
    )
    assert sent_bytes('collective-permute') == 400
