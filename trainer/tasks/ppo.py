# SPDX-License-Identifier: Apache-2.0
"""Proximal policy optimization, and episodes as an evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp

from trainer.config.errors import UserError
from trainer.modules.seen import describe
from trainer.observe.summaries import Images
from trainer.tasks.metrics import WeightedMean
from trainer.tasks.task import Batch, TaskOutput

_MEANS = ('loss', 'policy_loss', 'value_loss', 'entropy', 'clipped', 'divergence')
# Of the episodes that ended.
_OF_EPISODES = ('episode_return', 'episode_length')
_Metrics = clu.metrics.Collection.create(
    **{name: WeightedMean.from_output(name) for name in _MEANS},
    **{name: WeightedMean.from_output(name, weighted_by='ends') for name in _OF_EPISODES},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO:
    """The clipped objective of Schulman et al., 2017, "Proximal policy optimization algorithms".

    The batches are those of `trainer.models.rollouts:Rollouts`. The model is called as
    `model(observations)` and returns logits (batch, actions) and values (batch,).

    A row has the mean return and length of the episodes that ended in these steps, NaN if none did;
    `clipped`, for how many steps the ratio was clipped; and `divergence`, how far the policy has
    moved from the one that played, in nats.

    Attributes:
        clip: how far the probability of an action may move from that of the policy that played.
        clip_value: the same for the values of the critic; None for no limit.
        value_weight: factor of the loss of the critic.
        entropy_weight: factor of the entropy of the policy, which is rewarded.
        normalize: whether the advantages of a batch are shifted and scaled to mean 0 and standard
            deviation 1.
    """

    clip: float = 0.2
    clip_value: float | None = None
    value_weight: float = 0.5
    entropy_weight: float = 0.01
    normalize: bool = True

    # The normalization makes the examples of a batch depend on each other.
    decomposable = False

    @property
    def metrics(self) -> type[clu.metrics.Collection]:
        """See above."""
        return _Metrics

    def __call__(self, model: Any, batch: Batch) -> TaskOutput:
        """Returns losses (batch,).

        Raises:
            UserError: if the model returns something else than logits and values.
        """
        logits, values = _check_output(model(batch['observation']))
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        log_prob = jnp.take_along_axis(log_probs, batch['action'][:, None], axis=1)[:, 0]
        advantage = batch['advantage']
        if self.normalize:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        change = log_prob - batch['log_prob']
        ratio = jnp.exp(change)
        limited = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        policy_loss = -jnp.minimum(ratio * advantage, limited * advantage)
        value_loss = self._value_loss(values.astype(jnp.float32), batch)
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
        loss = policy_loss + self.value_weight * value_loss - self.entropy_weight * entropy
        return TaskOutput(
            loss=loss,
            metrics={
                'policy_loss': policy_loss,
                'value_loss': value_loss,
                'entropy': entropy,
                'clipped': (jnp.abs(ratio - 1) > self.clip).astype(jnp.float32),
                # Never negative, and with little variance (Schulman, 2020).
                'divergence': ratio - 1 - change,
                'episode_return': batch['episode_return'],
                'episode_length': batch['episode_length'],
                'ends': batch['ends'],
            },
        )

    def _value_loss(self, values: jax.Array, batch: Batch) -> jax.Array:
        loss = jnp.square(values - batch['target'])
        if self.clip_value is None:
            return loss / 2
        change = jnp.clip(values - batch['value'], -self.clip_value, self.clip_value)
        limited = jnp.square(batch['value'] + change - batch['target'])
        return jnp.maximum(loss, limited) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episodes:
    """Plays one episode for each example of an evaluation, such as `Numbered(count=100)`.

    The number of the example chooses where the episode begins, so that all evaluations begin at the
    same places. The loss is the negative return.

    The first batch shows `episode`, pictures of its first episode from top left to bottom right, if
    the environment has a method `render(state)`.

    Attributes:
        env: the environment: see `models/cartpole.py`.
        number: batch key of the number of each episode, int (batch,).
        greedy: whether to take the most likely action instead of a random one.
        pictures: how many pictures to show, in equal distances; 0 for none.
    """

    env: Any
    number: str = 'index'
    greedy: bool = True
    pictures: int = 25

    def __call__(self, model: Any, batch: Batch) -> TaskOutput:
        """Returns negative returns (batch,) and, as metrics, returns and lengths."""
        count, most = len(batch[self.number]), self.env.most_steps
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(batch[self.number])
        state, observation = jax.vmap(self.env.reset)(keys)
        first = jnp.zeros(count, jnp.float32)
        every = -(-most // max(1, self.pictures))
        film = self._film(state, most, every)

        def play(carry: Any) -> Any:
            step, state, observation, alive, total, length, film = carry
            logits, _ = _check_output(model(observation))
            act_keys, step_keys = (
                jax.vmap(jax.random.fold_in, (0, None))(keys, 2 * step + i) for i in (1, 2)
            )
            action = logits.argmax(-1)
            if not self.greedy:
                action = jax.vmap(jax.random.categorical)(act_keys, logits)
            state, observation, reward, failed = jax.vmap(self.env.step)(
                state, action.astype(jnp.int32), step_keys
            )
            total, length = total + alive * reward, length + alive
            film = self._add_picture(film, state, step, every, alive)
            return step + 1, state, observation, alive * ~failed, total, length, film

        carry = (jnp.int32(0), state, observation, jnp.ones(count), first, first, film)
        *_, total, length, film = jax.lax.while_loop(
            lambda carry: (carry[0] < most) & (carry[3].sum() > 0), play, carry
        )
        summaries = {} if film is None else {'episode': Images(_to_grid(film))}
        return TaskOutput(
            loss=-total,
            metrics={'episode_return': total, 'episode_length': length},
            summaries=summaries,
        )

    def _film(self, state: Any, most: int, every: int) -> jax.Array | None:
        if not self.pictures or not hasattr(self.env, 'render'):
            return None
        one = self.env.render(jax.tree.map(lambda x: x[0], state))
        return jnp.zeros((-(-most // every), *one.shape), one.dtype)

    def _add_picture(
        self, film: jax.Array | None, state: Any, step: jax.Array, every: int, alive: jax.Array
    ) -> jax.Array | None:
        if film is None:
            return None
        picture = self.env.render(jax.tree.map(lambda x: x[0], state))
        shown = (step % every == 0) & (alive[0] > 0)
        index = step // every
        return film.at[index].set(jnp.where(shown, picture, film[index]))


def _to_grid(film: jax.Array, columns: int = 5) -> jax.Array:
    """Returns pictures (n, height, width, channels) as one, (1, ...), row by row."""
    rows = -(-len(film) // columns)
    film = jnp.pad(film, ((0, rows * columns - len(film)), (0, 0), (0, 0), (0, 0)))
    height, width, channels = film.shape[1:]
    grid = film.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(1, rows * height, columns * width, channels)


def _check_output(output: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the logits and the values, after a check of their shapes while a step is traced."""
    shapes = [jnp.shape(x) for x in output] if isinstance(output, tuple) else []
    if len(shapes) != 2 or len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
        raise UserError(
            f'config.task: the model returned {describe(output)}; expected logits (batch, actions) '
            'and values (batch,), in this order'
        )
    return output
