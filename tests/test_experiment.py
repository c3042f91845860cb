# SPDX-License-Identifier: Apache-2.0
"""An experiment from a ConfigDict, without a file."""

from __future__ import annotations

import json
import pathlib
import types
from typing import Any

import ml_collections
import pytest

from tests.command import ROOT
from tests.in_memory import make_config
from trainer import Trainer, build, load_and_build
from trainer.config.errors import UserError

CONFIG = ROOT / 'configs' / 'mnist_mlp.py'


def test_a_config_dict_is_built_and_stays_as_it_is() -> None:
    config = make_config()
    before = config.to_json()
    experiment = build(config.lock())
    assert experiment.training.total_steps == 8
    assert experiment.origin.path is None
    assert config.to_json() == before


def test_overrides_change_a_copy_of_the_config_with_its_references() -> None:
    config = make_config()
    before = config.to_json()
    experiment = load_and_build(config, vars__width=3, optimizer__learning_rate=0.5)
    assert experiment.origin.config['model']['width'] == 3
    assert experiment.origin.config['optimizer']['learning_rate'] == 0.5
    assert config.to_json() == before


def test_a_file_and_its_config_dict_give_the_same_experiment() -> None:
    from trainer.configs.mnist_mlp import get_config

    of_file, of_path = load_and_build(str(CONFIG)), load_and_build(CONFIG)
    assert of_file.origin.config == of_path.origin.config == build(get_config()).origin.config


def test_a_run_of_a_config_dict_resumes_in_its_work_directory(tmp_path: pathlib.Path) -> None:
    workdir = str(tmp_path / 'run')
    Trainer(build(make_config()), workdir).fit(max_steps=4)
    result = Trainer(build(make_config()), workdir).fit()
    assert (result.status, result.step) == ('finished', 8)
    saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert saved['config']['model']['width'] == 8
    with pytest.raises(UserError, match=r'optimizer\.learning_rate'):
        Trainer(load_and_build(make_config(), optimizer__learning_rate=0.5), workdir).fit()


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'model': 1}, r'got a dict; convert it: ml_collections\.ConfigDict\(config\)'),
        ('configs/mnist.py', r"for a file, write load_and_build\('configs/mnist\.py'\)"),
        (None, 'expected an ml_collections.ConfigDict, got a NoneType'),
    ],
)
def test_anything_else_is_refused_with_a_sentence(config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(config)


def test_a_config_dict_is_checked_like_a_file() -> None:
    config = make_config()
    config.optimiser = dict(target='optax:sgd')
    with pytest.raises(UserError, match=r'Did you mean config\.optimizer'):
        build(config)
    config = make_config()
    config.vars.unused = 1
    with pytest.raises(UserError, match=r'config\.vars\.unused is not used'):
        build(config)
    config = make_config()
    config.vars.inner = config
    with pytest.raises(UserError, match='a dict of the config contains itself'):
        build(ml_collections.ConfigDict(config))


def test_the_mappings_of_an_experiment_are_read_only() -> None:
    experiment = load_and_build('mnist')
    for mapping in (
        experiment.origin.schedule_steps,
        experiment.evals,
        experiment.logging.captures,
        experiment.hooks,
        experiment.hook_rules,
        experiment.model.modes,
    ):
        assert type(mapping) is types.MappingProxyType
