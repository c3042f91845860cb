# SPDX-License-Identifier: Apache-2.0
"""`config.capture`: outputs and sown values of modules as metrics, histograms and files.

A capture is a separate program: a forward pass with `train=True` after the step, with the updated
parameters and the same batch (the last one under `steps_per_call`, its first micro-batch under
`accumulate`). The train step is not changed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from trainer.builders.captures import Capture
from trainer.config.errors import UserError
from trainer.inspect.forward import Batch, Forward
from trainer.inspect.statistics import Histogram, float_leaves, histogram, make_measure
from trainer.modules import patterns
from trainer.modules.recorder import ROOT, ModuleRecorder, order_records
from trainer.observe.npz import write_npz
from trainer.observe.table import human_bytes
from trainer.parallel.host import fetch
from trainer.step.state import TrainState

_log = logging.getLogger('trainer')


@dataclasses.dataclass(frozen=True)
class CaptureResult:
    """The captured values of one step.

    Attributes:
        row: flat name to value.
        histograms: histograms by flat name.
        message: text to print, or None.
    """

    row: dict[str, float]
    histograms: dict[str, Histogram]
    message: str | None


class Captures:
    """Runs the captures of a config; those that are due together run in one program."""

    def __init__(
        self, captures: Mapping[str, Capture], forward: Forward, directory: epath.Path | None
    ):
        """Compiles and writes nothing yet.

        Args:
            captures: settings of each capture, by name.
            forward: the forward pass of the train step.
            directory: where files go; None to write none.
        """
        self._captures = dict(captures)
        self._forward = forward
        self._directory = directory
        self._programs: dict[tuple[str, ...], Callable[..., Any]] = {}
        self._announced: set[str] = set()

    def prepare(self, state: TrainState, batch: Batch) -> None:
        """Checks that every pattern matches something.

        Args:
            state: shapes and dtypes of the train state.
            batch: shapes and dtypes of a batch.

        Raises:
            UserError: for a pattern without a match, naming the paths that exist.
        """
        # Only the paths are needed, so nothing is measured.
        recorder = ModuleRecorder(lambda output, inputs, variables: ())

        def run(state: TrainState, batch: Batch) -> Any:
            self._forward(recorder, state, batch, micro_batches=1)
            return ()

        # Without the metrics, as `Forward.compile` passes the state.
        self._forward.shapes(run, dataclasses.replace(state, metrics=None), batch)
        # Modules in a branch or a lifted loop are called, but their values cannot leave it: they
        # are recorded as called only.
        seen = [path for call in (*recorder.records, *recorder.sown) for path in call]
        hidden = [path for path in recorder.called if path not in seen]
        for name, capture in self._captures.items():
            for pattern in capture.match:
                _check(f'config.capture.{name}.match', pattern, seen, hidden)

    def names_due(self, step: int) -> list[str]:
        """Returns the names of the captures that are due after a step."""
        return [name for name, capture in self._captures.items() if capture.every.is_due(step)]

    def run(
        self, names: Sequence[str], step: int, state: TrainState, batch: Batch, *, stacked: bool
    ) -> CaptureResult:
        """Runs captures and writes their files.

        Args:
            names: names of the captures that are due.
            step: number of completed updates.
            state: train state after this step.
            batch: the batch that this step consumed.
            stacked: whether `batch` is a stack of the batches of several fused steps.
        """
        # One transfer for everything: the results are replicated, so each device has all of them.
        program = self._program(tuple(names))
        entries = list(self._entries(fetch(program(state, batch, stacked=stacked))))
        row: dict[str, float] = {}
        histograms: dict[str, Histogram] = {}
        messages = []
        for name in names:
            capture = self._captures[name]
            matching = {label: values for path, label, values in entries if capture.wants(path)}
            for label, values in matching.items():
                where = f'capture/{name}/{label}'
                if 'summary' in capture.what:
                    numbers = values['summary'].items()
                    row.update({f'{where}/{key}': float(value) for key, value in numbers})
                if 'histogram' in capture.what:
                    histograms[where] = histogram(values)
            if 'file' in capture.what and self._directory is not None:
                arrays = {label: values['examples'] for label, values in matching.items()}
                messages += self._write(name, capture, step, arrays)
        return CaptureResult(row, histograms, '\n'.join(messages) or None)

    def _program(self, names: tuple[str, ...]) -> Callable[..., Any]:
        """Returns the compiled program of these captures."""
        if names not in self._programs:
            due = [self._captures[name] for name in names]
            self._programs[names] = self._forward.compile(self._make_function(due))
        return self._programs[names]

    def _make_function(self, due: Sequence[Capture]) -> Callable[[TrainState, Batch], Any]:
        what = frozenset[str]().union(*(capture.what for capture in due))
        # One program serves all captures that are due, so it returns as many examples as the
        # largest one wants. `_write` truncates them for the others.
        rows = max((capture.rows for capture in due if 'file' in capture.what), default=0)
        measure = make_measure(what, rows)

        def wants(path: str) -> bool:
            return any(capture.wants(path) for capture in due)

        def measure_output(output: Any, inputs: Any, variables: Any) -> dict[str, Any]:
            return {name: measure(x) for name, x in float_leaves(output)}

        def measure_sown(sown: Any) -> dict[str, Any]:
            values = {name: measure(x) for name, x in float_leaves(sown)}
            # Flax collects sown values in a tuple; a single one needs no number in its name.
            return {'': values['0']} if list(values) == ['0'] else values

        def run(state: TrainState, batch: Batch) -> Any:
            recorder = ModuleRecorder(measure_output, selects=wants)
            self._forward(recorder, state, batch, micro_batches=1)
            sown = [
                {path: measure_sown(value) for path, value in call.items() if wants(path)}
                for call in recorder.sown
            ]
            return recorder.records, sown

        return run

    @staticmethod
    def _entries(fetched: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yields (path, label, measured values), outputs in the order of the calls, then sown."""
        records, sown = fetched
        for record in order_records(records):
            for leaf, values in record.value.items():
                yield record.path, f'{record.name}/{leaf}' if leaf else record.name, values
        for number, call in enumerate(sown):
            for path, leaves in call.items():
                label = f'{path}#{number}' if number else path
                for leaf, values in leaves.items():
                    yield path, f'{label}/{leaf}' if leaf else label, values

    def _write(
        self, name: str, capture: Capture, step: int, arrays: Mapping[str, np.ndarray]
    ) -> list[str]:
        """Writes a file and deletes the oldest ones; returns a message, the first time only."""
        assert self._directory is not None
        folder = self._directory / 'capture' / name
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {label: x[: capture.rows] if x.ndim else x for label, x in arrays.items()}
        size = write_npz(folder / f'{step}.npz', arrays)
        # By number: as text, '1000.npz' comes before '200.npz'.
        steps = sorted(int(path.stem) for path in folder.glob('*.npz') if path.stem.isdigit())
        # Files of later steps are left over from before the run was resumed at an earlier step.
        past = [number for number in steps if number <= step]
        for number in {*past[: -capture.keep], *steps[len(past) :]}:
            (folder / f'{number}.npz').unlink(missing_ok=True)
        if name in self._announced:
            return []
        self._announced.add(name)
        return [
            f'capture {name}: writing files of {human_bytes(size)} to {folder}, keeping the last '
            f'{capture.keep} (at most {human_bytes(size * capture.keep)})'
        ]


def _check(path: str, pattern: str, seen: Sequence[str], hidden: Sequence[str]) -> None:
    """Raises for a pattern that matches nothing; warns of matches that cannot be captured."""
    expression = patterns.compile_pattern(pattern, path)
    missed = [p for p in hidden if expression.fullmatch(p or ROOT)]
    reason = (
        'inside a branch or a loop (nn.cond, nnx.fori_loop), or inside a lifted module (nn.scan) '
        "without the collection 'intermediates': give that one "
        "variable_axes={'intermediates': 0, ...}"
    )
    if any(expression.fullmatch(p or ROOT) for p in seen):
        if missed:
            _log.warning('%s: %s not captured: %s', path, ', '.join(missed), reason)
        return
    if missed:
        raise UserError(f'{path}: {pattern!r} matches only modules {reason}')
    names = list(dict.fromkeys(p or ROOT for p in seen))
    patterns.check_used([pattern], names, path, 'no module and no sown value')
