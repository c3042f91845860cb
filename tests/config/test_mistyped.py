# SPDX-License-Identifier: Apache-2.0
"""What a mistyped flag, value or word on the command line was probably meant to be."""

from __future__ import annotations

import pytest

from trainer.config import mistyped
from trainer.modes.flags import FLAGS, MODES, PLATFORMS

KNOWN = [*FLAGS, 'config']


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('confg', 'Did you mean --config?'),
        ('cfg', 'Did you mean --config?'),
        ('workdr', 'Did you mean --workdir?'),
        ('work-dir', 'Write --workdir=DIRECTORY.'),
        ('allow-config-change', 'Did you mean --allow_config_change?'),
        ('mod', 'Did you mean --mode?'),
        ('dry-run', 'Did you mean --mode=dry_run?'),
        ('eval', 'Did you mean --mode=eval?'),
        ('confg.train_for', 'Did you mean --config.train_for?'),
        ('modle.hidden', 'Did you mean --config.model.hidden?'),
        ('optimizer.momentum', 'Config keys need the prefix: --config.optimizer.momentum=VALUE.'),
        ('lr', 'Did you mean --config.optimizer.learning_rate?'),
        ('steps', 'Did you mean --step? Write --config.train_for=10epochs, or 2000steps.'),
        ('overwrite', 'To start over, delete the work directory, or give another one: --workdir='),
        ('nothing_like_it', 'See --help.'),
        ('version', 'See --help.'),
    ],
)
def test_an_unknown_flag(name: str, message: str) -> None:
    text = mistyped.explain_flag(name, KNOWN, list(MODES))
    assert text.startswith(f'Unknown flag --{name}. {message}')
    assert text.count(f'Unknown flag --{name}. {message}') == 1


def test_a_very_long_flag_is_shortened() -> None:
    assert len(mistyped.explain_flag('x' * 5000, KNOWN, list(MODES))) < 200


@pytest.mark.parametrize(
    ('word', 'has_config', 'message'),
    [
        ('mnist', False, '. Did you mean --config=mnist?'),
        ('configs/mnist.py', False, '. Did you mean --config=configs/mnist.py?'),
        ('eval', True, '. Did you mean --mode=eval?'),
        ('mode=eval', True, '. Did you mean --mode=eval?'),
        ('step=3', True, '. Did you mean --step=3?'),
        ('config=mnist', False, '. Did you mean --config=mnist?'),
        ('train_for=5epochs', True, '. Did you mean --config.train_for=5epochs?'),
        ('config.data.shuffle=no', True, '. Did you mean --config.data.shuffle=no?'),
        (
            '\N{EN DASH}mode=eval',
            True,
            ": it begins with '\N{EN DASH}' in place of two hyphens. Did you mean --mode=eval?",
        ),
        ('stray', True, '; overrides are written --config.key=value, without spaces. See --help.'),
    ],
)
def test_a_word_that_is_no_flag(word: str, has_config: bool, message: str) -> None:
    text = mistyped.explain_word(word, KNOWN, list(MODES), has_config)
    assert text == f'{word!r} is not a flag{message}'


@pytest.mark.parametrize(
    ('name', 'value', 'choices', 'hint'),
    [
        ('mode', 'trian', list(MODES), '. Did you mean --mode=train?'),
        ('mode', 'test', list(MODES), '. Did you mean --mode=eval?'),
        ('mode', 'Dry-Run', list(MODES), '. Did you mean --mode=dry_run?'),
        ('mode', '', list(MODES), ''),
        ('mode', 'xyz', list(MODES), ''),
        ('platforms', 'gpu', PLATFORMS, '. Did you mean --platforms=cuda?'),
        ('step', 'bset', ('latest', 'best'), '. Did you mean --step=best?'),
    ],
)
def test_a_value_that_a_flag_does_not_have(
    name: str, value: str, choices: list[str], hint: str
) -> None:
    assert mistyped.value_hint(name, value, choices) == hint


def test_other_names_of_values_lead_to_values_that_exist() -> None:
    assert set(mistyped._VALUES.values()) <= {*MODES, *PLATFORMS}
    assert not mistyped._VALUES.keys() & {*MODES, *PLATFORMS}
