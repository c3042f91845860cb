# SPDX-License-Identifier: Apache-2.0
"""A wrong path is told with the one that was probably meant."""

from __future__ import annotations

import time
import typing

import pytest

from tests.config.examples import applied, config, referencing
from trainer.config import loading, lookup, overrides, schema, synonyms, unknown
from trainer.config.errors import UserError


@pytest.mark.parametrize(
    ('path', 'meant'),
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
def test_suggestions(path: str, meant: str) -> None:
    with pytest.raises(UserError) as error:
        applied(f'{path}=1')
    assert f'Did you mean {meant}?' in str(error.value)


@pytest.mark.parametrize(
    ('path', 'meant'),
    [
        ('optimizer.learning_rat', 'config.optimizer.learning_rate'),
        ('data.batch_siz', 'config.data.batch_size'),
        ('evals.tset.every', 'config.evals.test.every'),
        ('evals.tset.data.source.split', 'config.evals.test.data.source.split'),
        ('modle.featurs', 'config.model.features'),
    ],
)
def test_more_suggestions(path: str, meant: str) -> None:
    changed = config()
    changed.evals = dict(
        test=dict(data=dict(source=dict(target='trainer.data.mnist:MNIST', split='a')))
    )
    with pytest.raises(UserError) as error:
        overrides.apply(changed, [(path, '1')])
    assert str(error.value).startswith(f'Unknown key config.{path}. ')
    assert f'Did you mean {meant}?' in str(error.value)


def test_no_suggestion_names_a_key_that_does_not_exist() -> None:
    changed = config()
    del changed['vars']
    with pytest.raises(UserError) as error:
        overrides.apply(changed, [('vars.width', '1')])
    assert 'config.evals.width' not in str(error.value)


def test_a_misspelt_variable() -> None:
    with pytest.raises(UserError, match=r'Did you mean config\.vars\.width\?'):
        overrides.apply(referencing(), [('vars.widht', '7')])


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
def test_suggestions_are_likely_or_none(path: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        applied(f'{path}=1')
    assert hint in str(error.value)


def test_a_wrong_key_of_the_file_is_compared_with_the_fixed_keys() -> None:
    changed = loading.to_plain(config())
    changed['checkpoint'] = {'keep_lst': 3}
    known = r'Unknown key config\.checkpoint\.keep_lst\. .* mean config\.checkpoint\.keep_last\?'
    with pytest.raises(UserError, match=known):
        schema.read(changed)


@pytest.mark.parametrize(
    ('path', 'meant'),
    [
        ('modle.x', 'Did you mean config.model?'),
        ('chekpoint.nothing_like_it', 'Did you mean config.checkpoint?'),
        ('data.sorce.splt', 'Did you mean config.data.source.split?'),
        ('data.nothing_like_it', 'config.data has: '),
        ('modle.learning_rate', 'Did you mean config.optimizer.learning_rate?'),
    ],
)
def test_the_first_wrong_name_of_a_path(path: str, meant: str) -> None:
    with pytest.raises(UserError) as error:
        applied(f'{path}=1')
    assert str(error.value).startswith(f'Unknown key config.{path}. ')
    assert meant in str(error.value)


def test_a_long_path_costs_no_time() -> None:
    """Each of its names was once looked for at each depth."""
    start = time.perf_counter()
    for head in ('model', 'modle', 'data.source', 'nothing_like_it', 'ensemble'):
        for depth in (10, 45, 60, 200):
            with pytest.raises(UserError) as error:
                applied(f'{head}{".name" * depth}=1')
            assert len(str(error.value)) < 500
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ('given', 'path', 'meant'),
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
def test_a_wrong_name_within_a_dict(given: str, path: str, meant: str) -> None:
    with pytest.raises(UserError) as error:
        applied(given)
    start = f'config.{path}: ' if 'no such argument' in meant else f'Unknown key config.{path}. '
    assert str(error.value).startswith(start)
    assert meant in str(error.value)


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
def test_words_of_other_frameworks(path: str, hint: str) -> None:
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
    for word, meant in (('wd', 'weight_decay'), ('optimizer.beta1', 'b1')):
        with pytest.raises(UserError, match=rf'Did you mean config\.optimizer\.{meant}\?'):
            overrides.apply(changed, [(word, '1')])


def test_a_sibling_may_be_what_a_foreign_word_means() -> None:
    changed = config()
    changed.data.loader = dict(target='trainer.data.grain_loader:GrainLoader', workers=2)
    rate = dict(target='optax:exponential_decay', init_value=0.1, transition_steps=9)
    changed.optimizer = dict(target='optax:adamw', learning_rate={**rate, 'decay_rate': 0.9})
    for path, meant in (
        ('num_workers', 'data.loader.workers'),
        ('data.loader.num_workers', 'data.loader.workers'),
        ('optimizer.decay', 'optimizer.weight_decay'),
        ('optimizer.learning_rate.decay', 'optimizer.learning_rate.decay_rate'),
    ):
        with pytest.raises(UserError, match=rf'Did you mean config\.{meant}\?'):
            overrides.apply(changed, [(path, '1')])


def test_every_path_that_a_word_leads_to_exists() -> None:
    changed = loading.to_plain(config())
    changed['evals'] = {'test': {'data': {'source': {'target': 'trainer.data.mnist:MNIST'}}}}
    changed['optimizer'] = {'target': 'optax:adamw', 'learning_rate': 0.1}
    for words, leads in synonyms._TABLE:
        for lead in leads:
            if synonyms._is_path(lead) and lead != 'optimizer.momentum':  # Which adamw has not.
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
def test_values_of_other_frameworks(given: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        changed = config()
        path, _, text = given.partition('=')
        overrides.apply(changed, [(path, text)])
        schema.read({k: v for k, v in loading.to_plain(changed).items() if k != 'vars'})
    assert hint in str(error.value)


class Annotated:
    """Annotations as other people write them."""

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
def test_types_that_annotations_give(key: str, kind: typing.Any, may_be_none: bool) -> None:
    node = {'target': f'{__name__}:Annotated'}
    assert lookup.argument_type(node, key, 'model') == kind
    assert lookup.takes_none(node, key, 'model') is may_be_none
