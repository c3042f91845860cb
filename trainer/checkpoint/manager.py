# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of one run: asynchronous Orbax saves, retention, and restores that are checked."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from trainer.config.durations import Periodic
from trainer.step import digest

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

_log = logging.getLogger('trainer')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints are kept; the newest always are.

    Attributes:
        keep_last: how many of the newest.
        keep_every: all at these steps too, or None.
        best_metric: flat name of the metric ('eval/test/accuracy') whose best step is kept too.
        best_mode: 'max' or 'min'.
    """

    keep_last: int = 2
    keep_every: Periodic | None = None
    best_metric: str | None = None
    best_mode: str = 'max'

    def score(self, meta: Mapping[str, Any]) -> float:
        """Returns a number that is higher for better.

        A NaN is never the best, nor is a metric of an evaluation that did not run at this very
        step: those weights were never measured.
        """
        metric = self.best_metric or ''
        measured = metric.split('/')[1:2] and metric.split('/')[1] in meta.get('evaluated', ())
        value = meta.get('metrics', {}).get(metric, math.nan) if measured else math.nan
        if value is None or math.isnan(value):
            return -math.inf
        return value if self.best_mode == 'max' else -value


class CheckpointError(Exception):
    """A checkpoint that cannot be trusted: its arrays are not those that were saved."""

    exit_code = 65


def preload() -> None:
    """Imports Orbax in the background: it takes as long as the compiler leaves us waiting."""

    def work() -> None:
        import orbax.checkpoint  # noqa: F401

    # Not a daemon: a process that ends in the middle of this import is aborted.
    threading.Thread(target=work, name='import-orbax').start()


class Checkpoints:
    """The checkpoints below one directory, named by the number of completed updates."""

    def __init__(self, directory: epath.PathLike, retention: Retention):
        """Opens (and makes) the directory; Orbax itself is opened at the first use."""
        self.directory = epath.Path(directory).absolute()
        self._retention = retention
        self._lazy_manager: ocp.CheckpointManager | None = None
        self._newest_save: int | None = None
        self._in_flight: concurrent.futures.Future[None] | None = None
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        # One program each: a copy that the next step cannot donate, and the digest's sums.
        self._copy = jax.jit(lambda state: jax.tree.map(lambda x: x.copy(), state))
        self._sums = jax.jit(digest.leaf_sums)

    def steps(self) -> list[int]:
        """Returns the committed steps, oldest first."""
        if not self.directory.exists():
            return []
        names = [p.name for p in self.directory.iterdir()]
        candidates = sorted(int(name) for name in names if name.isdigit())
        return [s for s in candidates if (self.directory / str(s) / 'commit_success.txt').exists()]

    def latest(self) -> int | None:
        """Returns the newest committed step, or None."""
        return max(self.steps(), default=None)

    def has(self, step: int) -> bool:
        """Whether a step is committed, or its save is in flight."""
        return step == self._newest_save or step in self.steps()

    def best(self) -> int | None:
        """Returns the step with the best metric, or None if no checkpoint has one."""
        scored = [(self._retention.score(self.meta(s)), s) for s in self.steps()]
        finite = [(score, step) for score, step in scored if score > -math.inf]
        return max(finite)[1] if finite else None

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts a save in the background and returns as soon as the state may be donated.

        It waits for the save before, if that is still being written.

        Args:
            step: number of completed updates, the directory's name.
            state: the state; it is copied on the devices.
            meta: what is stored beside the arrays; its 'metrics' and 'evaluated' decide on the best
                step. An earlier save that has failed is a warning here, an error in `wait`.
        """
        try:
            self.wait()
        except Exception as error:
            # This save may be the last chance; one that failed must not take it away.
            _log.warning('an earlier save failed (%s); saving step %s now', error, step)
        self._newest_save = step
        # The copy is all that the training waits for: the step that follows donates the state.
        snapshot = self._copy(state)
        if _on_host(snapshot):
            self._in_flight = self._writer.submit(self._write, step, snapshot, dict(meta))
        else:
            self._write(step, snapshot, dict(meta))

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what was stored beside the arrays of a step, `digest` included."""
        return json.loads((self.directory / str(step) / 'meta' / 'metadata').read_text())

    def restore(self, step: int, abstract: Any) -> Any:
        """Returns the state of a step, with the shardings of the abstract one.

        Raises:
            CheckpointError: if the arrays read are not those that were saved.
            ValueError: if the structure or a shape differs from `abstract`.
        """
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            )
        )
        state = self._manager.restore(step, args=args).state
        found = self.digest(state)
        stored = self.meta(step)['digest']
        if found != stored:
            raise CheckpointError(
                f'{self.directory / str(step)} is damaged: its digest is {found}, {stored} was '
                'saved. Remove that directory to go on from an older checkpoint.'
            )
        return state

    def digest(self, state: Any) -> str:
        """Returns the state's digest."""
        return self._start_digest(state)()

    def _start_digest(self, state: Any) -> Callable[[], str]:
        """Returns what ends the digest; on devices its sums are under way at once."""
        if _on_host(state):
            return lambda: digest.combine(state, digest.host_sums(state))
        sums = self._sums(state)
        return lambda: digest.combine(state, jax.device_get(sums))

    def wait(self) -> None:
        """Returns when every save is committed; raises if one has failed."""
        in_flight, self._in_flight = self._in_flight, None
        try:
            if in_flight is not None:
                in_flight.result()
            if self._lazy_manager is not None:
                self._lazy_manager.wait_until_finished()
        except BaseException:
            # After a failure Orbax's own list of steps is wrong: the next save opens it anew.
            self._newest_save, self._lazy_manager = None, None
            raise

    def close(self) -> None:
        """Waits for the save in flight and releases all threads."""
        self.wait()
        self._writer.shutdown()
        if self._lazy_manager is not None:
            self._lazy_manager.close()

    def _write(self, step: int, snapshot: Any, meta: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        from trainer.checkpoint.meta import MetaSave

        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(snapshot),
                meta=MetaSave(meta=meta, digest=self._start_digest(snapshot)),
            ),
            metrics={'score': self._retention.score(meta)},
            force=True,
        )

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._lazy_manager is None:
            self._lazy_manager = _open(self.directory, self._retention)
        return self._lazy_manager


def _on_host(state: Any) -> bool:
    """Whether a state lies in the memory of this one process.

    Then Orbax may run in a thread of ours; several processes must call it from their main threads.
    """
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    on_cpu = all(device.platform == 'cpu' for leaf in arrays for device in leaf.devices())
    keys = any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in arrays)
    return on_cpu and not keys and jax.process_count() == 1


def _open(directory: epath.Path, retention: Retention) -> ocp.CheckpointManager:
    import orbax.checkpoint as ocp
    from orbax.checkpoint import options as ocp_options
    from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

    from trainer.checkpoint.meta import MetaHandler

    keep: list[Any] = [preservation.LatestN(max(1, retention.keep_last))]
    if retention.keep_every is not None and retention.keep_every.period_steps is not None:
        keep.append(_KeepDue(retention.keep_every))
    if retention.best_metric is not None:
        keep.append(
            preservation.BestN(
                get_metric_fn=lambda metrics: metrics['score'],
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    manager = ocp.CheckpointManager(
        directory,
        item_names=('state', 'meta'),
        item_handlers={'state': ocp.PyTreeCheckpointHandler(), 'meta': MetaHandler()},
        options=ocp.CheckpointManagerOptions(
            create=True,
            preservation_policy=preservation.AnyPreservationPolicy(keep),
            best_fn=lambda metrics: metrics['score'],
            # A half-copied or empty step directory counts as a checkpoint under a mere rename.
            atomicity_options=ocp_options.AtomicityOptions(
                mode=ocp_options.AtomicityMode.COMMIT_FILE
            ),
            cleanup_tmp_directories=True,
        ),
    )
    # Preemption is our own affair; Orbax's background thread would ask about old steps.
    manager.reached_preemption = lambda step: False
    return manager


@dataclasses.dataclass(frozen=True)
class _KeepDue:
    """Orbax preservation policy: keeps the steps at which a periodic event is due."""

    periodic: Periodic

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Returns one boolean for each checkpoint."""
        return [self.periodic.due(info.step) for info in checkpoints]
