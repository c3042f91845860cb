# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices, a compile cache for the test run, and little memory."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import os
import pathlib
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

pytest_plugins = ('tests.crash', 'tests.usage')

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them press.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ['JAX_PLATFORMS'] = 'cpu'
flags = ['--xla_force_host_platform_device_count=8']
# Tests compile much and compute little: the compiler's optimizations take longer than they save.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the programs as users run them.
quick = os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1') != '0'
if quick and importlib.metadata.version('jaxlib').startswith('0.10.'):  # Others may abort.
    flags.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join(flags)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR',
    str(pathlib.Path(tempfile.gettempdir()) / 'jax-config-trainer-test-cache'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')


@pytest.fixture(scope='session', autouse=True)
def temporary_files_go_with_the_others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Some libraries, such as TFDS, leave a temporary directory behind; pytest clears it away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TMPDIR', str(tmp_path_factory.mktemp('tmp')))
        patch.setattr(tempfile, 'tempdir', None)
        yield


@pytest.fixture(autouse=True)
def loggers_stay_as_they_were() -> Iterator[None]:
    """Restores the loggers after a test: a run in it sends the log to its files."""
    names = ('', 'trainer', 'trainer.screen', 'absl')
    loggers = [logging.getLogger(name) for name in names]
    before = [(log, log.level, log.propagate, list(log.handlers)) for log in loggers]
    yield
    for log, level, propagate, handlers in before:
        log.setLevel(level)
        log.propagate = propagate
        for handler in set(log.handlers) - set(handlers):
            log.removeHandler(handler)
            handler.close()
        log.handlers[:] = handlers


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keeps the garbage collector from what collecting the tests creates, which stays to the end.

    It is millions of objects, and to go through them takes longer than most files of tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        # Tracing creates many objects, most of which are needed until it ends: by default Python
        # would look for garbage among them again and again.
        gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope='module', autouse=True)
def compiled_programs_go_with_their_module() -> Iterator[None]:
    """No other module calls them; kept, they fill gigabytes and the kernel's table of mappings."""
    from tests import usage  # Not before pytest, which rewrites the assertions of its plugins.

    before = usage.usage_so_far().programs
    yield
    if usage.usage_so_far().programs > before:
        sys.modules['jax'].clear_caches()
        gc.collect()
