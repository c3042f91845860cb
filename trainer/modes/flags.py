# SPDX-License-Identifier: Apache-2.0
"""The flags of the command line, except --config and its overrides. Imports no JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags

from trainer.config import mistyped
from trainer.config.errors import UserError, short_repr, shorten
from trainer.modes.plan.devices import KINDS as DEVICE_KINDS

MODES = {
    'train': 'train, or resume the run in the work directory',
    'eval': 'evaluate a checkpoint and print its metrics',
    'predict': 'write the predictions of a checkpoint',
    'dry_run': 'run one step, one evaluation batch and one save; keep nothing',
    'summary': 'print the parameters and modules of the model',
    'plan': 'estimate memory, FLOPs and traffic of a step on any number of devices',
    'grad_probe': 'write gradients of the loss with respect to intermediate values',
    'export': 'write a checkpoint as a function that runs without this package',
    'config': 'print the resolved config and the origin of each value',
}
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')

# Flags that apply to some modes only.
_ONLY_WITH = {
    'step': ('eval', 'predict', 'export', 'grad_probe'),
    'allow_config_change': ('train',),
    'devices': ('plan',),
    'device_kind': ('plan',),
    'platforms': ('export',),
    'match': ('grad_probe',),
}


class _Parser(flags.ArgumentParser[Any]):
    """Parses the value of a flag as absl does, but reports a mistake as a `UserError`.

    absl's own errors say neither what was meant nor, for numbers, which text was given.
    """

    def __init__(self, name: str, parser: flags.ArgumentParser[Any]) -> None:
        self.name, self.parser = name, parser
        self.enum_values = getattr(parser, 'enum_values', ())
        # absl prints this below the description of the flag.
        choices = f'one of {", ".join(self.enum_values)}' if self.enum_values else ''
        self.syntactic_help = choices or parser.syntactic_help

    def parse(self, argument: Any) -> Any:
        try:
            return self.parser.parse(argument)
        except (TypeError, ValueError) as error:
            expected = self.syntactic_help or 'true or false'
            hint = mistyped.value_hint(self.name, argument, self.enum_values)
            raise UserError(
                f'--{self.name}: expected {expected}, got {short_repr(argument)}{hint}'
            ) from error

    def flag_type(self) -> str:
        return self.parser.flag_type()


# Not absl's global flags: importing a library that defines flags of its own would add them to
# --help, or clash.
FLAGS = flags.FlagValues()
flags.DEFINE_string(
    'workdir',
    None,
    'Directory of the run; by default runs/NAME, named after the config and its overrides.',
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    'mode',
    'train',
    list(MODES),
    'What to do:\n' + '\n'.join(f'{n}: {text}' for n, text in MODES.items()),
    flag_values=FLAGS,
)
flags.DEFINE_string(
    'step',
    'latest',
    "--mode=eval, predict, export, grad_probe: checkpoint to read: a step, 'latest' or 'best'.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    'allow_config_change',
    False,
    'Resume even though the config has changed.',
    flag_values=FLAGS,
)
flags.DEFINE_string(
    'coordinator',
    None,
    "Address of process 0, 'host:port'. Detected on TPUs and under Slurm and Open MPI.",
    flag_values=FLAGS,
)
flags.DEFINE_integer('num_processes', None, 'Number of processes.', flag_values=FLAGS)
flags.DEFINE_integer('process_id', None, 'Index of this process, from 0.', flag_values=FLAGS)
flags.DEFINE_integer(
    'init_timeout',
    300,
    'Seconds to wait for the other processes at startup.',
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    'heartbeat_timeout',
    100,
    'Seconds without a heartbeat after which a process is considered dead.',
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    'devices',
    None,
    '--mode=plan: number of devices to plan for; they are virtual, and nothing runs.',
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    'device_kind',
    None,
    DEVICE_KINDS,
    '--mode=plan: accelerator to check memory and speed against.',
    flag_values=FLAGS,
)
flags.DEFINE_list(
    'platforms',
    ['cpu', 'cuda', 'tpu'],
    '--mode=export: platforms to compile the function for.',
    flag_values=FLAGS,
)
flags.DEFINE_multi_string(
    'match',
    [],
    '--mode=grad_probe: regular expression for whole module paths (repeatable)',
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    'helpconfig',
    False,
    'List all config keys and exit; with --config, those of a config with its values.',
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    'help', False, 'Show this help, with --config also all config keys.', flag_values=FLAGS
)

for _flag in (FLAGS[name] for name in FLAGS):
    # The parsers of text accept everything.
    if isinstance(_flag.parser, flags.EnumParser | flags.BooleanParser | flags.IntegerParser):
        _flag.parser = _Parser(_flag.name, _flag.parser)


def parse(argv: Sequence[str], *, has_config: bool) -> None:
    """Parses a command line without --config and overrides into `FLAGS`, and checks it.

    Args:
        argv: program name and arguments.
        has_config: whether --config was given, for suggestions.

    Raises:
        UserError: for a mistake.
    """
    for name in FLAGS:
        FLAGS[name].unparse()  # Forget the flags of an earlier call.
    known = [*FLAGS, 'config']
    # As a flag of its own, `h` would be listed in --help and the reference.
    words = ['--help' if word == '-h' else word for word in argv]
    try:
        positional = FLAGS(words)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(mistyped.explain_flag(error.flagname, known, list(MODES))) from error
    except flags.Error as error:
        raise UserError(f'{shorten(str(error), 400)}. See --help.') from error
    if positional:
        text = mistyped.explain_word(positional[0], known, list(MODES), has_config)
        raise UserError(text)
    _check_values()


def _check_values() -> None:
    # An empty shell variable gives '', and a forgotten value makes absl take the next flag for it.
    if FLAGS.workdir == '' or (FLAGS.workdir or '').startswith('-'):
        raise UserError(f'--workdir needs a value, got {FLAGS.workdir!r}')
    for name, modes in _ONLY_WITH.items():
        if FLAGS[name].present and FLAGS.mode not in modes:
            *others, last = modes
            which = f'{", ".join(others)} or {last}' if others else last
            raise UserError(
                f'--{name} requires --mode={which}; --mode={FLAGS.mode} does not use it'
            )
    aliases = ('latest', 'best')
    if FLAGS.step not in aliases and not FLAGS.step.isdecimal():
        hint = mistyped.value_hint('step', FLAGS.step, aliases)
        raise UserError(
            f"--step: expected a step, 'latest' or 'best', got {short_repr(FLAGS.step)}{hint}"
        )
    unknown = [name for name in FLAGS.platforms if name not in PLATFORMS]
    if unknown or not FLAGS.platforms:
        given = short_repr(unknown[0]) if unknown else 'nothing'
        hint = mistyped.value_hint('platforms', unknown[0], PLATFORMS) if unknown else ''
        raise UserError(f'--platforms: expected some of {", ".join(PLATFORMS)}, got {given}{hint}')
