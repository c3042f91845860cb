# SPDX-License-Identifier: Apache-2.0
"""Fields for intermediate values of modules, and the tree in which a call returns them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_origin

import flax.linen as nn
import jax

from trainer import compat
from trainer.modules.static_leaves import WithStaticLeaves

T = TypeVar('T')

# The Linen collection in which the values leave a call. Linen's own name, because lifted modules
# only pass on the collections that they list.
COLLECTION = 'intermediates'
_MARK = 'knn.Intermediate'

Intermediate = Annotated[T, _MARK]
"""Marks a field of a module as a value of one call: `tmp: knn.Intermediate[T] = field(init=False)`.

The call assigns it, or it has a `default_factory`. No value is kept from one call to the next.
"""


class Intermediates:
    """The intermediate values of one call, in the structure of the model.

    `intermediates.encoder.tmp_values` is the field `tmp_values` of `model.encoder`. A submodule
    that a compact method creates has the name of its parameters (`intermediates.Block_0`). A
    compiled function can return this, because it is a pytree.
    """

    def __init__(self, values: Mapping[str, Any]):
        """Sets values of fields, and `Intermediates` of submodules, by name."""
        self._values = dict(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_') or name not in self._values:
            names = ', '.join(self._values) or 'none (no call was captured)'
            raise AttributeError(f'no intermediate value or submodule {name!r}; available: {names}')
        return self._values[name]

    def __dir__(self) -> list[str]:
        return list(self._values)

    def __repr__(self) -> str:
        return f'Intermediates({", ".join(f"{k}={v!r}" for k, v in self._values.items())})'


def _unflatten(names: tuple[str, ...], values: Any) -> Intermediates:
    return Intermediates(dict(zip(names, values, strict=True)))


jax.tree_util.register_pytree_with_keys(
    Intermediates,
    lambda x: (
        [(jax.tree_util.GetAttrKey(name), value) for name, value in x._values.items()],
        tuple(x._values),
    ),
    _unflatten,
)


def fields(module: Any) -> tuple[str, ...]:
    """Returns the names of the fields that are annotated as `Intermediate`, in field order."""
    cls: Any = type(module)
    return _fields(cls)


@functools.cache
def _fields(cls: Any) -> tuple[str, ...]:
    # Cached by class, because every assignment of a module's attribute asks for this.
    all_fields = dataclasses.fields(cls)
    return tuple(f.name for f in all_fields if not f.init and is_marked(f, cls))


def unset_error(module: nn.Module, name: str) -> AttributeError:
    """Returns the error for a field `Intermediate` that is read where it has no value."""
    where = f'{type(module).__name__}.{name}'
    if module.scope is None:
        return AttributeError(
            f'{where} is a knn.Intermediate: it can only be accessed inside module functions. To '
            'get its value in a call: y, intermediates = model.call_with_intermediates(x)'
        )
    return AttributeError(
        f'{where} is a knn.Intermediate without a default. Attribute was not set during the call '
        'before it was read'
    )


def store_fields(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Linen interceptor that stores the fields `Intermediate` of a module after each method."""
    output = next_fun(*args, **kwargs)
    module = context.module
    if module.scope is None or not module.is_mutable_collection(COLLECTION):
        return output
    for name in fields(module):
        # Without a default, a field that the call has not assigned is missing.
        if name in vars(module):
            # A variable must be a pytree of arrays, and a field may hold anything.
            module.put_variable(COLLECTION, name, WithStaticLeaves.from_value(vars(module)[name]))
    return output


def unwrap_values(collection: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the intermediates collection of a call with the original values of the fields."""
    unwrapped = {}
    for name, x in collection.items():
        value = x.value if isinstance(x, WithStaticLeaves) else x
        unwrapped[name] = unwrap_values(x) if isinstance(x, Mapping) else value
    return unwrapped


def mirror(module: nn.Module, collection: Mapping[str, Any]) -> Intermediates:
    """Returns the intermediates of a call in the structure of the module.

    Args:
        module: the module that was called or a submodule, as Linen binds it.
        collection: the whole intermediates collection of the call.
    """
    assert module.scope is not None
    subtree: Any = collection
    for name in module.scope.path:
        subtree = subtree.get(name, {})
    values = _field_values(subtree)
    parts = {
        name: value for name, value in module_attributes(module).items() if any(modules_in(value))
    }
    named = {part.scope.path[-1] for value in parts.values() for part in modules_in(value)}
    # Submodules in attributes go under the attribute's name, not under that of their parameters,
    # which differ for lists ('layers_0') and for modules that are shared or named.
    values.update({k: v for k, v in _compact_parts(subtree).items() if k not in named})
    for name, value in parts.items():
        values[name] = map_modules(value, lambda part: mirror(part, collection))
    return Intermediates(values)


def module_attributes(module: nn.Module) -> dict[str, Any]:
    """Returns the fields of a bound module and the attributes that its `setup` sets, by name."""
    compat.run_setup(module)  # Linen delays it until an attribute is read.
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith('_') and name not in ('parent', 'name', 'scope')
    }


def modules_in(value: Any) -> Iterator[Any]:
    """Yields the modules in nested lists, tuples and dicts."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from modules_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from modules_in(item)


def map_modules(value: Any, function: Callable[[Any], Any]) -> Any:
    """Returns the value with `function(module)` for each module in lists, tuples and dicts."""
    if isinstance(value, nn.Module):
        return function(value)
    if not any(modules_in(value)):
        return value
    if isinstance(value, Mapping):
        return {key: map_modules(item, function) for key, item in value.items()}
    return tuple(map_modules(item, function) for item in value)


def _field_values(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item.value for name, item in tree.items() if isinstance(item, WithStaticLeaves)}


def _compact_parts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the submodules that a compact method has created: only their names are known."""
    parts = {name: item for name, item in tree.items() if isinstance(item, Mapping)}
    return {
        name: Intermediates({**_field_values(part), **_compact_parts(part)})
        for name, part in parts.items()
    }


def is_marked(field: dataclasses.Field[Any], cls: type) -> bool:
    """Whether the field of a class of modules is annotated as `Intermediate`."""
    annotation: Any = field.type
    # `from __future__ import annotations` leaves text, to be evaluated where its class was defined.
    if isinstance(annotation, str):
        owner = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
        try:
            annotation = eval(annotation, vars(sys.modules[owner.__module__]), dict(vars(owner)))
        except Exception:  # Names imported under TYPE_CHECKING or local to a function are missing.
            return re.match(r'(\w+\.)*Intermediate\b', annotation) is not None
    return get_origin(annotation) is Annotated and _MARK in annotation.__metadata__
