# SPDX-License-Identifier: Apache-2.0
"""Every reliance on private parts or message texts of a library, each in a function of its own.

Each function says which version it was checked with, why there is no public way, and what breaks
without it; tests/test_compat.py names the one that a new version breaks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# ---- jax, for modules/ and klinen/ ---------------------------------------------------------------


def num_open_calls(functions: tuple[Callable[..., Any], ...]) -> int:
    """Returns how many calls of these functions enclose the caller: its tracing happens in them.

    Checked with: flax 0.12.8 and 0.12.12, jax 0.10.2 and 0.12.0.
    Why: neither library has a public mark of the branches and loops that are being traced. The
    frames on the stack are compared by their code objects, which are those of public functions.
    Without it: a recorder stores values in some branches only, and every call of a model with
    `nn.cond`, `nnx.cond`, `jax.lax.while_loop` and the like fails while it is inspected.
    """
    codes = _codes(functions)
    frame, count = inspect.currentframe(), 0
    while frame is not None:
        count += frame.f_code in codes
        frame = frame.f_back
    return count


@functools.cache
def _codes(functions: tuple[Callable[..., Any], ...]) -> frozenset[types.CodeType]:
    return frozenset(inspect.unwrap(function).__code__ for function in functions)


def branches_differ(error: TypeError, collection: str) -> bool:
    """Whether an error says that branches of `nn.cond` leave different variables in a collection.

    Checked with: jax 0.10.2 and 0.12.0. The message names branches and key path.
    Why: it is a plain TypeError.
    Without it: a module that sows in one branch only fails although nobody reads what it sows.
    """
    return all(word in str(error) for word in ('branch', f"'{collection}'"))


def name_stack(equation: Any) -> str:
    """Returns the scopes that an equation of a jaxpr was traced in: 'transpose(jvp(model))/Dense'.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: `source_info` of an equation is not documented, and no public function prints the scopes.
    Without it: casts and products cannot be attributed to the modules that make them.
    """
    return str(equation.source_info.name_stack)


def is_axis_bound(name: Any) -> bool:
    """Whether a transformation around the caller, such as `jax.vmap(axis_name=...)`, binds a name.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: there is no public list of the bound axes; that `jax.lax.axis_size` raises a NameError for
    others is not documented.
    Without it: normalisation layers that name an axis of `jax.pmap` fail.
    """
    import jax

    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


# ---- flax.linen ----------------------------------------------------------------------------------


def missing_stream(error: Exception) -> str | None:
    """Returns the random stream that a Linen module has no key for; None for another error.

    Checked with: flax 0.12.8 and 0.12.12, whose `InvalidRngError` says 'needs PRNG for "noise"'.
    Why: the error has no attribute for the name, and a module does not declare its streams.
    Without it: a model that draws from a stream of its own fails for want of a key.
    """
    match = re.search(r'needs PRNG for "([^"]+)"', str(error))
    return match[1] if match else None


def missing_collection(error: Exception) -> str | None:
    """Returns the collection that a Linen module reads and was not given; None for another error.

    Checked with: flax 0.12.8 and 0.12.12. The message has 'from collection "params"'.
    Why: the error has no attribute for the name.
    Without it: parameters passed where collections are expected give Flax's message, not ours.
    """
    match = re.search(r'from collection "([^"]+)"', str(error))
    return match[1] if match else None


def without_collection(collections: Any, name: str) -> Any:
    """Returns a filter of collections (names, a `DenyList`, a bool) that leaves one name out.

    Checked with: flax 0.12.8 and 0.12.12: `flax.core.scope.subtract_filters`, not documented.
    Why: filters have no public operations.
    Without it: calls cannot be repeated without intermediates (see `branches_differ`).
    """
    from flax.core.scope import subtract_filters

    return subtract_filters(collections, name)


def key_below(key: Any, path: Sequence[str]) -> Any:
    """Returns a random key as it arrives in the submodule at a path: folded with it when it draws.

    Checked with: flax 0.12.8 and 0.12.12: `flax.core.scope.LazyRng`, not documented.
    Why: no public function folds a path into a key, nor can a scope be made at a path.
    Without it: a part of a bound model draws other random numbers alone than within the model.
    """
    from flax.core.scope import LazyRng

    return LazyRng.create(key, *path)


def set_in_call(module: Any, name: str, value: Any) -> None:
    """Sets an attribute of a module that is being called, Linen or NNX.

    Checked with: flax 0.12.8 and 0.12.12.
    Why: Linen freezes modules in a call, and NNX checks the trace level of each assignment.
    `clone` is no way round: the call that is intercepted is one of this very object.
    Without it: fields cannot be replaced for one call, such as the axis names of `jax.pmap`.
    """
    object.__setattr__(module, name, value)


def is_call_of(context: Any, classes: tuple[type, ...]) -> bool:
    """Whether an intercepted call runs the `__call__` that one of these Linen classes defines.

    Checked with: flax 0.12.8 and 0.12.12, where `context.orig_method` is a `functools.partial`.
    Why: a lifted class, such as `nn.vmap(nn.BatchNorm)`, has the method's name too, and binds the
    axis before it calls the one of Flax; only the code objects tell them apart.
    Without it: the axis name of a lifted layer is left out although it is bound.
    """
    method = getattr(context.orig_method, 'func', context.orig_method)
    codes = _codes(tuple(cls.__call__ for cls in classes))
    return isinstance(context.module, classes) and getattr(method, '__code__', None) in codes


def is_nowrap(member: Any) -> bool:
    """Whether a member of a module's class is decorated with `nn.nowrap`.

    Checked with: flax 0.12.8 and 0.12.12, which sets the attribute `nowrap`.
    Why: there is no public question for it.
    Without it: helpers that are no methods of the model run as such in a bound model.
    """
    return hasattr(member, 'nowrap')


def is_compact(member: Any) -> bool:
    """Whether a member of a module's class is decorated with `nn.compact`.

    Checked with: flax 0.12.8 and 0.12.12, which sets the attribute `compact`.
    Why: there is no public question for it.
    Without it: a compact method that is called without variables gives Flax's message, not ours.
    """
    return hasattr(member, 'compact')


def is_constructed(module: Any) -> bool:
    """Whether Linen has finished the construction of a module, and guards its fields.

    Checked with: flax 0.12.8 and 0.12.12, whose `__post_init__` sets the attribute `_state`.
    Why: Linen says so to nobody.
    Without it: `self.training = False` in a method of a `knn.Module` has no effect, silently.
    """
    return '_state' in vars(module)


def run_setup(module: Any) -> None:
    """Runs the `setup` of a bound Linen module if it has not run.

    Checked with: flax 0.12.8 and 0.12.12, whose `Module.__dir__` does it; `_try_setup` is private.
    Why: setup is lazy, and there is no public way to ask for it.
    Without it: the parts that `setup` makes are missing among those of a bound model.
    """
    dir(module)


# ---- flax.nnx ------------------------------------------------------------------------------------


def subclass(kind: Any, call: Callable[..., Any]) -> Any:
    """Returns a class that does what a class of NNX modules does, but for `__call__`.

    Checked with: flax 0.12.8 and 0.12.12. A class keeps what NNX knows of it as `_pytree__*`.
    Why: NNX has no interceptors for methods. The base class is set afterwards, so that a user's
    `__init_subclass__` does not see a class of ours.
    Without it: NNX modules are neither recorded nor named in traces, and axis names stay.
    """
    from flax import nnx

    names = {'__call__': call, '__module__': kind.__module__, '__qualname__': kind.__qualname__}
    made: Any = type(kind)(kind.__name__, (nnx.Module,), names, pytree=kind._pytree__is_pytree)
    made.__bases__ = (kind,)
    for name in [name for name in vars(made) if name.startswith('_pytree__')]:
        delattr(made, name)  # What NNX has noted of this class; what counts is the base's.
    return made


def set_class(node: Any, kind: type) -> None:
    """Gives an NNX module another class, such as one of `subclass`.

    Checked with: flax 0.12.8 and 0.12.12.
    Why: NNX modules check assignments, and allow none of their class.
    Without it: as without `subclass`.
    """
    object.__setattr__(node, '__class__', kind)


def linen_module(bridge: Any) -> Any:
    """Returns the Linen module in an `nnx.bridge.ToNNX`.

    Checked with: flax 0.12.8 and 0.12.12, `to_nnx__module`.
    Why: the property `module` is deprecated, and warns.
    Without it: Linen modules within NNX models are not told whether they train.
    """
    return bridge.to_nnx__module


def set_linen_module(bridge: Any, module: Any) -> None:
    """Puts another Linen module into an `nnx.bridge.ToNNX`.

    Checked with: flax 0.12.8 and 0.12.12, `to_nnx__module`.
    Why: the property `module` cannot be set, and another bridge would have no variables.
    Without it: Linen modules within NNX models are not told whether they train.
    """
    bridge.to_nnx__module = module


def dimension_names(variable: Any) -> Any:
    """Returns the names that an NNX variable gives to its dimensions, None for none.

    Checked with: flax 0.12.8 and 0.12.12. The metadata has them as 'out_sharding'.
    Why: the properties of these names are deprecated, and warn.
    Without it: config.sharding finds no names of dimensions in NNX models.
    """
    return variable.get_metadata().get('out_sharding')


@contextlib.contextmanager
def allowing_sow() -> Iterator[None]:
    """Silences NNX's warning about `Module.sow` and `Module.perturb` outside of `nnx.capture`.

    Checked with: flax 0.12.8 and 0.12.12, whose texts begin with "Using 'Module.".
    Why: `nnx.capture` breaks scans and bridges, so it cannot be used as the warning asks.
    Without it: each call of a model that sows prints a deprecation warning.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r"\s*Using 'Module\.", DeprecationWarning)
        yield
