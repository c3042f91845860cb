# SPDX-License-Identifier: Apache-2.0
"""Messages for unknown paths suggest the path that was probably meant."""

from __future__ import annotations

import time
import typing

import pytest

from tests.config.examples import apply_overrides, config, config_with_references
from trainer.config import loading, lookup, overrides, schema, synonyms, unknown
from trainer.config.errors import UserError


@pytest.mark.parametrize(
    ('path', 'expected'),
    [
        ('modle.features', 'config.model.features'),
        ('model.feature', 'config.model.features'),
        ('model.learning_rate', 'config.optimizer.learning_rate'),
        ('optimizer.momentun', 'config.optimizer.momentum'),
        ('data.transforms[1].paddin', 'config.data.transforms[1].padding'),
        ('checkpoint.evry', 'config.checkpoint.every'),
        ('batch_size', 'config.data.batch_size'),
    ],
)
def test_suggestions(path: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        apply_overrides(f'{path}=1')
    assert f'Did you mean {expected}?' in str(error.value)


@pytest.mark.parametrize(
    ('path', 'expected'),
    [
        ('optimizer.learning_rat', 'config.optimizer.learning_rate'),
        ('data.batch_siz', 'config.data.batch_size'),
        ('evals.tset.every', 'config.evals.test.every'),
        ('evals.tset.data.source.split', 'config.evals.test.data.source.split'),
        ('modle.featurs', 'config.model.features'),
    ],
)
def test_more_suggestions(path: str, expected: str) -> None:
    changed = config()
    changed.evals = dict(
        test=dict(data=dict(source=dict(target='trainer.data.mnist:MNIST', split='a')))
    )
    with pytest.raises(UserError) as error:
        overrides.apply(changed, [(path, '1')])
    assert str(error.value).startswith(f'Unknown key config.{path}. ')
    assert f'Did you mean {expected}?' in str(error.value)


def test_no_suggestion_names_a_key_that_does_not_exist() -> None:
    changed = config()
    del changed['vars']
    with pytest.raises(UserError) as error:
        overrides.apply(changed, [('vars.width', '1')])
    assert 'config.evals.width' not in str(error.value)


def test_a_misspelled_variable() -> None:
    with pytest.raises(UserError, match=r'Did you mean config\.vars\.width\?'):
        overrides.apply(config_with_references(), [('vars.widht', '7')])


@pytest.mark.parametrize(
    ('path', 'hint'),
    [
        ('checkpoint.best.modee', 'Did you mean config.checkpoint.best.mode?'),
        ('ema.decya', 'Did you mean config.ema.decay?'),
        ('seed.x', 'Did you mean config.seed?'),
        ('nothing_like_it', 'See --helpconfig for all keys.'),
        ('checkpoint.mode', 'Did you mean config.checkpoint.best.mode?'),
        ('optimizer.unheard_of', 'optax:sgd takes no such argument. It takes: learning_rate, '),
    ],
)
def test_no_unlikely_suggestions(path: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        apply_overrides(f'{path}=1')
    assert hint in str(error.value)


def test_an_unknown_key_of_the_file_gets_a_suggestion() -> None:
    changed = loading.to_plain(config())
    changed['checkpoint'] = {'keep_lst': 3}
    known = r'Unknown key config\.checkpoint\.keep_lst\. .* mean config\.checkpoint\.keep_last\?'
    with pytest.raises(UserError, match=known):
        schema.read(changed)


@pytest.mark.parametrize(
    ('path', 'expected'),
    [
        ('modle.x', 'Did you mean config.model?'),
        ('chekpoint.nothing_like_it', 'Did you mean config.checkpoint?'),
        ('data.sorce.splt', 'Did you mean config.data.source.split?'),
        ('data.nothing_like_it', 'config.data has: '),
        ('modle.learning_rate', 'Did you mean config.optimizer.learning_rate?'),
    ],
)
def test_a_path_with_several_unknown_names(path: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        apply_overrides(f'{path}=1')
    assert str(error.value).startswith(f'Unknown key config.{path}. ')
    assert expected in str(error.value)


def test_a_long_path_is_rejected_fast() -> None:
    """The time must not grow with the product of its length and depth."""
    start = time.perf_counter()
    for head in ('model', 'modle', 'data.source', 'nothing_like_it', 'ensemble'):
        for depth in (10, 45, 60, 200):
            with pytest.raises(UserError) as error:
                apply_overrides(f'{head}{".name" * depth}=1')
            assert len(str(error.value)) < 500
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ('given', 'path', 'expected'),
    [
        ('checkpoint={"evry": 1}', 'checkpoint.evry', 'Did you mean config.checkpoint.every?'),
        ('guard={"nosuch": 1}', 'guard.nosuch', 'config.guard has: non_finite.'),
        (
            'model={"items": 1}',
            'model.items',
            'trainer.models.mlp:MLP takes no such argument. It takes:',
        ),
        ('data={"source": {"splt": "a"}}', 'data.source.splt', 'mean config.data.source.split?'),
        (
            'optimizer.learning_rate={"target": "optax:linear_schedule", "init_vale": 1}',
            'optimizer.learning_rate.init_vale',
            'Did you mean config.optimizer.learning_rate.init_value?',
        ),
        (
            'data.transforms=[{"target": "trainer.data.transforms:ToFloat", "kye": "image"}]',
            'data.transforms[0].kye',
            'trainer.data.transforms:ToFloat takes no such argument. It takes: key, ',
        ),
        (
            'evals={"a": {"data": {"sauce": 1}}}',
            'evals.a.data.sauce',
            'Did you mean config.evals.a.data.source?',
        ),
    ],
)
def test_an_unknown_key_in_a_dict(given: str, path: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        apply_overrides(given)
    start = f'config.{path}: ' if 'no such argument' in expected else f'Unknown key config.{path}. '
    assert str(error.value).startswith(start)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ('path', 'hint'),
    [
        ('lr', 'Did you mean config.optimizer.learning_rate?'),
        ('optimizer.lr', 'Did you mean config.optimizer.learning_rate?'),
        ('training.lr', 'Did you mean config.optimizer.learning_rate?'),
        ('Epochs', 'Write --config.train_for=10epochs, or 2000steps.'),
        ('max_steps', 'Write --config.train_for=10epochs, or 2000steps.'),
        ('wd', '--config.optimizer.target=optax:adamw has it.'),
        ('bs', 'Did you mean config.data.batch_size?'),
        ('features', 'Did you mean config.model.features?'),
        ('device', 'JAX_PLATFORMS=cpu to use the CPU.'),
        ('wandb', 'for another tracker, add a hook'),
        ('optimizer.name', 'Did you mean config.optimizer.target?'),
        ('model._target_', 'Did you mean config.model.target?'),
        ('hooks.mine.target', "A new hook is set as a whole: --config.hooks.mine='{"),
        ('evals.test.data.bs', 'Did you mean config.evals.test.data.batch_size?'),
        ('optimizer.warmup_steps', '"warmup_steps": "5%"'),
        ('ckpt', 'Did you mean config.checkpoint.every?'),
        ('save-every', 'Did you mean config.checkpoint.every?'),
        ('eval_every', 'Did you mean config.evals.test.every?'),
        ('max_grad_norm', 'Did you mean config.optimizer.clip_norm?'),
        ('gradient_accumulation_steps', 'Did you mean config.accumulate?'),
        ('bf16', 'Write --config.precision.compute=bfloat16'),
        ('model.dtype', 'Write --config.precision.compute=bfloat16'),
        ('output_dir', 'Write --workdir=DIRECTORY.'),
        ('steps', 'Write --config.train_for=10epochs, or 2000steps.'),
        ('model.seed', 'Did you mean config.seed?'),
        ('optimizer.decay', 'Weight decay is an argument of the optimizer'),
        ('mode', 'Write --mode=train'),
        ('num_workers', '"trainer.data.grain_loader:GrainLoader", "workers": 4'),
        ('data.num_workers', '"trainer.data.grain_loader:GrainLoader", "workers": 4'),
    ],
)
def test_key_names_of_other_frameworks(path: str, hint: str) -> None:
    changed = config()
    changed.evals = dict(
        test=dict(data=dict(source=dict(target='trainer.data.mnist:MNIST', split='a')))
    )
    with pytest.raises(UserError) as error:
        overrides.apply(changed, [(path, '1')])
    assert str(error.value).startswith(f'Unknown key config.{path}. ')
    assert hint in str(error.value)


def test_weight_decay_of_an_optimizer_that_has_it() -> None:
    changed = config()
    changed.optimizer = dict(target='optax:adamw', learning_rate=0.1)
    for word, expected in (('wd', 'weight_decay'), ('optimizer.beta1', 'b1')):
        with pytest.raises(UserError, match=rf'Did you mean config\.optimizer\.{expected}\?'):
            overrides.apply(changed, [(word, '1')])


def test_a_key_of_the_same_object_comes_before_the_usual_one() -> None:
    changed = config()
    changed.data.loader = dict(target='trainer.data.grain_loader:GrainLoader', workers=2)
    rate = dict(target='optax:exponential_decay', init_value=0.1, transition_steps=9)
    changed.optimizer = dict(target='optax:adamw', learning_rate={**rate, 'decay_rate': 0.9})
    for path, expected in (
        ('num_workers', 'data.loader.workers'),
        ('data.loader.num_workers', 'data.loader.workers'),
        ('optimizer.decay', 'optimizer.weight_decay'),
        ('optimizer.learning_rate.decay', 'optimizer.learning_rate.decay_rate'),
    ):
        with pytest.raises(UserError, match=rf'Did you mean config\.{expected}\?'):
            overrides.apply(changed, [(path, '1')])


def test_every_path_of_the_table_of_synonyms_exists() -> None:
    changed = loading.to_plain(config())
    changed['evals'] = {'test': {'data': {'source': {'target': 'trainer.data.mnist:MNIST'}}}}
    changed['optimizer'] = {'target': 'optax:adamw', 'learning_rate': 0.1}
    for words, leads in synonyms._TABLE:
        for lead in leads:
            # The optimizer above, adamw, has no momentum.
            if synonyms._is_path(lead) and lead != 'optimizer.momentum':
                assert synonyms.hint(words.split()[0], changed, unknown._may_exist), lead
    words = [word for line, _ in synonyms._TABLE for word in line.split()]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(
    ('given', 'hint'),
    [
        ('precision.compute=bf16', "Did you mean 'bfloat16'?"),
        ('precision={"compute": "fp16"}', "Did you mean 'float16'?"),
        ('precision=bf16', 'Did you mean config.precision.compute=bfloat16?'),
    ],
)
def test_dtype_names_of_other_frameworks(given: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        changed = config()
        path, _, text = given.partition('=')
        overrides.apply(changed, [(path, text)])
        schema.read({k: v for k, v in loading.to_plain(changed).items() if k != 'vars'})
    assert hint in str(error.value)


class Annotated:
    """Annotations of all kinds, as other code has them."""

    def __init__(
        self,
        old: typing.Optional[int] = 3,  # noqa: UP045
        bare: typing.Sequence = (),
        unimported: Iterable[str] | None = (),  # noqa: F821
        unknown: Missing | None = 0.5,  # noqa: F821
        names: tuple[str, ...] = ('a',),
    ) -> None: ...


@pytest.mark.parametrize(
    ('key', 'kind', 'may_be_none'),
    [
        ('old', int | None, True),
        ('bare', None, False),
        ('unimported', None, True),
        ('unknown', None, True),
        ('names', tuple[str, ...], False),
    ],
)
def test_argument_types_from_annotations(key: str, kind: typing.Any, may_be_none: bool) -> None:
    node = {'target': f'{__name__}:Annotated'}
    assert lookup.argument_type(node, key, 'model') == kind
    assert lookup.takes_none(node, key, 'model') is may_be_none
