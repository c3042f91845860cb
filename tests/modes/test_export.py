# SPDX-License-Identifier: Apache-2.0
"""Exporting a trained model for programs without this package."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import serialization
from flax.traverse_util import flatten_dict
from jax import export as jax_export

from tests import command
from tests.marks import slow_after
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.modes import export
from trainer.step.state import TrainState
from trainer.trainer import Trainer
from trainer.weights import safetensors

CONFIG = str(command.ROOT / 'configs' / 'mnist_mlp.py')


def train(**options: Any) -> tuple[Trainer, TrainState]:
    small = {
        'train_for': '5 steps', 'checkpoint__every': 'never', 'data__source__limit': 320,
        'evals__test__data__source__limit': 64, 'evals__test__every': 'never',
    }  # fmt: skip
    trainer = Trainer(load_and_build(CONFIG, **{**small, **options}))
    return trainer, trainer.fit().state


def write_export(
    directory: pathlib.Path, trainer: Trainer, state: TrainState, **options: Any
) -> tuple[dict[str, Any], Any]:
    """Returns the content of export.json, and the function as another program reads it."""
    axes = tuple(trainer.set_up().mesh.shape)
    about = export.write(
        trainer.set_up().evaluators['test'], state, epath.Path(directory), axes=axes, **options
    )
    assert json.loads((directory / 'export.json').read_text()) == about
    data = bytearray((directory / 'model.jax_export').read_bytes())
    return about, jax_export.deserialize(data)


def examples(trainer: Trainer) -> np.ndarray:
    return trainer.set_up().evaluators['test'].data.block(0, 1).arrays['image'][0][:64]


RUNS: dict[str, dict[str, Any]] = {
    'batch_stats': {'model__batch_norm': True, 'model__dropout_rate': 0.5},
    'average': {'ema': {'decay': 0.5}, 'evals__test__ema': True},
    'nnx': {'model__target': 'trainer.models.mlp_nnx:MLP', 'model__batch_norm': True},
    'ensemble': {'ensemble': {'size': 3}},
    'cut': {'mesh': {'data': 4, 'model': 2}, 'sharding': ({
        'target': 'trainer.sharding:ByPath',
        'rules': (('Dense_0/kernel', (None, 'model')),),
    },)},
}  # fmt: skip


@pytest.mark.parametrize('name', slow_after(1, RUNS))
def test_predictions_for_any_number_of_rows(name: str, tmp_path: pathlib.Path) -> None:
    """Equal to those of the trainer; the function takes only the fields they depend on."""
    trainer, state = train(**RUNS[name])
    about, function = write_export(tmp_path, trainer, state)
    assert about['arguments'] == ['batch']
    assert about['batch'] == {'image': 'uint8[rows, 28, 28, 1]'}
    assert about['outputs'] == {'class': 'int32[rows]', 'probability': 'float32[rows]'}
    assert function.platforms == ('cpu', 'cuda', 'tpu')
    (expected,) = trainer.predict('test', state)
    images = examples(trainer)
    for rows in (1, 7, 64):
        found = function.call({'image': images[:rows]})
        assert np.array_equal(found['class'], expected['class'][:rows])
        np.testing.assert_allclose(
            found['probability'], expected['probability'][:rows], rtol=1e-4, atol=1e-6
        )


@pytest.mark.slow
def test_variables_are_written_exactly(tmp_path: pathlib.Path) -> None:
    """As msgpack and as safetensors, in their own dtypes; a run can start from both."""
    options = {'precision': {'params': 'bfloat16'}, 'model__batch_norm': True}
    trainer, state = train(**options)
    about, _ = write_export(tmp_path, trainer, state)
    paths = {'/'.join(path): x for path, x in flatten_dict(state.variables).items()}
    assert {str(x.dtype) for x in paths.values()} == {'bfloat16', 'float32'}
    assert set(about['variables']) == set(paths)
    tensors = safetensors.read(tmp_path / 'variables.safetensors')
    tree = serialization.msgpack_restore((tmp_path / 'variables.msgpack').read_bytes())
    for each in (tensors, {'/'.join(path): x for path, x in flatten_dict(tree).items()}):
        assert {path: x.dtype for path, x in each.items()} == {p: x.dtype for p, x in paths.items()}
        assert all(np.array_equal(x, paths[path]) for path, x in each.items())
    template = jax.tree.map(jnp.zeros_like, state.variables)
    again = serialization.from_bytes(template, (tmp_path / 'variables.msgpack').read_bytes())
    jax.tree.map(np.testing.assert_array_equal, again, state.variables)
    for file in ('variables.safetensors', 'variables.msgpack'):
        other = load_and_build(CONFIG, init_from={'path': str(tmp_path / file)}, **options)
        fresh = Trainer(other).init_state()
        jax.tree.map(np.testing.assert_array_equal, fresh.variables, state.variables)


@pytest.mark.slow
def test_large_variables_are_an_argument(tmp_path: pathlib.Path) -> None:
    trainer, state = train()
    about, function = write_export(tmp_path, trainer, state, max_embedded_bytes=1000)
    assert about['arguments'] == ['variables', 'batch']
    assert (tmp_path / 'model.jax_export').stat().st_size < 50_000
    variables = serialization.msgpack_restore((tmp_path / 'variables.msgpack').read_bytes())
    (expected,) = trainer.predict('test', state)
    found = function.call(variables, {'image': examples(trainer)[:7]})
    assert np.array_equal(found['class'], expected['class'][:7])


class Halves(nn.Module):
    """Computes something else for large batches."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(10)(x.reshape(x.shape[0], -1))
        return x if x.shape[0] > 100 else 2 * x


@pytest.mark.slow
def test_a_model_that_computes_with_the_batch_size(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is exported for a single batch size, with a warning."""
    model = {'target': f'{__name__}:Halves'}
    trainer, state = train(model=model, evals__test__data__batch_size=32)
    with caplog.at_level('WARNING', 'trainer'):
        about, function = write_export(tmp_path, trainer, state)
    assert 'only takes batches of 32 examples' in caplog.text
    assert about['batch'] == {'image': 'uint8[32, 28, 28, 1]'}
    expected = next(iter(trainer.predict('test', state)))
    found = function.call({'image': examples(trainer)[:32]})
    assert np.array_equal(found['class'], expected['class'])


class Lookup(nn.Module):
    """Indexes a table by its input."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        table = self.param('table', nn.initializers.normal(), (256, 10))
        return table[jnp.uint8(255 * x[:, 14, 14, 0])]


@pytest.mark.slow
@pytest.mark.parametrize('max_embedded_bytes', [0, export.MAX_EMBEDDED_BYTES])
def test_a_model_that_indexes_a_variable(max_embedded_bytes: int, tmp_path: pathlib.Path) -> None:
    trainer, state = train(model={'target': f'{__name__}:Lookup'})
    about, function = write_export(tmp_path, trainer, state, max_embedded_bytes=max_embedded_bytes)
    assert about['batch'] == {'image': 'uint8[rows, 28, 28, 1]'}
    (expected,) = trainer.predict('test', state)
    variables = [] if max_embedded_bytes else [{'params': jax.device_get(state.params)}]
    found = function.call(*variables, {'image': examples(trainer)[:7]})
    assert np.array_equal(found['class'], expected['class'][:7])


# A process in which nothing can be imported but Python's own modules, these packages, and what
# JAX itself requires.
ALONE = """
import importlib.machinery
import sys
allowed = {{*sys.stdlib_module_names, *{names}}}
allowed |= {{'jaxlib', 'ml_dtypes', 'numpy', 'opt_einsum', 'scipy'}}
class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        there = name.partition('.')[0] in allowed or name.startswith('_sysconfigdata_')
        return super().find_spec(name, path, target) if there else None
machinery = importlib.machinery
sys.meta_path[:] = [machinery.BuiltinImporter, machinery.FrozenImporter, Installed]
for name in ('flax', 'optax', 'orbax', 'etils', 'msgpack', 'trainer'):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f'{{name}} was imported')
"""
CALLER = """
import numpy as np
from jax import export
function = export.deserialize(bytearray(open('model.jax_export', 'rb').read()))
images = np.load('images.npy')
np.save('classes.npy', function.call({'image': images})['class'])
"""


def call_without_package(
    directory: pathlib.Path, names: set[str]
) -> subprocess.CompletedProcess[str]:
    """Runs the caller with only these packages installed."""
    return subprocess.run(
        [sys.executable, '-I', '-c', ALONE.format(names=names) + CALLER],
        cwd=directory, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_on_the_command_line(tmp_path: pathlib.Path) -> None:
    """A process with only the packages in `requires` makes the same predictions."""
    args = (command.MLP, *command.SMALL, f'--workdir={tmp_path}', '--config.train_for=5steps')
    for mode in ('train', 'predict', 'export'):
        finished = command.run(*args, f'--mode={mode}')
        assert finished.code == 0, finished.err
    assert 'outputs: class int32[rows], probability float32[rows]\n' in finished.out
    directory = tmp_path / 'export_5'
    np.save(directory / 'images.npy', examples(Trainer(load_and_build(CONFIG))))
    requires = json.loads((directory / 'export.json').read_text())['requires']
    assert requires == {name: importlib.metadata.version(name) for name in ('jax', 'flatbuffers')}
    called = call_without_package(directory, set(requires))
    assert called.returncode == 0, called.stderr
    with np.load(tmp_path / 'predictions_test_5.npz') as predicted:
        assert np.array_equal(np.load(directory / 'classes.npy'), predicted['class'][:64])
    called = call_without_package(directory, {'jax'})  # All of it is needed.
    assert called.returncode == 1 and "install 'flatbuffers'" in called.stderr


def plain(model: Any, batch: Any) -> jax.Array:
    return (model(batch['image']) ** 2).sum(-1) + batch['label']


@pytest.mark.slow
def test_a_task_without_predict_is_exported_as_the_output_of_its_model(
    tmp_path: pathlib.Path,
) -> None:
    trainer, state = train(task={'ref': f'{__name__}:plain'})
    about, function = write_export(tmp_path, trainer, state)
    assert list(about['batch']) == ['image']
    found = function.call({'image': examples(trainer)})['output']
    (expected,) = trainer.predict('test', state)
    np.testing.assert_allclose(found, expected['output'], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_mistakes(tmp_path: pathlib.Path) -> None:
    trainer, state = train()
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'file/export cannot be written: Not a directory'):
        export.write(
            trainer.set_up().evaluators['test'], state, epath.Path(tmp_path) / 'file' / 'export'
        )
    for given, word in (('cpu,abc', "'abc'"), ('', 'nothing')):
        finished = command.run(command.MLP, '--mode=export', f'--platforms={given}')
        assert finished.code == 2
        assert f'--platforms: expected some of cpu, cuda, rocm, tpu, got {word}' in finished.err
