# SPDX-License-Identifier: Apache-2.0
"""`pad_shard_unpad`: calls a compiled function on batches of any size, on any mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from trainer.parallel.host import fetch
from trainer.parallel.mesh import batch_sharding, batch_shards, make_mesh, replicated_sharding


def pad_shard_unpad(
    fn: Callable[..., Any],
    *,
    mesh: Mesh | None = None,
    static_argnums: Sequence[int] = (0,),
    static_argnames: Sequence[str] = (),
    static_return: bool = False,
) -> Callable[..., Any]:
    """Wraps a (compiled) function so that the batch size need not be divisible by the devices.

    Every argument that is not static is a pytree of arrays with the same first dimension. They are
    padded on the host with zeros of their own dtype and sharded over the mesh's data axes; the
    padding is removed from the result. `flax.jax_utils.pad_shard_unpad` does the same for a
    `pmap`ped function; here arrays stay global, without an extra dimension for devices.

    Args:
        fn: usually `jax.jit(...)`; called once for each call of the wrapper.
        mesh: the mesh to shard over; by default all devices on one `data` axis.
        static_argnums: positions of arguments that are replicated instead (parameters, totals).
        static_argnames: the same for keyword arguments.
        static_return: return the result as it is (accumulators), on the devices.

    Returns:
        A function with the arguments of `fn` and the keyword `min_device_batch`: the minimum
        number of examples per device. Pass the usual number, or a smaller last batch compiles
        again. The results are numpy arrays, unless `static_return`.

    Raises:
        ValueError: (when called) if the arguments have different first dimensions, or none.
    """

    def wrapper(*args: Any, min_device_batch: int | None = None, **kwargs: Any) -> Any:
        # At the call and not before: the devices need not be initialized when a module with a
        # decorated function is imported.
        target = mesh or make_mesh({'data': -1})
        rows = _row_count(
            [a for i, a in enumerate(args) if i not in static_argnums]
            + [a for name, a in kwargs.items() if name not in static_argnames]
        )
        shards = batch_shards(target)
        # A multiple of the shards, so that each device gets the same number of examples; at least
        # the minimum, so that a smaller last batch has the shape of the others.
        padded = shards * max(-(-rows // shards), min_device_batch or 1)

        def place(tree: Any, is_static: bool) -> Any:
            if is_static:
                return jax.device_put(tree, replicated_sharding(target))
            tree = jax.tree.map(lambda x: _pad(np.asarray(x), padded), tree)
            return jax.device_put(tree, batch_sharding(target))

        result = fn(
            *(place(a, i in static_argnums) for i, a in enumerate(args)),
            **{name: place(a, name in static_argnames) for name, a in kwargs.items()},
        )
        return result if static_return else jax.tree.map(lambda x: x[:rows], fetch(result))

    return wrapper


def _row_count(trees: Sequence[Any]) -> int:
    # A scalar has no batch dimension: None stands for it, and is refused below.
    counts = {np.shape(x)[0] if np.ndim(x) else None for x in jax.tree.leaves(trees)}
    if len(counts) != 1 or None in counts:
        raise ValueError(
            'pad_shard_unpad: inconsistent batch sizes: the arguments that are not static have '
            f'first dimensions {sorted(map(str, counts))}; list those without a batch dimension in '
            'static_argnums or static_argnames'
        )
    return counts.pop() or 0


def _pad(x: np.ndarray, rows: int) -> np.ndarray:
    if len(x) == rows:
        return x
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])
