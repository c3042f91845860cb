# SPDX-License-Identifier: Apache-2.0
"""Threads for virtual CPU devices."""

from __future__ import annotations

import os
import re

import jax

_OPTION = 'jax_num_cpu_devices'
_COUNT = re.compile(r'--xla_force_host_platform_device_count=(\d+)')


def add_threads() -> None:
    """Gives XLA more threads than virtual CPU devices. Call it before JAX creates the devices.

    XLA has one thread pool for all of them, with as many threads as there are devices or cores. A
    batched matrix decomposition (QR, SVD, Cholesky, ...: a decomposition under `jax.vmap`) uses
    its device's thread to wait for others of the same pool, which it never gets if all devices
    compute one: the program hangs. With one thread for each device and some more, it does not.

    Does nothing if there is one device, or if `NPROC` is set, the variable that XLA reads for this.
    """
    counts = [int(count) for count in _COUNT.findall(os.environ.get('XLA_FLAGS', ''))]
    # In XLA, the last one counts. The option of JAX is -1 if it is not set.
    count = max(counts[-1] if counts else 1, getattr(jax.config, _OPTION))
    if count > 1:
        os.environ.setdefault('NPROC', str(count + (os.cpu_count() or 1)))
