# SPDX-License-Identifier: Apache-2.0
"""Messages for mistyped flags, values and words on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config import schema, suggest, synonyms
from trainer.config.errors import short_repr, shorten
from trainer.config.sections import Sections

# Least similarity of a flag to be suggested. At 0.6, `version` would be similar to `precision`.
_CUTOFF = 0.65

# What text editors and chats turn '--' into: an en dash, an em dash or a minus sign.
_DASHES = '\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}'

# Other names of the values of --mode and --platforms.
_VALUES = {
    'test': 'eval', 'validate': 'eval', 'validation': 'eval', 'val': 'eval', 'fit': 'train',
    'training': 'train', 'resume': 'train', 'infer': 'predict', 'inference': 'predict',
    'dry': 'dry_run', 'check': 'dry_run', 'params': 'summary', 'parameters': 'summary',
    'memory': 'plan', 'gradients': 'grad_probe', 'show': 'config',
    'gpu': 'cuda', 'nvidia': 'cuda', 'amd': 'rocm',
}  # fmt: skip


def explain_flag(name: str, known: Sequence[str], modes: Sequence[str]) -> str:
    """Returns the message for a flag that does not exist, with what was probably meant.

    Args:
        name: the flag without its dashes: 'confg', 'optimizer.momentum'.
        known: the names of all flags, 'config' too.
        modes: the values of --mode.
    """
    name = shorten(name)
    start = f'Unknown flag --{name}.'
    first, _, rest = name.partition('.')
    keys = list(schema.fields(Sections))
    if first in keys:
        return f'{start} Config keys need the prefix: --config.{name}=VALUE.'
    # A later line wins: a flag is likelier than a mode, and a mode than a key.
    suggestions = {key: f'--config.{key}' for key in keys}
    if not rest:
        suggestions |= {mode: f'--mode={mode}' for mode in modes}
        suggestions |= {flag: f'--{flag}' for flag in known}
    else:
        suggestions['config'] = '--config'
    nearest = suggest.nearest_name(_normalize(first), suggestions, _CUTOFF)
    suggestion = suggestions[nearest] if nearest else None
    # Synonyms are written for keys in a file; here the key is given as a flag.
    hint = synonyms.hint(name, {}, lambda *_: True) or ''
    hint = hint.replace('mean config.', 'mean --config.')
    parts = [start]
    if suggestion and f'{suggestion}=' not in hint:
        parts.append(suggest.question(f'{suggestion}.{rest}' if rest else suggestion))
    if hint:
        parts.append(hint)
    return ' '.join(parts if parts[1:] else [start, 'See --help.'])


def explain_word(word: str, known: Sequence[str], modes: Sequence[str], has_config: bool) -> str:
    """Returns the message for a word that is not a flag, with what was probably meant.

    Args:
        word: the word: 'eval', 'train_for=5epochs'.
        known: the names of all flags, 'config' too.
        modes: the values of --mode.
        has_config: whether --config is given.
    """
    start = f'{short_repr(word)} is not a flag'
    if word[:1] in tuple(_DASHES):
        dash = f'it begins with {word[0]!r} in place of two hyphens'
        return f'{start}: {dash}. Did you mean --{word.lstrip(_DASHES)}?'
    name, equals, _ = word.partition('=')
    key = name.removeprefix('config.')
    suggestion = None
    if equals and name in known:
        suggestion = f'--{word}'
    elif equals and key.partition('.')[0] in schema.fields(Sections):
        suggestion = f'--config.{word.removeprefix("config.")}'
    elif word in modes:
        suggestion = f'--mode={word}'
    elif not equals and not has_config:
        suggestion = f'--config={word}'
    if suggestion:
        return f'{start}. Did you mean {suggestion}?'
    return f'{start}; overrides are written --config.key=value, without spaces. See --help.'


def value_hint(name: str, value: str, choices: Sequence[str]) -> str:
    """Returns '. Did you mean --mode=eval?' for a value that a flag does not have, or ''.

    Args:
        name: the flag.
        value: the value that was given.
        choices: the values that it may have.
    """
    word = _normalize(value)
    suggestion = _VALUES.get(word, word)
    if suggestion not in choices:
        suggestion = suggest.nearest_name(word, choices) or ''
    return f'. Did you mean --{name}={suggestion}?' if suggestion else ''


def _normalize(name: str) -> str:
    return name.lower().replace('-', '_')
