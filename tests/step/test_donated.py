# SPDX-License-Identifier: Apache-2.0
"""Errors about states that were donated to a later step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small
from tests.marks import slow_after
from trainer.config import traces
from trainer.config.errors import error_notes
from trainer.hooks import Event
from trainer.step.donated import DonatedError, explain

KEPT: list[Any] = []
COPY = r'jax\.tree\.map\(jnp\.copy, state\) on the devices, or jax\.device_get\(state\) on the host'


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    KEPT.clear()


def keep_state(event: Event) -> None:
    """Reads the state that it has kept at an earlier event."""
    KEPT.append(event.state)
    if event.step == 20:
        print(KEPT[0].params['Dense_0']['kernel'].sum())


def keep_event(event: Event) -> None:
    KEPT.append(event)
    if event.step == 20:
        print(KEPT[0].state.params)


def keep_copies(event: Event) -> None:
    KEPT.append(jax.tree.map(jnp.copy, event.state))
    jax.device_get(KEPT[0].params)


def keep_until_the_end(event: Event) -> None:
    KEPT.append(event.state)
    if event.kind == 'end':
        jax.device_get(KEPT[0])


def trainer_with_hook(hook: Callable[[Event], None]) -> Any:
    return small.trainer_in(None, hooks={'keep': {'ref': f'{__name__}:{hook.__name__}'}}, evals={})


@pytest.mark.parametrize('hook', slow_after(1, [keep_state, keep_until_the_end]))
def test_hook_that_keeps_a_state_gets_an_explained_error(hook: Callable[[Event], None]) -> None:
    with pytest.raises(RuntimeError, match='deleted') as raised:
        trainer_with_hook(hook).fit()
    [note] = error_notes(raised.value)
    assert 'a state that a hook or a notebook kept. Each step reuses the memory of' in note
    assert 'jax.tree.map(jnp.copy, state)' in note
    shown = traces.format_traceback(raised.value).splitlines()
    assert shown[-1] == note
    assert any(line.endswith(f'in {hook.__name__}') for line in shown)


def test_hook_that_keeps_an_event_gets_an_explained_error() -> None:
    with pytest.raises(DonatedError, match=f'event.state: the arrays .*were deleted.*{COPY}'):
        trainer_with_hook(keep_event).fit()


@pytest.mark.slow
def test_hook_may_keep_copies() -> None:
    assert trainer_with_hook(keep_copies).fit().status == 'finished'
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(KEPT[0].params))


@pytest.mark.slow
def test_state_of_a_result_is_donated_by_the_next_fit() -> None:
    trainer = small.trainer_in(None)
    result = trainer.fit(max_steps=10)
    state, copy = result.state, jax.tree.map(jnp.copy, result.state)
    assert trainer.evaluate(state)['test']['examples'] == 100
    trainer.fit(max_steps=10)
    with pytest.raises(DonatedError, match=rf'result\.state: .*{COPY}'):
        _ = result.state
    uses: dict[str, Callable[[], Any]] = {
        'evaluate': lambda: trainer.evaluate(state),
        'predict': lambda: next(iter(trainer.predict('test', state))),
        'model': lambda: trainer.model(state),
    }
    for name, use in uses.items():
        with pytest.raises(DonatedError, match=rf'{name}\(state\): .*{COPY}'):
            use()
    assert trainer.evaluate(copy)['test']['examples'] == 100
    # The repr of a result does not need its state.
    assert repr(result).startswith("Result(status='paused', step=10)")


def test_other_errors_get_no_note() -> None:
    for error in (
        RuntimeError('the file has vanished'),
        DonatedError('has been deleted'),
        KeyError(),
    ):
        explain(error)
        assert not hasattr(error, '__notes__')
