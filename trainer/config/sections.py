# SPDX-License-Identifier: Apache-2.0
"""The fixed keys of a config as dataclasses, with their types, defaults and descriptions.

The annotation of a field is the type of the key, its default the value for a config that does not
set it, and its line under `Attributes` the text of `--helpconfig` and of the reference. A `Node` is
a dict that describes an object (`target`, `ref`); `trainer.experiment` creates it.

A field with `rest` in its metadata gets all other keys of its section, which describe an object.
With `ref`, a section made in Python may also be the object alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from trainer.config.durations import Duration

# An object. `schema` recognizes it by exactly this type; its keys are arguments, not fixed keys.
Node = dict[str, Any]
Patterns = str | tuple[str, ...] | None
Dtype = Literal['float32', 'bfloat16', 'float16']
Sharding = Literal['replicated', 'fsdp'] | Node

NEVER = Duration.parse('never')
EACH_EPOCH = Duration.parse('1 epoch')
EACH_100_STEPS = Duration.parse('100 steps')
TEN_STEPS = Duration.parse('10 steps')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSection:
    """`config.data`: where training batches come from.

    Attributes:
        source: the dataset, such as `trainer.data.mnist:MNIST`.
        batch_size: number of examples in a batch, over all devices and processes.
        transforms: functions of a batch, run with NumPy on the host, in this order, or
            transforms of Grain.
        device_transforms: functions of a batch, run on the devices in the compiled step, after
            `transforms`; they may take a random `key`, and `training`.
        remainder: what happens to the last, incomplete batch of an epoch: 'carry' fills it from
            the next epoch, 'pad' fills it with padding, 'drop' leaves it out.
        shuffle: whether each epoch has a new random order; otherwise the order of the source.
        seed: seed of the order and of random transforms; None for `config.seed`.
        repeat_batch: number of batches to train on, over and over, to check that the model can
            overfit them; None for all of the data.
        prefetch: number of blocks of batches to prepare ahead of the step.
        loader: makes batches of the source; the other keys of this section are its arguments.
    """

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
    """`config.evals.<name>.data`: the split to evaluate.

    Attributes:
        source: the dataset; each example is evaluated exactly once.
        batch_size: number of examples in a batch, over all devices and processes; None for
            `config.data.batch_size`.
        transforms: functions of a batch, run with NumPy on the host; those of `config.data` are
            not inherited.
        device_transforms: functions of a batch, run on the devices in the compiled step; not
            inherited either.
        loader: makes batches of the source; `trainer.data.streaming:StreamEvalLoader` for a
            stream.
    """

    source: Node
    batch_size: int | None = None
    transforms: tuple[Node, ...] = ()
    device_transforms: tuple[Node, ...] = ()
    loader: Node = dataclasses.field(
        default_factory=lambda: {'target': 'trainer.data.loader:EvalLoader'}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreSection:
    """`config.evals.<name>.score`: what the host computes from the predictions for all examples.

    The other keys name a function (`ref`) of all examples, or an object (`target`) that is created
    for each evaluation, called with each batch and closed after the last one.

    Attributes:
        fields: fields of the batch to pass in addition to the predictions.
    """

    fields: tuple[str, ...] = ()
    node: Node = dataclasses.field(default_factory=dict, metadata={'rest': True, 'ref': True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSection:
    """`config.evals.<name>`: an evaluation.

    With `ema`, it uses the moving average of the parameters; otherwise the result of
    `config.optimizer.eval_params`, if that is set, or the parameters themselves.

    Attributes:
        data: the split, and how it is read.
        every: how often it runs during training.
        final: whether it also runs at the end of training.
        ema: whether it uses the moving average of the parameters, which `config.ema` keeps.
        task: the task; None for `config.task`.
        model: arguments of the model that differ in this evaluation, merged over
            `config.model`; the variables are the same.
        score: what the host computes from the predictions for all examples, or None.
    """

    data: EvalDataSection
    every: Duration = EACH_EPOCH
    final: bool = True
    ema: bool = False
    task: Node | None = None
    model: dict[str, object] = dataclasses.field(default_factory=dict)
    score: ScoreSection | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupSection:
    """`config.optimizer.groups.<name>`: the optimizer of a group of parameters, and their loss.

    Attributes:
        params: patterns of the parameters of the group; every parameter must be in exactly one
            group.
        loss: name of the loss that the group minimizes; None for a task with a single loss.
        clip_norm: largest global norm of the group's gradients; larger ones are scaled down.
        decay_mask: patterns of the parameters with weight decay; None leaves it to the
            optimizer.
        eval_params: a function (optimizer state, parameters) -> parameters to evaluate.
        lr_multipliers: (pattern, factor) pairs that scale the updates; the first match counts,
            and each parameter of the group needs one.
    """

    params: str | tuple[str, ...]
    loss: str | None = None
    clip_norm: float | None = None
    decay_mask: Patterns = None
    eval_params: Node | None = None
    lr_multipliers: tuple[tuple[str, float], ...] | None = None
    node: Node = dataclasses.field(default_factory=dict, metadata={'rest': True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """`config.optimizer`: the optimizer; keys that are not listed here are arguments of its target.

    `eval_params` is a function (optimizer state, parameters) -> parameters; its result is used in
    place of the parameters in evaluations, predictions and exports.

    Attributes:
        clip_norm: largest global norm of the gradients; larger ones are scaled down.
        decay_mask: patterns of the parameters with weight decay; None leaves it to the
            optimizer.
        eval_params: a function (optimizer state, parameters) -> parameters, used in
            evaluations, predictions and exports.
        freeze: patterns of the parameters that are not trained and have no optimizer state.
        freeze_statistics: patterns of the batch statistics that training does not update.
        groups: optimizers for groups of parameters, by name; each has the keys of an optimizer.
        lr_multipliers: (pattern, factor) pairs that scale the updates; the first match counts,
            and each parameter needs one.
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
    """`config.ema`: a moving average of the parameters.

    Attributes:
        decay: fraction of the old average that one step keeps, at least 0 and below 1.
    """

    decay: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionSection:
    """`config.precision`: the dtypes of parameters, computation and output.

    The optimizer state of half-precision parameters is float32. Without `compute`, modules use
    their own dtypes. The output is float32 by default. `loss_scale` is the initial value of a
    dynamic loss scale; with float16 it defaults to 65,536, and 0 turns it off.

    Attributes:
        params: dtype of the parameters; the optimizer computes in float32 in any case.
        compute: dtype in which modules without a dtype of their own compute; None leaves it to
            the modules.
        output: dtype of the model's output.
        loss_scale: initial value of the dynamic loss scale; None means 65,536 with float16 and
            no scale otherwise, 0 turns it off.
    """

    params: Dtype = 'float32'
    compute: Dtype | None = None
    output: Dtype = 'float32'
    loss_scale: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestSection:
    """`config.checkpoint.best`: the best checkpoint according to a metric, which is kept as well.

    Attributes:
        metric: the metric, such as 'eval/test/accuracy'; it must be measured at steps that save a
            checkpoint.
        mode: whether the smallest or the largest value is best; None derives it from the name
            (loss, error and perplexity: min; accuracy: max).
    """

    metric: str
    mode: Literal['max', 'min'] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """`config.checkpoint`: when checkpoints are saved and which are kept.

    Attributes:
        every: how often a checkpoint is saved; a run with a work directory also saves one at its
            end.
        keep_last: number of newest checkpoints to keep, at least 1.
        keep_every: checkpoints at multiples of this are kept as well.
        best: keeps the best checkpoint according to a metric as well; None for no metric.
    """

    every: Duration = NEVER
    keep_last: int = 2
    keep_every: Duration = NEVER
    best: BestSection | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStoppingSection:
    """`config.early_stopping`: ends a run whose metric no longer improves.

    Attributes:
        metric: the metric that must improve, such as 'eval/test/loss'.
        mode: whether smaller or larger values are better; None derives it from the name (loss,
            error and perplexity: min; accuracy: max).
        min_delta: smallest change that counts as an improvement, in units of the metric.
        patience: number of evaluations in a row that may bring no improvement; the next one ends
            the run.
    """

    metric: str
    mode: Literal['max', 'min'] | None = None
    min_delta: float = 0.0
    patience: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleSection:
    """`config.ensemble`: several models with different seeds, trained by one program.

    `vary` has the structure of the config, with one value for each member in its leaves:
    `dict(optimizer=dict(learning_rate=(0.1, 0.03)))`.

    Attributes:
        size: number of members.
        vary: values that differ between members, with the structure of the config and a tuple of
            `size` values in each leaf.
    """

    size: int
    vary: dict[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFromSection:
    """`config.init_from`: the checkpoint or file from which a new run loads its weights.

    Attributes:
        path: a work directory, checkpoint, `.msgpack`, `.safetensors` or PyTorch file.
        step: which checkpoint of a run: 'latest', 'best' or a number.
        at: key path in the checkpoint to the state or the parameters, such as 'model'.
        layout: the layout of the weights: that of Flax, of Flax before Linen, or of PyTorch.
        member: index of the member to load from the checkpoint of an ensemble.
        include: patterns of this model's paths to load; None for all.
        exclude: patterns of this model's paths that keep their initial values.
        rename: (pattern, replacement) pairs, applied to the paths of the checkpoint as by
            `re.sub`, to turn them into those of the model.
        flatten: for PyTorch, (pattern, (channels, height, width)) pairs of the dense layers that
            follow a flattening.
        on_missing: what happens to a parameter that the checkpoint lacks: 'error', or 'init' to
            keep its initial value.
        ema: whether to load the moving average as the parameters.
        optimizer: whether to load the state of the optimizer as well.
        vocabulary: 'same' to refuse a run whose data had other tokens, 'any' to load it.
    """

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
    vocabulary: Literal['same', 'any'] = 'same'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSection:
    """`config.profile`: a profiler trace of some steps.

    Attributes:
        start: length of training before the trace.
        steps: number of steps in the trace.
    """

    start: Duration = TEN_STEPS
    steps: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureSection:
    """`config.capture.<name>`: records the outputs of modules, and sown values, at some steps.

    Attributes:
        match: patterns of the paths of modules or sown values; `(model)` is the output of the
            model.
        every: how often they are recorded; None for each row of metrics.
        what: what is recorded: 'summary' for statistics as metrics, 'histogram' for TensorBoard,
            'file' for arrays in files.
        rows: number of examples of each array in a file.
        keep: number of newest files to keep.
    """

    match: str | tuple[str, ...]
    every: Duration | None = None
    what: tuple[Literal['summary', 'histogram', 'file'], ...] = ('summary',)
    rows: int = 8
    keep: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class HookSection:
    """`config.hooks.<name>`: a function that is called with each event of the run.

    The other keys name the function (`ref`), or an object to call (`target`).

    Attributes:
        every: how often the hook is called with an event 'step', in place of 'log', 'eval' and
            'save'; None for those events (the hook always gets 'start' and 'end').
        on_error: what happens if the hook raises an error: 'stop' saves and ends the run, 'warn'
            logs the error, and the hook is called again at its next event.
    """

    every: Duration | None = None
    on_error: Literal['stop', 'warn'] = 'stop'
    node: Node = dataclasses.field(default_factory=dict, metadata={'rest': True, 'ref': True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardSection:
    """`config.guard`: checks that losses, gradients, parameters and slots are finite.

    Attributes:
        non_finite: what a run does when one of them is not finite: 'stop' ends it, 'warn' warns
            once.
    """

    non_finite: Literal['stop', 'warn'] = 'stop'


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSection:
    """`config.log`: when a row of metrics is written, and what is in it.

    Attributes:
        every: how often a row of metrics is written.
        tensorboard: whether TensorBoard event files are written as well.
        learning_rates: key paths in `config.optimizer` of learning rates to log in addition to
            those of the optimizer and its groups, such as 'args[1].learning_rate'.
    """

    every: Duration = EACH_100_STEPS
    tensorboard: bool = True
    learning_rates: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sections:
    """The top level of a config.

    Attributes:
        train_for: length of training, such as '10 epochs'.
        model: the model, a module of Linen, Klinen or NNX.
        task: computes the loss and metrics of a batch with the model.
        data: where training batches come from.
        optimizer: the optimizer; keys other than those below are arguments of its target.
        seed: seed of initialization, dropout, order and augmentation.
        evals: evaluations, by name.
        accumulate: number of micro-batches that a batch is divided into; the gradients are those
            of the whole batch.
        ensemble: trains several models in one program; None for a single model.
        ema: a moving average of the parameters; None for none.
        steps_per_call: number of steps in one call of the compiled program, for runs where the
            overhead of calls dominates.
        early_stopping: ends the run when a metric no longer improves; None for never.
        mesh: size of each axis of the device mesh; -1 stands for all remaining devices.
        precision: dtypes of parameters and computation; None for float32, or what modules set.
        sharding: rules that shard parameters over the mesh, of which the first that applies
            decides; () replicates all parameters.
        checkpoint: when checkpoints are saved, and which are kept.
        log: when a row of metrics is written, and what is in it.
        profile: a trace of some steps for a profiler; None for none.
        capture: intermediate values to record, by name.
        guard: what happens when values are not finite.
        init_from: the checkpoint or file from which a new run loads its weights; None for random
            initialization.
        surgery: operations on loaded weights, such as `trainer.weights:Resize`, in this order.
        hooks: functions that are called with each event of the run, by name.
        step: your own train step; None for the default one.
        vars: your own values, which other keys reference with `config.vars.get_ref`.
    """

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
    hooks: dict[str, HookSection] = dataclasses.field(default_factory=dict)
    step: Node | None = None
    vars: Any = dataclasses.field(
        default_factory=dict
    )  # Any keys; `loading.check_vars` checks them.
