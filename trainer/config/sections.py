# SPDX-License-Identifier: Apache-2.0
"""The fixed keys of a config, as dataclasses: the one place that says what may be set.

A field's annotation is its type on the command line, its default is what a config that leaves it
out gets. `Node` is a dict that names an object (`target`, `ref`); `trainer.experiment` builds it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from trainer.config.durations import Duration

Node = dict[str, Any]
Patterns = str | tuple[str, ...] | None
Dtype = Literal['float32', 'bfloat16', 'float16']
Sharding = Literal['replicated', 'fsdp'] | Node

NEVER = Duration.parse('never')
EACH_EPOCH = Duration.parse('1 epochs')
EACH_100_STEPS = Duration.parse('100 steps')
TEN_STEPS = Duration.parse('10 steps')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSection:
    """`config.data`: where training batches come from."""

    source: Node
    batch_size: int
    transforms: tuple[Node, ...] = ()
    device_transforms: tuple[Node, ...] = ()
    remainder: Literal['carry', 'pad', 'drop'] = 'carry'
    shuffle: bool = True
    seed: int | None = None
    repeat_batch: int | None = None
    prefetch: int = 2
    loader: Node = dataclasses.field(
        default_factory=lambda: {'target': 'trainer.data.loader:TrainLoader'}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalDataSection:
    """`config.evals.<name>.data`: the split that is evaluated."""

    source: Node
    batch_size: int | None = None
    transforms: tuple[Node, ...] = ()
    device_transforms: tuple[Node, ...] = ()
    loader: Node = dataclasses.field(
        default_factory=lambda: {'target': 'trainer.data.loader:EvalLoader'}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSection:
    """`config.evals.<name>`: an evaluation, when it runs and on which parameters.

    With `ema`, on their moving average; otherwise on what `config.optimizer.eval_params` returns,
    if it is set.
    """

    data: EvalDataSection
    every: Duration = EACH_EPOCH
    final: bool = True
    ema: bool = False
    task: Node | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupSection:
    """`config.optimizer.groups.<name>`: the optimizer of some parameters, and their loss."""

    params: str | tuple[str, ...]
    loss: str | None = None
    clip_norm: float | None = None
    decay_mask: Patterns = None
    eval_params: Node | None = None
    lr_multipliers: tuple[tuple[str, float], ...] | None = None
    node: Node = dataclasses.field(default_factory=dict, metadata={'rest': True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """`config.optimizer`: our own keys; all others go to its target.

    `eval_params` names a function (state of the target, parameters) -> parameters; its result is
    used instead of the parameters in evaluations, predictions and exports.
    """

    clip_norm: float | None = None
    decay_mask: Patterns = None
    eval_params: Node | None = None
    freeze: Patterns = None
    freeze_statistics: Patterns = None
    groups: dict[str, GroupSection] = dataclasses.field(default_factory=dict)
    lr_multipliers: tuple[tuple[str, float], ...] | None = None
    node: Node = dataclasses.field(default_factory=dict, metadata={'rest': True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaSection:
    """`config.ema`: a moving average of the parameters."""

    decay: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionSection:
    """`config.precision`: the dtypes of parameters, computation and output.

    The optimizer state of half-precision parameters is float32. Without `compute`, modules use
    their own dtypes. The output is float32 by default. `loss_scale` is the initial value of a
    dynamic loss scale; with float16 it defaults to 65,536, and 0 turns it off.
    """

    params: Dtype = 'float32'
    compute: Dtype | None = None
    output: Dtype = 'float32'
    loss_scale: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestSection:
    """`config.checkpoint.best`: the checkpoint that is kept for its metric.

    `mode` says which values are better; losses and errors are better below, accuracies above.
    """

    metric: str
    mode: Literal['max', 'min'] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """`config.checkpoint`: when the state is saved and what is kept."""

    every: Duration = NEVER
    keep_last: int = 2
    keep_every: Duration = NEVER
    best: BestSection | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStoppingSection:
    """`config.early_stopping`: the end of a run whose metric has stopped getting better.

    `mode` says which values are better; losses and errors are better below, accuracies above.
    """

    metric: str
    mode: Literal['max', 'min'] | None = None
    min_delta: float = 0.0
    patience: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleSection:
    """`config.ensemble`: members of other seeds, trained by one program.

    `vary` is shaped like the config, with a value for each member in its leaves:
    `dict(optimizer=dict(learning_rate=(0.1, 0.03)))`.
    """

    size: int
    vary: dict[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFromSection:
    """`config.init_from`: the checkpoint that a fresh run takes its weights from."""

    path: str
    step: int | str = 'latest'
    at: str = ''
    layout: Literal['flax', 'pre_linen', 'torch'] = 'flax'
    member: int | None = None
    include: Patterns = None
    exclude: Patterns = None
    rename: tuple[tuple[str, str] | Node, ...] = ()
    flatten: tuple[tuple[str, tuple[int, int, int]], ...] = ()
    on_missing: Literal['error', 'init'] = 'error'
    ema: bool = False
    optimizer: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSection:
    """`config.profile`: a trace of some steps, which begins when `start` of them are done."""

    start: Duration = TEN_STEPS
    steps: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureSection:
    """`config.capture.<name>`: what modules return or sow, after some steps.

    `match` has patterns for the whole path of a module or of a sown value. By default that is at
    every row of metrics. Files hold the first `rows` rows of each array, and the last `keep` stay.
    """

    match: str | tuple[str, ...]
    every: Duration | None = None
    what: tuple[Literal['summary', 'histogram', 'file'], ...] = ('summary',)
    rows: int = 8
    keep: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardSection:
    """`config.guard`: what a run does when a loss, gradient, parameter or slot is not finite."""

    non_finite: Literal['stop', 'warn'] = 'stop'


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSection:
    """`config.log`: when a row of metrics is written, and what is in it.

    Attributes:
        every: when a row is written.
        tensorboard: whether event files are written beside it.
        learning_rates: where other learning rates than those of the optimizer and its groups stand
            below `config.optimizer`, such as 'args[1].learning_rate' of an `optax:chain`.
    """

    every: Duration = EACH_100_STEPS
    tensorboard: bool = True
    learning_rates: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sections:
    """The top level of a config."""

    train_for: Duration
    model: Node
    task: Node
    data: DataSection
    optimizer: OptimizerSection
    seed: int = 0
    evals: dict[str, EvalSection] = dataclasses.field(default_factory=dict)
    accumulate: int = 1
    ensemble: EnsembleSection | None = None
    ema: EmaSection | None = None
    steps_per_call: int = 1
    early_stopping: EarlyStoppingSection | None = None
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {'data': -1})
    precision: PrecisionSection | None = None
    sharding: Sharding | tuple[Sharding, ...] = ()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    profile: ProfileSection | None = None
    capture: dict[str, CaptureSection] = dataclasses.field(default_factory=dict)
    guard: GuardSection = GuardSection()
    init_from: InitFromSection | None = None
    surgery: tuple[Node, ...] = ()
    hooks: dict[str, Node] = dataclasses.field(default_factory=dict)
    step: Node | None = None
    vars: Any = dataclasses.field(default_factory=dict)  # A dict of anything: check_vars.
