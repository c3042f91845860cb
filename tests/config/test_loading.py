# SPDX-License-Identifier: Apache-2.0
"""Config files: how they are called, what they may contain, and the messages about mistakes."""

from __future__ import annotations

import pathlib

import pytest

from tests import command
from tests.command import ROOT
from trainer.config import identity, loading, overrides, schema, show
from trainer.config.errors import UserError

HEAD = 'import ml_collections\n'
PLACEHOLDERS = HEAD + (
    'def get_config():\n'
    '    config = ml_collections.ConfigDict(dict(model=dict(target="trainer.models.cnn:CNN")))\n'
    '    config.model.hidden = ml_collections.config_dict.required_placeholder(int)\n'
    '    config.model.dropout_rate = ml_collections.config_dict.placeholder(float)\n'
    '    config.model.num_classes = 3\n'
    '    return config\n'
)


def load(folder: pathlib.Path, text: str, arg: str = '') -> loading.LoadedConfig:
    (folder / 'mine.py').write_text(text)
    return loading.load(f'{folder / "mine.py"}{arg}')


def config_file_returning(value: str) -> str:
    return f'{HEAD}def get_config():\n    return ml_collections.ConfigDict(dict(a={value}))\n'


def test_the_argument_follows_the_colon(tmp_path: pathlib.Path) -> None:
    text = f'{HEAD}def get_config(arg="x"):\n    return ml_collections.ConfigDict(dict(a=arg))\n'
    for given, arg, value in ((':big', 'big', 'big'), (':', '', ''), ('', '', 'x')):
        loaded = load(tmp_path, text, given)
        assert (loaded.name, loaded.arg, loaded.config.a) == ('mine', arg, value)


@pytest.mark.parametrize(
    ('signature', 'arg', 'message'),
    [
        ('', ':big', r"get_config\(\) takes no argument, got 'big'"),
        ('arg', '', r"missing a required argument: 'arg'. It gets at most one argument"),
        ('a, b', ':big', r"missing a required argument: 'b'. It gets at most one argument"),
    ],
)
def test_signatures_that_cannot_be_called(
    tmp_path: pathlib.Path, signature: str, arg: str, message: str
) -> None:
    with pytest.raises(UserError, match=rf'mine\.py: .*{message}'):
        load(tmp_path, f'def get_config({signature}):\n    return 1\n', arg)


@pytest.mark.parametrize('spec', ['configs/mnist.py', 'mnist'])
def test_a_bundled_config_is_found_from_anywhere(
    spec: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = loading.load(spec)
    assert (loaded.name, loaded.path) == ('mnist', ROOT / 'configs' / 'mnist.py')
    assert identity.default_workdir(loaded, []) == 'runs/mnist'


def test_a_users_config_takes_precedence_over_a_bundled_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mnist').mkdir()  # --config=mnist does not mean this directory.
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'mnist.py').write_text(config_file_returning('3'))
    for spec in ('configs/mnist.py', 'mnist'):
        assert loading.load(spec).config.a == 3
    with pytest.raises(UserError, match="'configs' is a directory"):
        loading.load('configs')


def test_a_config_file_may_define_dataclasses(tmp_path: pathlib.Path) -> None:
    text = (
        'from __future__ import annotations\n'
        'import dataclasses\n'
        '@dataclasses.dataclass\n'
        'class Size:\n'
        '    width: int = 3\n'
    )
    assert load(tmp_path, text + config_file_returning('Size().width')).config.a == 3


def test_an_error_names_the_line_in_the_config_file(tmp_path: pathlib.Path) -> None:
    """Although ml_collections raises it: the line to fix is in the config file."""
    text = (
        f'{HEAD}def get_config():\n    config = ml_collections.ConfigDict()\n    config.a.b = 1\n'
    )
    with pytest.raises(UserError, match=r'AttributeError: .*mine\.py, line 4\)') as error:
        load(tmp_path, text)
    assert 'site-packages' not in str(error.value)


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        ('{1, 2}', r'config\.a: expected a number, .*, got set \{1, 2\}'),
        ('(1, dict(b=object()))', r'config\.a\[1\]\.b: expected a number'),
        ('__import__("fractions").Fraction', r"config\.a: .*dict\(ref='fractions:Fraction'\)"),
        ('__import__("numpy").int64(3)', r'config\.a: .*write a plain number'),
        ('{1: 2, "b": 3}', 'a dict of the config mixes names and other keys'),
        ('({None: 1},)', r'config\.a\[0\]: expected names as the keys of a dict, .*got None'),
        ('({"__class__": 1},)', r"config\.a\[0\]: '__class__' cannot be the name of a key"),
        ('10**400', r'config\.a: 10000.* does not fit 64 bits'),
    ],
)
def test_values_that_a_config_cannot_contain(
    tmp_path: pathlib.Path, value: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, config_file_returning(value))


def test_a_required_placeholder_needs_a_value(tmp_path: pathlib.Path) -> None:
    config = load(tmp_path, PLACEHOLDERS).config
    assert '(required)' in show.format_helpconfig(loading.to_plain(config))
    with pytest.raises(UserError, match=r'config\.model\.hidden is required .*: --config\.model'):
        schema.read(loading.to_plain(config))


def test_mode_config_shows_required_keys(tmp_path: pathlib.Path) -> None:
    file = tmp_path / 'waiting.py'
    file.write_text(
        'import ml_collections\n\n\ndef get_config():\n'
        '    config = ml_collections.ConfigDict({"model": {"target": "trainer.models.mlp:MLP"}})\n'
        '    config.model.features = ml_collections.config_dict.required_placeholder(tuple)\n'
        '    config.seed = ml_collections.config_dict.required_placeholder(int)\n'
        '    for name in ("task", "data", "optimizer", "train_for"):\n'
        '        config[name] = ml_collections.config_dict.required_placeholder(object)\n'
        '    return config\n'
    )
    done = command.run(f'--config={file}', '--mode=config')
    assert done.code == 0, done.err
    assert done.out.count('(required)') == 6
    done = command.run(f'--config={file}', '--mode=dry_run')
    assert (
        done.code == 2
        and 'config.data is required but has no value; set it: --config.data=' in done.err
    )
    file.write_text(file.read_text().replace('config.seed', 'config.sed'))
    done = command.run(f'--config={file}', '--mode=config')
    assert done.code == 2 and 'Unknown key config.sed.' in done.err


def test_a_placeholder_has_its_declared_type(tmp_path: pathlib.Path) -> None:
    config = load(tmp_path, PLACEHOLDERS).config
    overrides.apply(config, [('model.hidden', '5'), ('model.dropout_rate', '1')])
    assert (config.model.hidden, config.model.dropout_rate) == (5, 1.0)
    for path, text in (('model.hidden', '5.5'), ('model.dropout_rate', 'high')):
        with pytest.raises(UserError, match=rf'config\.{path}: expected'):
            overrides.apply(load(tmp_path, PLACEHOLDERS).config, [(path, text)])


def test_a_merge_gives_a_required_placeholder_its_value(tmp_path: pathlib.Path) -> None:
    config = load(tmp_path, PLACEHOLDERS).config
    overrides.apply(config, [('model', '{"hidden": 7}')])
    assert loading.to_plain(config)['model'] == {
        'target': 'trainer.models.cnn:CNN', 'hidden': 7, 'dropout_rate': None, 'num_classes': 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    'body',
    [
        'width = SIZES[arg]',
        'width = {"small": 1, "large": 2}[arg.lower()]',
        'width = dict(small=1, large=2)[arg]',
        'assert arg in SIZES, arg',
        'assert arg in SIZES.keys(), arg',
        'assert arg in ("small", "large")',
        'size = arg or "small"\n    if size not in SIZES: raise ValueError("no such size")',
        'if arg == "small": pass\n    elif "large" == arg: pass\n    else: raise ValueError(arg)',
        'match arg:\n        case "small" | "large": pass\n        case _: raise ValueError(arg)',
        'match arg:\n        case "small": return 1\n        case "large": return 2\n    return',
    ],
)
def test_an_unknown_argument_lists_the_known_ones(tmp_path: pathlib.Path, body: str) -> None:
    text = (
        f'SIZES = {{"small": 1, "large": 2}}\ndef get_config(arg=""):\n    {body}\n    return 1\n'
    )
    with pytest.raises(UserError) as error:
        load(tmp_path, text, ':larg')
    message = str(error.value)
    assert message.startswith(f'{tmp_path / "mine.py"}: get_config ')
    assert message.endswith("It knows 'small', 'large'. Did you mean 'large'?")
    assert '\n' not in message


def test_known_arguments_from_the_annotation(tmp_path: pathlib.Path) -> None:
    text = (
        'from __future__ import annotations\nfrom typing import Literal\n'
        'def get_config(arg: Literal["a", "b"] = "a"):\n    return {}[arg]\n'
    )
    with pytest.raises(UserError, match=r"does not know the argument 'c'\. It knows 'a', 'b'\.$"):
        load(tmp_path, text, ':c')


def test_an_arbitrary_argument_has_no_list(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r'failed: ValueError: .*\(.*mine\.py, line 2\)$'):
        load(tmp_path, 'def get_config(arg):\n    return int(arg)\n', ':c')
    # A valid argument for which the function fails for another reason.
    text = 'def get_config(arg):\n    return {"a": 1 / 0}[arg]\n'
    with pytest.raises(UserError, match=r'ZeroDivisionError: .*line 2\)$'):
        load(tmp_path, text, ':a')


def test_a_key_with_a_dot_in_a_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"Nest dicts instead.*'12\.5%', write a whole"):
        load(tmp_path, config_file_returning('{"12.5%": 0.1}'))
