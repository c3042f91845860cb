# SPDX-License-Identifier: Apache-2.0
"""The output of a run: metric rows, the progress line, and the time spent in each part.

Metrics accumulate on the devices. A row is fetched once its step is done, while later steps are
already queued, so that the devices never wait for the host to read and write numbers.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from trainer.config.errors import UserError
from trainer.ensemble.step import PerMember
from trainer.experiment import Experiment
from trainer.modules.shapes import describe
from trainer.observe.history import History
from trainer.observe.npz import write_npz
from trainer.observe.progress import NullScreen, Progress, Screen
from trainer.observe.summaries import Histogram, Summary
from trainer.observe.summary_files import remove_after, write_files
from trainer.observe.time_spent import TimeSpent
from trainer.observe.writers import MetricsFile, TensorBoard, Writers
from trainer.parallel import processes
from trainer.parallel.host import fetch, is_ready
from trainer.tasks.measured import (
    MetricValues,
    average_members,
    check_computes,
    compute_on_trial,
    is_member_name,
)
from trainer.tasks.runner import compute_metrics

_log = logging.getLogger('trainer')


class Reporter:
    """Collects, writes and prints the rows of a run.

    The values of a training row are means over all steps since the previous row;
    `train/data_wait_secs` is the mean time that a step waited for its batch. Only learning rates
    and norms are the values at the row's step.

    Attributes:
        step: number of steps that have been dispatched.
        row: the newest row: 'step' and values by flat name.
        latest: the newest value of each metric, by flat name.
        history: all rows of the run, from earlier starts too.
        time: seconds spent in each part of the run.
        progress: prints messages and the progress line.
    """

    def __init__(
        self,
        total_steps: int,
        batch_size: int,
        output: Screen | None = None,
        members: Sequence[str] = (),
    ):
        """Creates a reporter that writes no files before `open`.

        Args:
            total_steps: length of the run.
            batch_size: examples of the global batch, for examples per second.
            output: where to print; standard output by default.
            members: descriptions of an ensemble's members: 'seed 3, optimizer.learning_rate 0.1'.
        """
        self.step = 0
        self.row: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.history = History()
        self.time = TimeSpent()
        self.progress = Progress(total_steps, output or sys.stdout)
        self._writer = Writers(())
        self._directory: epath.Path | None = None
        self._batch_size = batch_size
        self._members = members
        self._pending: _Pending | None = None
        self._open_row: OpenRow | None = None
        # Added to the next training row.
        self._added: dict[str, float] = {}
        self._evaluated: set[tuple[str, int]] = set()
        # Of the newest row: its step and the seconds of the loop until then.
        self._mark = (0, 0.0)
        # The same for the seconds spent waiting for data.
        self._waited = (0, 0.0)
        self._began = 0.0
        # Spent in compilations between steps.
        self._late_secs = 0.0

    @classmethod
    def from_experiment(cls, experiment: Experiment, *, verbose: bool) -> Reporter:
        """Returns the reporter of an experiment, which prints only in the main process.

        Args:
            experiment: what is trained.
            verbose: whether to print at all.
        """
        screen = None if verbose and processes.is_main_process() else NullScreen()
        ensemble = experiment.ensemble
        members = [ensemble.describe(i) for i in range(ensemble.size)] if ensemble else []
        return cls(experiment.training.total_steps, experiment.clock.batch_size, screen, members)

    def start(self) -> None:
        """Resets `time`, which covers one call of `fit`."""
        self.time = TimeSpent()

    def restore(self, step: int, metrics: Mapping[str, float], evaluated: Iterable[str]) -> None:
        """Replaces the metrics by those of a checkpoint.

        Args:
            step: number of completed updates.
            metrics: the newest value of each metric, by flat name.
            evaluated: names of the evaluations that have run at this step.
        """
        self.step = step
        self.latest = dict(metrics)
        self.history.truncate(step if step > 0 else -1)
        self._evaluated = {(name, step) for name in evaluated}

    def count_fallback(self, steps: int) -> None:
        """Records, in the next training row, the steps lost because newer checkpoints are damaged.

        Args:
            steps: how many steps this start repeats.
        """
        self._added['resume/fallback_steps'] = steps

    def open(self, directory: epath.Path, step: int, *, tensorboard: bool) -> None:
        """Opens the run's files, truncated to the step that the run resumes from."""
        self._directory = directory
        remove_after(directory, step)
        self._writer = Writers(
            [MetricsFile(directory / 'metrics.jsonl', resume_step=step)],
            # Opened again after an error, it must not discard the events of this start.
            [lambda: TensorBoard(directory, resume_step=self.step)] if tensorboard else (),
        )
        # Once the rows after the step are removed.
        self.history.read(directory / 'metrics.jsonl')

    def begin(self, step: int) -> None:
        """Starts the clock of the loop."""
        self._pending = None
        self._began = self._loop_secs()
        self._mark = (step, self._began)
        self._waited = (step, 0.0)

    def end(self, status: str, step: int) -> None:
        """Prints the status, the newest metrics and the time spent, and closes the run's files."""
        self.flush()
        # What remains of the loop's time: the host cannot measure the steps themselves, which run
        # while it does other things.
        steps = self._loop_secs() - self._began - self.time.get('data wait')
        self.time.set('steps', max(0.0, steps))
        self.close()
        lines = [f'{status} at step {step:,}']
        items = [(name, value, _member_prefix(name)) for name, value in sorted(self.latest.items())]
        lines += [f'  {name} {_format_number(x)}' for name, x, member in items if not member]
        # Of the members of an ensemble only evaluations are printed: one line each.
        evals = [item for item in items if item[0].startswith('eval/') and item[2]]
        for member, group in itertools.groupby(evals, key=lambda item: item[2]):
            values = {name.removeprefix(f'{member}/'): x for name, x, _ in group}
            lines.append(f'  {self._member_label(member)}  {_format_values(values)}')
        self.progress.message('\n'.join([*lines, self.time.summary()]))

    def close(self) -> None:
        """Closes the run's files; later rows are only printed."""
        # Replaced first: if closing fails, a later row is not written to a closed file.
        writer, self._writer = self._writer, Writers(())
        writer.close()

    def record_step(self, step: int) -> None:
        """Called after each dispatched step; writes the pending row if its step is done."""
        self.step = step
        self.flush_ready()
        self.progress.tick(step)

    def count_compilations(self, secs: float) -> None:
        """Counts compilations between steps as such, and not as slow steps.

        Args:
            secs: the seconds of all of them so far.
        """
        self.time.add('compile', secs - self._late_secs)
        self._late_secs = secs

    def flush_ready(self) -> None:
        """Writes the pending row, if its step is done."""
        if self._pending is not None and self._pending.is_ready():
            self.flush()

    def log(self, step: int, metrics: Any, *, stopped: Any = None) -> None:
        """Queues the row of a log event; `flush` or a later `record_step` writes it.

        Args:
            step: number of completed updates.
            metrics: accumulators of the state (`TrainState.metrics`).
            stopped: for an ensemble, bool (members,): which members have diverged. The means over
                the members leave them out.
        """
        self.flush()
        # Two rows cannot be pending at once. Blocking is cheap here: the step of the older one is a
        # whole logging period ago.
        (before, waited), secs = self._waited, self.time.get('data wait')
        self._waited = (step, secs)
        self._pending = _Pending(step, (metrics, stopped), (secs - waited) / (step - before))

    def flush(self) -> None:
        """Writes the pending row, if there is one; blocks until its step is done."""
        self.open_row()
        self.write_row()

    def open_row(self) -> None:
        """Computes the pending row, if there is one, so that hooks can read and extend it.

        Blocks until its step is done. `write_row` writes it.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        step = pending.step
        row = flat_row(*fetch(pending.values))
        # The clock is read here, where the step is known to be done: dispatching returns at once.
        (began_step, began), self._mark = self._mark, (step, self._loop_secs())
        steps, secs = step - began_step, self._mark[1] - began
        rate = steps / secs if secs > 0 else math.nan
        row.update(
            steps_per_sec=rate,
            examples_per_sec=rate * self._batch_size,
            data_wait_secs=pending.data_wait_secs,
        )
        opened = OpenRow(step, row, 'train')
        opened.others, self._added = self._added, {}
        self._set_open_row(opened)

    def open_eval(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """Opens the row of an evaluation, so that hooks can read and extend it.

        Args:
            name: name of the evaluation.
            step: number of completed steps.
            metrics: its values; the arrays and summaries of a `MetricValues` are written too.
        """
        values = metrics if isinstance(metrics, MetricValues) else MetricValues(metrics)
        # A value that this evaluation does not have must not be taken for one of this step: a
        # checkpoint is ranked by the newest values.
        self.latest = {n: x for n, x in self.latest.items() if not n.startswith(f'eval/{name}/')}
        self._set_open_row(OpenRow(step, values, f'eval/{name}', evaluation=name))

    def extend_row(self, values: MetricValues) -> None:
        """Adds values to the open row.

        Args:
            values: values by name: 'eval/dev/bleu', or 'bleu' for a name of the row's own kind.

        Raises:
            UserError: if the row has a value of that name.
        """
        assert self._open_row is not None
        self._open_row.add(values)
        self._update_latest(self._open_row)

    def record_hook(self, name: str, step: int, values: MetricValues) -> None:
        """Writes a row of the values that a hook has returned at an event of its own."""
        self._set_open_row(OpenRow(step, values, f'hook/{name}'))
        self.write_row()

    def write_row(self) -> None:
        """Writes the open row, if there is one."""
        if self._open_row is None:
            return
        row, self._open_row = self._open_row, None
        files = self._write_files(row)
        self._writer.write(row.step, row.to_dict())
        self.history.add(row.step, row.to_dict())
        # After the files, so that no printed value is missing there if the run is killed.
        if row.prefix == 'train/':
            self.progress.update(row.step, row.to_dict())
            if files:
                self.progress.message(f'step {row.step:,}:{files}')
            return
        if row.evaluation is not None:
            # An evaluation without a row counts as not run.
            self._evaluated.add((row.evaluation, row.step))
        numbers = {key: value for key, value in row.values.items() if not is_member_name(key)}
        at = f'{row.prefix[:-1].replace("/", " ", 1)} at step {row.step:,}'
        self.progress.message(f'{at}: {_format_values({**numbers, **row.others})}{files}')

    def record_capture(
        self, step: int, row: Mapping[str, float], histograms: Mapping[str, Histogram]
    ) -> None:
        """Writes the captured values and histograms of a step; prints nothing."""
        if row:
            self._writer.write(step, row)
            self.history.add(step, row)
        if histograms:
            self._writer.write_summaries(step, histograms)

    def _write_summaries(
        self, step: int, summaries: Mapping[str, Summary], prefix: str = ''
    ) -> str:
        """Writes summaries; returns their part of the printed line.

        Args:
            step: number of completed steps.
            summaries: summaries by name below the prefix.
            prefix: 'eval/dev/', for example.
        """
        if not summaries or self._directory is None:
            return ''
        by_name = {prefix + name: summary for name, summary in summaries.items()}
        paths = write_files(self._directory, step, by_name)
        self._writer.write_summaries(step, by_name)
        return f'  {", ".join(summaries)} in {os.path.commonpath(paths)}'

    def eval_values(self, name: str) -> dict[str, float]:
        """Returns the values of the newest row that are of an evaluation, by name."""
        prefix = f'eval/{name}/'
        return {n.removeprefix(prefix): x for n, x in self.row.items() if n.startswith(prefix)}

    def forget_eval(self, name: str, step: int) -> None:
        """Counts an evaluation as not run, so that the next start runs it again."""
        self._evaluated.discard((name, step))

    def has_eval(self, name: str, step: int) -> bool:
        """Whether this evaluation has run at this step."""
        return (name, step) in self._evaluated

    def sync(self) -> None:
        """Writes all rows and returns once they are on disk."""
        self.flush()
        self._writer.sync()

    def _write_files(self, row: OpenRow) -> str:
        """Writes the arrays and summaries of a row; returns their part of the printed line."""
        try:
            files = self._write_arrays(f'{row.stem}_{row.step}', row.values.arrays)
            return files + self._write_summaries(row.step, row.values.summaries, row.prefix)
        except OSError as error:  # Such as a full disk: the run is worth more than its pictures.
            _log.warning(
                'the arrays and summaries of step %d cannot be written (%s); training continues',
                row.step,
                error,
            )
            return ''

    def _write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> str:
        """Writes arrays to a file in `metrics/`; returns their part of the printed line."""
        if not arrays:
            return ''
        described = [f'{n} {describe(x)}' for n, x in arrays.items() if not is_member_name(n)]
        if self._directory is None:
            return f'  {", ".join(described)}'
        # Named after the step, so a resumed run overwrites the file of a step that it repeats.
        path = self._directory / 'metrics' / f'{name}.npz'
        path.parent.mkdir(parents=True, exist_ok=True)
        write_npz(path, arrays)
        return f'  {", ".join(described)} in {path}'

    def _set_open_row(self, row: OpenRow) -> None:
        # Only one row is open at a time.
        self.write_row()
        self._open_row = row
        self._update_latest(row)

    def _update_latest(self, row: OpenRow) -> None:
        values = row.to_dict()
        self.row = {'step': row.step, **values}
        self.latest.update(values)

    def _member_label(self, member: str) -> str:
        """Returns 'eval/test member 3 (seed 3)' for 'eval/test/member_3'."""
        prefix, _, number = member.rpartition('/member_')
        # A metric of the task may have such a name too, in a run without an ensemble.
        description = self._members[int(number)] if int(number) < len(self._members) else ''
        return f'{prefix} member {number}' + (f' ({description})' if description else '')

    def _loop_secs(self) -> float:
        """Returns the seconds of the loop so far, without its evaluations, saves and hooks."""
        # Rates are of training: an evaluation or a save between two rows must not look like slow
        # steps. An evaluation compiles at its first batch, which counts as 'compile'.
        parts = ('eval', 'save', 'hooks', 'compile')
        return time.perf_counter() - sum(map(self.time.get, parts))


class OpenRow:
    """A row that hooks can still extend; it is not written yet.

    Attributes:
        step: number of completed steps.
        values: values by name below the prefix.
        prefix: 'train/', 'eval/dev/' or 'hook/mine/', for example.
        stem: beginning of the names of its files: 'eval_dev'.
        evaluation: its name; None for another row.
        others: values that hooks have added under names of other kinds.
    """

    def __init__(
        self, step: int, values: MetricValues, name: str, *, evaluation: str | None = None
    ):
        self.step = step
        self.values = MetricValues()
        self.values.update_with(values)
        self.prefix, self.stem = f'{name}/', name.replace('/', '_')
        self.evaluation = evaluation
        self.others: dict[str, float] = {}

    def to_dict(self) -> dict[str, float]:
        """Returns the numbers by flat name."""
        return {**{self.prefix + name: x for name, x in self.values.items()}, **self.others}

    def add(self, values: MetricValues) -> None:
        """Adds values, whose names are below the prefix or have one of their own."""
        for name, value in values.items():
            if name.startswith(('train/', 'eval/')) and not name.startswith(self.prefix):
                if name in self.others:
                    raise UserError(f'two values of a row of metrics are named {name!r}')
                self.others[name] = value
            else:
                self.values.add(name.removeprefix(self.prefix), value)
        for name, item in {**values.arrays, **values.summaries}.items():
            self.values.add(name.removeprefix(self.prefix), item)


class _Pending:
    """A row whose step may not be done yet."""

    def __init__(self, step: int, values: Any, data_wait_secs: float):
        self.step = step
        self.values = values
        self.data_wait_secs = data_wait_secs
        # One array suffices: all metrics are outputs of the same call of a program.
        self._one = next((x for x in jax.tree.leaves(values) if isinstance(x, jax.Array)), None)

    def is_ready(self) -> bool:
        return self._one is None or is_ready(self._one)


def flat_row(metrics: Any, stopped: Any = None) -> MetricValues:
    """Returns the flat values of a step's accumulators, fetched in one transfer.

    For an ensemble: the means over its members, and 'member_<i>/...' for each member.

    Args:
        metrics: accumulators of the state (`TrainState.metrics`).
        stopped: for an ensemble, bool (members,): members to leave out of the means, unless all
            have stopped.
    """
    computed = compute_metrics(fetch(metrics))
    if isinstance(metrics, PerMember):
        rows = [_flatten(each) for each in computed]
        row = average_members(rows, () if stopped is None else np.flatnonzero(~stopped))
        # A mean of different learning rates is the learning rate of no member.
        for name in rows[0]:
            if name.split('/')[0] == 'learning_rate' and len({each[name] for each in rows}) > 1:
                row.pop(name, None)
    else:
        row = _flatten(computed)
    return row


def check_row(metrics: Any) -> None:
    """Checks, from the shapes of a step's accumulators, that they make a row.

    Raises:
        UserError: naming the metric that cannot be written to a row or a file.
    """
    single = metrics
    if isinstance(metrics, PerMember):
        single = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), metrics.stacked)
    try:
        check_computes(single)
        compute_on_trial(flat_row, metrics)
    except UserError as error:
        raise UserError(f'the metrics of training: {error}') from error


def _flatten(computed: Mapping[str, Any]) -> MetricValues:
    rest = dict(computed)
    row = MetricValues(rest.pop('task', {}))
    row.update_with(MetricValues(rest.pop('penalties', {})))
    norms = rest.pop('norms', {})
    row.update_with(MetricValues({f'{name}_norm': value for name, value in norms.items()}))
    # Learning rates, possibly one for each parameter group, and the metrics of a custom step.
    row.update_with(MetricValues(rest))
    return row


def _member_prefix(name: str) -> str:
    """Returns 'eval/test/member_0' for a value of one member of an ensemble, '' for any other."""
    match = re.match(r'.*/member_\d+(?=/)', name)
    return match[0] if match else ''


def _format_values(values: Mapping[str, float]) -> str:
    return '  '.join(f'{name} {_format_number(value)}' for name, value in values.items())


def _format_number(value: float) -> str:
    return f'{value:,}' if isinstance(value, int) else f'{value:.5g}'
