# SPDX-License-Identifier: Apache-2.0
"""Classes, functions and instances in a config that was made in Python."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax
import pytest

from tests.in_memory import HERE, Net, Points, Task, make_config
from trainer import Trainer, build, load_and_build
from trainer.config.errors import UserError


def local_objects() -> dict[str, Any]:
    """Returns parts of a config that no module has by name, as those of a notebook."""

    class Local(nn.Module):
        width: int
        act: Any = nn.relu

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(2)(self.act(nn.Dense(self.width)(x)))

    def task(model: Any, batch: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(batch['x']), batch['label'])

    return {'model': dict(target=Local, width=8, act=nn.gelu), 'task': dict(ref=task)}


def test_what_a_module_has_is_the_same_config_as_its_name() -> None:
    named = build(make_config()).origin
    config = make_config()
    with config.ignore_type():
        config.model.target, config.task, config.data.source.target = Net, {'target': Task}, Points
        config.optimizer.target = optax.adam
    found = build(config).origin
    assert found.config == named.config
    assert (found.objects, config.model.target) == ((), Net)


def test_objects_of_a_program_train_save_and_resume_in_it(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = local_objects()
    Trainer(build(make_config(**parts)), str(tmp_path / 'run')).fit(max_steps=4)
    printed = capsys.readouterr().out
    assert 'objects      config.model, config.task: of this program, so no command' in printed
    trainer = Trainer(build(make_config(**parts)), str(tmp_path / 'run'))
    result = trainer.fit()
    assert 'resuming from step 4' in capsys.readouterr().out
    assert (result.status, result.step) == ('finished', 8)
    assert trainer.evaluate()['dev']['examples'] == 21
    saved = json.loads((tmp_path / 'run' / 'config.json').read_text())['config']
    name = f'{__name__}:local_objects.<locals>'
    assert saved['task'] == {'ref': f'{name}.task'}
    assert saved['model'] == {
        'target': f'{name}.Local', 'width': 8, 'act': {'ref': 'jax.nn:gelu'}
    }  # fmt: skip
    # The same as a run with files: the names are compared.
    other = make_config(**{**parts, 'task': dict(target=Task)})
    with pytest.raises(UserError, match=r'task\.ref .*local_objects'):
        Trainer(build(other), str(tmp_path / 'run')).fit()


def test_instances_stand_where_a_target_stands() -> None:
    config = make_config(model=Net(width=4), task=Task())
    with config.ignore_type():
        config.data.source = Points(64)
    experiment = build(config)
    assert experiment.origin.config['model'] == {'ref': f'{HERE}:Net(width=4)'}
    assert experiment.origin.objects == ('data.source', 'model', 'task')
    by_name = load_and_build(make_config(), vars__width=4)
    found, expected = (Trainer(each).fit().metrics for each in (experiment, by_name))
    assert found['eval/dev/loss'] == expected['eval/dev/loss']


def test_scores_and_hooks_may_be_functions_alone(tmp_path: pathlib.Path) -> None:
    kinds: list[str] = []
    config = make_config(hooks=dict(seen=lambda event: kinds.append(event.kind)))
    config.evals.dev.score = lambda examples: {'count': len(next(iter(examples.values())))}
    result = Trainer(build(config), str(tmp_path / 'run')).fit()
    assert result.metrics['eval/dev/count'] == 21
    assert {'start', 'eval', 'end'} <= set(kinds)
    saved = json.loads((tmp_path / 'run' / 'config.json').read_text())['config']
    for section in (saved['hooks']['seen'], saved['evals']['dev']['score']):
        assert section['ref'].startswith(f'{__name__}:test_scores_and_hooks')


def test_instances_that_differ_are_different_runs(tmp_path: pathlib.Path) -> None:
    def start(model: Any, **changes: Any) -> None:
        trainer = Trainer(build(make_config(model=model, **changes)), str(tmp_path / 'run'))
        trainer.fit(max_steps=1)

    start(Net(width=4))
    start(Net(width=4))
    with pytest.raises(UserError, match=r'Net\(width=4\).*Net\(width=5\)'):
        start(Net(width=5))


class Activated(nn.Module):
    """A module with a function, and one with many arguments."""

    act: Any
    sizes: tuple[int, ...] = ()
    scale: float = 1.0


def test_the_name_of_an_instance_has_its_arguments() -> None:
    def name(model: Any) -> str:
        return str(build(make_config(model=model)).origin.config['model']['ref'])

    assert name(Net()) == f'{HERE}:Net()'
    # Without the address of the function, and without what is the default.
    found = name(Activated(nn.tanh, scale=float('1.0')))
    assert ' at 0x' not in found
    assert found.startswith(f'{__name__}:Activated(act=') and 'scale' not in found
    one, two = (name(Activated('tanh', sizes=tuple(range(n)))) for n in (100, 101))
    assert one != two and max(len(one), len(two)) < 300


def test_overrides_keep_the_objects_and_their_references() -> None:
    config = make_config()
    width = config.vars.get_ref('width')
    with config.ignore_type():
        config.model = ml_collections.ConfigDict(local_objects()['model'])
        config.model.width = width
    found = load_and_build(config, vars__width=3, optimizer__learning_rate=0.5)
    assert found.origin.config['model']['width'] == 3
    assert found.origin.objects == ('model',)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'optimizer': optax.adam(1e-3)}, r"config\.optimizer: .*dict\(target='optax:adam'"),
        ({'data': Points()}, r'config\.data: .*got Points'),
        ({'model': Net}, r'config\.model: .*class Net; use it as config\.model\.target'),
        (
            {'model': dict(target=Net(width=3))},
            r'config\.model\.target: .*got a Net object; write config\.model = dict\(ref=',
        ),
        ({'seed': np.zeros(20)}, r'config\.seed: .*ndarray'),
        ({'train_for': Net()}, r'config\.train_for'),
    ],
)
def test_an_object_in_the_wrong_place_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(make_config(**changes))
