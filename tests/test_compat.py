# SPDX-License-Identifier: Apache-2.0
"""Tests of each function of trainer/compat.py with the real libraries."""

from __future__ import annotations

import ast
import errno
import functools
import http.server
import inspect
import json
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import clu.metrics
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from trainer import compat
from trainer.checkpoint import writing
from trainer.checkpoint.manager import Checkpoints
from trainer.checkpoint.retention import Retention
from trainer.modes.plan import collectives

from .command import ROOT

_COORDINATED = """
import json, sys
import jax
from trainer import compat

assert compat.coordination_client() is None and compat.coordinator_address() == ''
jax.distributed.initialize(sys.argv[1], 1, 0)
client = compat.coordination_client()
client.key_value_set('key', 'value')
client.key_value_set_bytes('bytes', b'\\0\\1')
content = client.blocking_key_value_get_bytes('bytes', 1000)
client.key_value_delete('bytes')
try:
    client.blocking_key_value_get_bytes('bytes', 10)
except Exception as error:
    is_timeout = compat.is_timeout(error)
found = [client.blocking_key_value_get('key', 1000), content == b'\\0\\1', is_timeout]
print(json.dumps([found, compat.coordinator_address()]))
"""


def error_of(call: Callable[[], Any]) -> Exception:
    """Returns the error that a call raises."""
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def test_every_function_has_its_test() -> None:
    functions = [
        name
        for name, function in inspect.getmembers(compat, inspect.isfunction)
        if function.__module__ == compat.__name__ and name[0] != '_'
    ]
    assert len(functions) > 20
    tests = ''.join(file.read_text() for file in (ROOT / 'tests').glob('test_compat*.py'))
    assert not [name for name in functions if not re.search(rf'compat\.{name}\b', tests)]


# ---- jax ---------------------------------------------------------------------------------------


@functools.cache
def coordination_value() -> tuple[str, str, str]:
    """Returns a value of the coordination service, its address, and the one that was given."""
    with http.server.HTTPServer(('localhost', 0), http.server.BaseHTTPRequestHandler) as server:
        address = f'localhost:{server.server_port}'
    command = [sys.executable, '-c', _COORDINATED, address]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return (*json.loads(done.stdout.splitlines()[-1]), address)


def test_coordination_client() -> None:
    assert coordination_value()[0][:2] == ['value', True]


def test_is_timeout() -> None:
    assert coordination_value()[0][2]
    assert not compat.is_timeout(ValueError('UNAVAILABLE'))


def test_coordinator_address() -> None:
    _, found, given = coordination_value()
    assert found == given


class _Metadata(http.server.BaseHTTPRequestHandler):
    """Answers like the metadata server of a TPU VM in a slice with three hosts."""

    def do_GET(self) -> None:
        name = self.path.rpartition('/')[2]
        hosts = 'a:0:10.0.0.1,b:1:10.0.0.2,c:2:10.0.0.3'
        text = {'agent-worker-number': '1', 'worker-network-endpoints': hosts}.get(name, "X: '1'")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Writes nothing to the screen."""


@pytest.fixture
def metadata_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(('localhost', 0), _Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f'localhost:{server.server_port}'
        server.shutdown()
        thread.join()


def test_tpu_vm_processes(metadata_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.tpu_vm_processes() == 1
    for name in ('TPU_SKIP_MDS_QUERY', 'MEGASCALE_NUM_SLICES', 'MEGASCALE_COORDINATOR_ADDRESS'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('GCE_METADATA_IP', metadata_server)
    monkeypatch.setattr('jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm', True)
    assert compat.tpu_vm_processes() == 3


def memory_error() -> Exception:
    return error_of(lambda: jax.block_until_ready(jnp.zeros((2**48,), jnp.float32)))


def test_is_out_of_memory() -> None:
    error = memory_error()
    assert isinstance(error, jax.errors.JaxRuntimeError)
    assert compat.is_out_of_memory(error)
    assert not compat.is_out_of_memory(ValueError('no'))


def test_runtime_reason() -> None:
    assert compat.runtime_reason(memory_error()).startswith('Out of memory')
    assert compat.runtime_reason(ValueError()) == ''


def test_is_deleted_array() -> None:
    x = jnp.ones(3)
    x.delete()
    for call in (lambda: np.asarray(x), lambda: jax.jit(lambda x: x + 1)(x), lambda: x + 1):
        assert compat.is_deleted_array(error_of(call))
    donated = jnp.ones(3)
    jax.jit(lambda x: x + 1, donate_argnums=0)(donated)
    assert compat.is_deleted_array(error_of(lambda: np.asarray(donated)))
    assert not compat.is_deleted_array(ValueError('no'))


def mesh(*axes: str) -> jax.sharding.Mesh:
    auto = (AxisType.Auto,) * len(axes)
    return jax.make_mesh((1,) * len(axes), axes, axis_types=auto, devices=jax.devices()[:1])


def test_unknown_mesh_axis() -> None:
    def constrain(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, PartitionSpec('model'))

    with jax.set_mesh(mesh('data')):
        error = error_of(lambda: jax.eval_shape(constrain, jnp.ones(2)))
    assert compat.unknown_mesh_axis(error) == 'model'
    assert compat.unknown_mesh_axis(ValueError('no')) is None


def test_unbound_axis() -> None:
    error = error_of(lambda: jax.eval_shape(lambda x: jax.lax.pmean(x, 'batch'), jnp.ones(2)))
    assert compat.unbound_axis(error) == 'batch'
    assert compat.unbound_axis(NameError('no')) is None


def test_rank_mismatch() -> None:
    sharding = NamedSharding(mesh('a', 'b'), PartitionSpec('a', 'b'))

    def constrain(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, sharding)

    spec, rank = (
        compat.rank_mismatch(error_of(lambda: jax.eval_shape(constrain, jnp.ones(2)))) or ()
    )
    assert "'a', 'b'" in spec and rank == 1
    assert compat.rank_mismatch(ValueError('no')) is None


def test_refuses_type() -> None:
    class Odd:
        """No array."""

    for call in (lambda: jnp.sin(Odd()), lambda: jax.jit(lambda x: x)(Odd())):
        assert compat.refuses_type(error_of(call), Odd)
    assert not compat.refuses_type(TypeError('no'), Odd)


def test_is_frames_note() -> None:
    def fail(x: jax.Array) -> jax.Array:
        raise ValueError('no')

    before = jax.config.jax_traceback_filtering
    jax.config.update('jax_traceback_filtering', 'quiet_remove_frames')
    try:
        (note,) = error_of(lambda: jax.jit(fail)(1.0)).__notes__
    finally:
        jax.config.update('jax_traceback_filtering', before)
    assert compat.is_frames_note(note)
    assert not compat.is_frames_note('a note of a user')


def test_name_stack() -> None:
    def double_in_scope(x: jax.Array) -> jax.Array:
        with jax.named_scope('outer'), jax.named_scope('inner'):
            return x * 2

    (equation,) = jax.make_jaxpr(double_in_scope)(1.0).eqns
    assert compat.name_stack(equation) == 'outer/inner'
    backward = jax.make_jaxpr(jax.grad(lambda x: double_in_scope(x) ** 2))(1.0).eqns
    assert any('transpose(jvp(outer))' in compat.name_stack(each) for each in backward)


def test_is_initializer() -> None:
    made = (nn.initializers.lecun_normal(), jax.nn.initializers.normal(), nn.initializers.zeros)
    for initializer in (*made, jax.nn.initializers.ones, nn.initializers.zeros_init()):
        assert compat.is_initializer(initializer)
    for other in (nn.relu, jnp.ones, 'zeros', None):
        assert not compat.is_initializer(other)


# ---- optax and clu -----------------------------------------------------------------------------


def update(tx: Any, **more: Any) -> Callable[[], Any]:
    params = {'w': jnp.ones(2)}
    return lambda: tx.update(params, tx.init(params), params, **more)


def test_missing_arguments() -> None:
    error = error_of(update(optax.contrib.reduce_on_plateau()))
    assert compat.missing_arguments(error) == 'value'
    error = error_of(update(optax.scale_by_backtracking_linesearch(3)))
    assert compat.missing_arguments(error) == 'value, grad, and value_fn'
    assert compat.missing_arguments(ValueError('no')) is None


def test_refused_argument() -> None:
    error = error_of(update(optax.scale_by_adam(), value=1.0))
    assert compat.refused_argument(error) == 'value'
    assert compat.refused_argument(ValueError('no')) is None


def test_is_optax_error() -> None:
    tx = optax.adam(0.1)
    state = tx.init({'w': jnp.ones(2)})
    assert compat.is_optax_error(error_of(lambda: tx.update({'v': jnp.ones(2)}, state)))

    def fail(count: Any) -> Any:
        raise ValueError('no')

    assert not compat.is_optax_error(error_of(update(optax.scale_by_schedule(fail))))


def test_is_reduction_counter() -> None:
    kind = clu.metrics.Collection.create(loss=clu.metrics.Average.from_output('loss'))
    fields = [name for name in vars(kind.empty()) if not compat.is_reduction_counter(name)]
    assert fields == ['loss'] and len(vars(kind.empty())) == 2


# ---- orbax and tensorstore ---------------------------------------------------------------------


def save_step(directory: pathlib.Path) -> epath.Path:
    """Returns the directory of a saved step."""
    checkpoints = Checkpoints(directory, Retention())
    checkpoints.save(3, {'w': jnp.ones(2)}, {})
    checkpoints.close()
    return epath.Path(directory) / '3'


def test_is_orbax_committed(tmp_path: pathlib.Path) -> None:
    assert compat.is_orbax_committed(save_step(tmp_path))
    assert not compat.is_orbax_committed(epath.Path(tmp_path))


def test_orbax_step_metadata(tmp_path: pathlib.Path) -> None:
    assert compat.orbax_step_metadata(save_step(tmp_path)).is_file()


def test_orbax_step_metadata_fields(tmp_path: pathlib.Path) -> None:
    metadata = json.loads(compat.orbax_step_metadata(save_step(tmp_path)).read_text())
    objects, times = compat.orbax_step_metadata_fields()
    assert all(isinstance(metadata[name], dict) for name in objects)
    assert all(isinstance(metadata[name], int) for name in times)


def test_is_orbax_tree(tmp_path: pathlib.Path) -> None:
    directory = epath.Path(tmp_path) / 'tree'
    for ocdbt in (True, False):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
            checkpointer.save(directory, {'w': np.ones(2)}, force=True)
        assert compat.is_orbax_tree(directory)
    assert not compat.is_orbax_tree(directory.parent)


def test_is_orbax_array(tmp_path: pathlib.Path) -> None:
    directory = epath.Path(tmp_path) / 'array'
    with ocp.Checkpointer(ocp.ArrayCheckpointHandler()) as checkpointer:
        checkpointer.save(directory, np.ones(2))
    assert compat.is_orbax_array(directory)
    assert not compat.is_orbax_array(directory.parent)


def test_async_options() -> None:
    assert ocp.AsyncOptions().create_directories_asynchronously is True
    assert compat.async_options().create_directories_asynchronously is False


def test_commit_future(tmp_path: pathlib.Path) -> None:
    async def write() -> None:
        (tmp_path / 'written').write_text('')

    compat.commit_future(write(), 'test').result(timeout=60)
    assert (tmp_path / 'written').exists()


def test_orbax_asks_the_manager_whether_it_is_preempted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overriding a public method keeps Orbax from asking JAX, see trainer/checkpoint/writing.py."""

    def fail(step: int) -> bool:
        raise AssertionError(step)

    monkeypatch.setattr(ocp.utils, 'reached_preemption', fail)
    manager = writing.open_manager(epath.Path(tmp_path), None)
    assert manager.should_save(1)
    manager.close()


def tensorstore_error(directory: pathlib.Path) -> Exception:
    """Returns the error of a write to a path below a file."""
    (directory / 'file').write_text('')
    spec = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': f'{directory}/file/x/'}}
    kind = {'dtype': tensorstore.float32, 'shape': [1], 'create': True}
    return error_of(lambda: tensorstore.open(spec, **kind).result())


def test_os_error_number(tmp_path: pathlib.Path) -> None:
    assert compat.os_error_number(tensorstore_error(tmp_path)) == errno.ENOTDIR
    assert compat.os_error_number(OSError(errno.ENOSPC, 'full')) == errno.ENOSPC
    assert compat.os_error_number(ValueError('no')) is None


def test_without_details(tmp_path: pathlib.Path) -> None:
    error = tensorstore_error(tmp_path)
    line = compat.without_details(error)
    assert "='" in str(error) and "='" not in line
    assert len(line) < 300 and 'Not a directory' in line


# ---- ml_collections, tensorboardX --------------------------------------------------------------


def test_reference_inputs() -> None:
    config = ml_collections.ConfigDict({'a': 2, 'b': 3})
    a, b = config.get_ref('a'), config.get_ref('b')
    found = list(compat.reference_inputs(a * b))
    assert found[0] is a and any(each is b for each in found)
    assert list(compat.reference_inputs(a)) == [2]


def test_is_dotted_key() -> None:
    error = error_of(lambda: ml_collections.ConfigDict({'a.b': 1}))
    assert compat.is_dotted_key(error)
    assert not compat.is_dotted_key(ValueError('no'))


def test_is_type_change() -> None:
    config = ml_collections.ConfigDict({'a': 1})
    assert compat.is_type_change(error_of(lambda: setattr(config, 'a', 'text')))
    assert not compat.is_type_change(TypeError('no'))


def test_tensorboard_events(tmp_path: pathlib.Path) -> None:
    writer_class, events, summaries = compat.tensorboard_events()
    writer = writer_class(str(tmp_path / 'events'), '.suffix')
    value = summaries.Summary.Value(tag='train/loss', simple_value=1.5)
    event = events.Event(step=3, summary=summaries.Summary(value=[value]))
    writer.write_event(event)
    writer.flush()
    writer.close()
    (file,) = tmp_path.iterdir()
    assert file.name.endswith('.suffix') and event.SerializeToString() in file.read_bytes()


def test_tensorboard_text() -> None:
    value = compat.tensorboard_text('eval/samples', 'a text')
    assert value.tag.startswith('eval/samples') and value.tensor.string_val == [b'a text']
    assert value.metadata.plugin_data.plugin_name == 'text'


# ---- xla -----------------------------------------------------------------------------------------


def test_the_text_of_a_compiled_program() -> None:
    """modes/plan/collectives.py parses it: an all-reduce over four devices, in a loop of three."""
    axes = {'data': 4}
    devices = jax.make_mesh((4,), ('data',), (AxisType.Auto,), devices=jax.devices()[:4])
    rows = NamedSharding(devices, PartitionSpec('data'))

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, y: y + x.sum(0) * jnp.sin(y), x)

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=rows)
    text = jax.jit(jax.grad(lambda x: loop(x).sum())).lower(x).compile().as_text() or ''
    found, complete = collectives.find(text, axes)
    assert complete
    assert {(each.kind, each.axes, each.group) for each in found} == {('all-reduce', ('data',), 4)}
    assert sum(each.count for each in found) >= 3


# ---- nothing private elsewhere -----------------------------------------------------------------

# Standard attributes of named tuples and of `os`.
_STANDARD = {'_replace', '_make', '_fields', '_asdict', '_exit'}


def is_private(name: str) -> bool:
    """Whether a name has one leading underscore, or is the attribute of a wrapped function."""
    return name == '__wrapped__' or (name[:1] == '_' and name[:2] != '__' and len(name) > 1)


@functools.cache
def nodes(file: pathlib.Path) -> tuple[ast.AST, ...]:
    """Returns the nodes of the syntax tree of a file, cached."""
    return tuple(ast.walk(ast.parse(file.read_text())))


@functools.cache
def own_names(file: pathlib.Path) -> frozenset[str]:
    """Returns the names that a file defines: functions, classes, variables, attributes."""
    names = set()
    for node in nodes(file):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ('self', 'cls')
            names.update([node.attr] * of_self)
    return frozenset(names)


def used_names(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields line and name of the attributes and imports that a file uses."""
    for node in nodes(file):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            paths = [getattr(node, 'module', None) or '', *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for path in paths for name in path.split('.'))


def imported_files(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the files of this project that a file imports by absolute path."""
    for node in nodes(file):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            place = ROOT.joinpath(*node.module.split('.'))
            for path in (place, *(place / alias.name for alias in node.names)):
                if path.with_suffix('.py').is_file():
                    yield path.with_suffix('.py')


def foreign_private(file: pathlib.Path) -> list[str]:
    """Returns the private names that a file uses but neither it nor its imports define."""
    near = [*imported_files(file), *file.parent.glob('*.py')]
    own = _STANDARD.union(*map(own_names, near))
    return [
        f'line {n}: {name}' for n, name in used_names(file) if is_private(name) and name not in own
    ]


@pytest.mark.parametrize('package', ['trainer', 'data', 'models', 'configs', 'launch'])
def test_private_parts_of_libraries_are_used_only_in_compat(package: str) -> None:
    files = [file for file in (ROOT / package).rglob('*.py') if file.name != 'compat.py']
    found = {str(file.relative_to(ROOT)): foreign_private(file) for file in files}
    private = {file: names for file, names in found.items() if names}
    assert files and not private


def test_no_other_file_imports_private_modules() -> None:
    here = pathlib.Path(__file__).name
    for package in ('trainer', 'data', 'models', 'configs', 'launch', 'tests'):
        for file in (ROOT / package).rglob('*.py'):
            # Few name it at all, in a sentence or in code.
            if file.name not in ('compat.py', here) and '_src' in file.read_text():
                used = {name for _, name in used_names(file)}
                assert '_src' not in used, file


def test_the_check_finds_private_parts(tmp_path: pathlib.Path) -> None:
    lines = 'import jax._src.core', 'from jax._src import core', 'x._ops', 'f.__wrapped__', 'x._z'
    file, other = tmp_path / 'file.py', tmp_path / 'other.py'
    file.write_text('\n'.join([*lines, 'x._y', 'x.y', 'x.__dict__', 'x._replace()']))
    other.write_text('def _y(): ...')
    assert len(foreign_private(file)) == 5
