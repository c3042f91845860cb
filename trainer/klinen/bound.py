# SPDX-License-Identifier: Apache-2.0
"""Modules bound to variables, random keys and a mode: pytrees that are called like functions."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import errors, traverse_util

from trainer.klinen import intermediates, rngs
from trainer.klinen.definition import Definition
from trainer.modules import linen, train_flags
from trainer.modules.pmap_axes import PmapAxes

# One for all models: what is said of an axis, is said once.
pmap_axes = PmapAxes()

# A gradient with respect to a whole model is of its parameters, and of the collections that are
# there to have gradients: what `perturb` adds, and the scales of fp8 layers. Statistics, caches and
# counts have none, so that an update of all leaves moves nothing that only a call may change.
_DIFFERENTIATED = frozenset({'perturbations', '_overwrite_with_gradient'})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Binding:
    """What a model is bound to.

    Attributes:
        definition: the module.
        params: its parameters.
        collections: its other variables, by the name of their collection.
        rng: a key for all streams, keys by stream, or None.
        training: the mode.
    """

    definition: Definition
    params: Any
    collections: Mapping[str, Any]
    rng: rngs.Rng | None = None
    training: bool = True
    _parts: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), '_parts': {}}

    @property
    def variables(self) -> dict[str, Any]:
        """Every collection, the parameters among them."""
        return {'params': self.params, **self.collections}

    def run(
        self, steps: tuple[Any, ...], args: Any, kwargs: Any, mutable: Iterable[str] = ()
    ) -> tuple[Any, dict[str, Any]]:
        """Calls a method, and returns its output and the collections that it may change.

        Args:
            steps: lead from the module to the method; none for `__call__`.
            args: of the call.
            kwargs: of the call.
            mutable: names of these collections.
        """
        capture = intermediates.current.get()
        if capture is None or not capture.concerns(self):
            return self._apply(steps, args, kwargs, mutable)
        try:
            with nn.intercept_methods(intermediates.keep):
                output, changed = self._apply(
                    steps, args, kwargs, {*mutable, intermediates.COLLECTION}
                )
        except TypeError as error:
            if not linen.branches_differ(error):
                raise
            warnings.warn(
                f'{type(self.definition.module).__name__}: the branches of nn.cond or nn.switch '
                'keep other intermediate values, so none of this call is captured',
                stacklevel=3,
            )
            output, changed = self._apply(steps, args, kwargs, mutable)
        capture.fill(self, changed.pop(intermediates.COLLECTION, {}))
        return output, changed

    def _apply(
        self, steps: tuple[Any, ...], args: Any, kwargs: Any, mutable: Iterable[str]
    ) -> tuple[Any, dict[str, Any]]:
        collections = {
            name: value if name in _DIFFERENTIATED else jax.lax.stop_gradient(value)
            for name, value in self.collections.items()
        }
        module = self.definition.told(self.training)

        def call(keys: rngs.Keys) -> Any:
            return module.apply(
                {'params': self.params, **collections},
                rngs=rngs.below(keys, self.definition.path),
                mutable=sorted(mutable),
                method=lambda m: train_flags.method(steps, self.training)(m, *args, **kwargs),
            )

        try:
            with pmap_axes.calling():
                output, changed = rngs.run(call, self.rng, self.definition.streams)
        except errors.ModifyScopeVariableError as error:
            error.add_note(
                'A Klinen model does not change when it is called. Call y, model = '
                'model.call_with_updates(x) to get the updated model, or model.eval()(x).'
            )
            raise
        except errors.ScopeCollectionNotFound as error:
            if self.params or '"params"' not in str(error):
                raise
            raise ValueError(
                f'{type(module).__name__} is bound to variables without parameters (collections: '
                f'{", ".join(self.collections) or "none"}); with_variables takes the collections '
                "by name: model.with_variables({'params': params, ...})"
            ) from error
        return output, dict(changed)

    def linen(self, *, told: bool = True) -> Any:
        """Returns the module bound as Linen binds it.

        Args:
            told: whether its flags say the mode, or what their maker has left there.
        """
        definition = self.definition
        module = definition.told(self.training) if told else definition.module
        keys = rngs.below(rngs.known(self.rng, definition.streams), definition.path)
        return nn.Module.bind(module, self.variables, rngs=keys)

    def attribute(self, name: str) -> Any:
        """Returns a field, a property or what `setup` has made; modules come bound."""
        if name in intermediates.fields(self.definition.module):
            raise intermediates.unset(self.definition.module, name)
        value = getattr(self.linen(), name)
        if not any(intermediates.modules_in(value)):
            return value
        return intermediates.map_modules(getattr(self.linen(told=False), name), self._part)

    def _part(self, part: nn.Module) -> Any:
        """Returns a part as a bound model: one object for one used in several places."""
        assert part.scope is not None
        # From `vars`: to ask the part itself would run its setup.
        key = part.scope.path, type(part), vars(part).get('training', True)
        if key not in self._parts:
            self._parts[key] = self._make_part(part)
        return self._parts[key]

    def _make_part(self, part: nn.Module) -> Any:
        module, variables = part.unbind()
        assert part.scope is not None
        variables = _with_shared(part, module, variables)
        return bound(
            dataclasses.replace(
                self,
                definition=Definition(
                    module,
                    path=self.definition.path + part.scope.path,
                    streams=self.definition.streams,
                ),
                params=variables.pop('params', {}),
                collections=variables,
                training=self.training and getattr(part, 'training', True) is not False,
            )
        )


class Bound:
    """What the bound form of a module's class has before that class."""

    _bound: Binding

    @property
    def variables(self) -> dict[str, Any]:
        """Every variable collection by its name, the parameters among them."""
        return self._bound.variables

    def unbind(self) -> tuple[nn.Module, dict[str, Any]]:
        """Returns the module without variables, and its variables."""
        return self._bound.definition.module, self.variables

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_'):
            raise AttributeError(name)
        return self._bound.attribute(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise errors.SetAttributeFrozenModuleError(type(self).__name__, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *intermediates.parts_of(self._bound.linen())})

    def __repr__(self) -> str:
        return repr(self._bound.definition.told(self._bound.training))

    def __reduce__(self) -> Any:
        return bound, (self._bound,)


def _of_definition(name: str) -> Callable[..., Any]:
    def method(self: Bound, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._bound.definition.module, name)(*args, **kwargs)

    return functools.wraps(getattr(nn.Module, name))(method)


# Linen's own methods, which take variables or make them: they know nothing of these here.
_LINENS = ('apply', 'bind', 'clone', 'copy', 'init', 'init_with_output', 'lazy_init', 'tabulate')
for _name in _LINENS:
    setattr(Bound, _name, _of_definition(_name))


def bound(binding: Binding) -> Any:
    """Returns the bound model: an instance of a subclass of its module's class."""
    cls: Any = type(binding.definition.module)
    model = object.__new__(_bound_class(cls))
    vars(model)['_bound'] = binding
    return model


@functools.cache
def _bound_class(cls: Any) -> Any:
    """Makes the subclass whose methods run with variables, and registers it as a pytree."""
    from trainer.klinen.interface import Interface
    from trainer.klinen.module import Module

    # What a class has by these names stays for its own code: of a bound model they are methods.
    interface = {
        name: value
        for name, value in {**vars(Interface), **vars(Bound)}.items()
        if not name.startswith('_')
    }
    names = {f.name for f in dataclasses.fields(cls)} - {'parent', 'name', *interface}
    namespace: dict[str, Any] = {name: _attribute(name) for name in sorted(names)}
    for base in cls.__mro__:
        theirs = () if base in (*nn.Module.__mro__, Interface, Module) else vars(base).items()
        for name, value in theirs:
            if name not in namespace and name not in interface:
                member = _routed(name, value)
                if member is not None:
                    namespace[name] = member
    namespace.update(
        # `dataclasses.replace` makes a module without variables, as `clone` does.
        __new__=lambda _, *args, **kwargs: cls(*args, **kwargs),
        training=property(lambda self: self._bound.training),
        __doc__=cls.__doc__,
        __module__=cls.__module__,
        __qualname__=cls.__qualname__,
        __eq__=object.__eq__,
        __hash__=object.__hash__,
    )
    bases = (Bound, cls) if issubclass(cls, Interface) else (Bound, Interface, cls)
    made = type(cls.__name__, bases, namespace)
    for (
        name,
        value,
    ) in interface.items():  # Not before: Linen would take them for methods of a module.
        setattr(made, name, value)
    jax.tree_util.register_pytree_with_keys(made, _flatten_with_keys, _unflatten, _flatten)
    return made


def _attribute(name: str) -> property:
    return property(lambda self: self._bound.attribute(name))


def _routed(name: str, value: Any) -> Any:
    """Returns what stands in a bound class for a member of the module's class, if anything."""
    if name == 'setup' or (name.startswith('_') and name != '__call__'):
        return None
    if hasattr(value, 'nowrap') or isinstance(value, (staticmethod, classmethod, type)):
        return None
    if not inspect.isfunction(value):
        return _attribute(name) if hasattr(value, '__get__') else None
    steps = () if name == '__call__' else (operator.attrgetter(name),)

    @functools.wraps(value)
    def method(self: Bound, *args: Any, **kwargs: Any) -> Any:
        return self._bound.run(steps, args, kwargs)[0]

    method.method_handler_wrapped = True  # type: ignore[attr-defined]  # By Linen's own mark.
    return method


def _flatten(model: Any) -> tuple[tuple[Any, ...], Any]:
    binding = model._bound
    # As they are: tree functions also put what is no array, and no dict, in their place.
    children = (binding.params, binding.collections, binding.rng)
    return children, (binding.definition, binding.training)


def _flatten_with_keys(model: Any) -> tuple[list[tuple[Any, Any]], Any]:
    children, static = _flatten(model)
    names = ('params', 'collections', 'rng')
    keys = [jax.tree_util.GetAttrKey(name) for name in names]
    return list(zip(keys, children, strict=True)), static


def _unflatten(static: Any, children: Any) -> Any:
    (definition, training), (params, collections, rng) = static, children
    return bound(
        Binding(
            definition=definition,
            params=params,
            collections=collections,
            rng=rng,
            training=training,
        )
    )


def _with_shared(part: nn.Module, alone: nn.Module, variables: Any) -> dict[str, Any]:
    """Adds the variables of modules that a part uses and another part owns.

    Args:
        part: as Linen binds it within the model.
        alone: the same by itself.
        variables: what stands under the part's own path.
    """
    flat = traverse_util.flatten_dict(dict(variables), keep_empty_nodes=True)

    def visit(within: nn.Module, single: nn.Module) -> None:
        for name in train_flags.fields(within):
            pairs = zip(
                intermediates.modules_in(getattr(within, name)),
                intermediates.modules_in(getattr(single, name)),
                strict=True,
            )
            for a, b in pairs:
                own = len(part.scope.path)  # type: ignore[union-attr]
                if a.scope.path[:own] != part.scope.path:  # type: ignore[union-attr]
                    for key, value in traverse_util.flatten_dict(a.variables).items():
                        flat.setdefault((key[0], *b.scope.path, *key[1:]), value)
                visit(a, b)

    visit(part, nn.Module.bind(alone, {}))
    return traverse_util.unflatten_dict(flat)
