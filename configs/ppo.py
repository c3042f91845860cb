# SPDX-License-Identifier: Apache-2.0
"""Proximal policy optimization: a policy that learns CartPole by playing it.

    python -m trainer.main --config=configs/ppo.py

16 copies of the environment are played on the devices, 128 steps at a time; each step is trained on
four times. One step of training is one minibatch, so a rollout is followed by 32 of them. The
evaluation plays 100 episodes with the most likely actions.

Expected after 3,200 steps: 500 steps per episode, the most there are, in each of 100 episodes; 14 s
on two busy CPU cores.
docs/examples/ppo.md is the page about this config.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.train_for = '3200 steps'
    config.vars = dict(batch_size=256)
    batch_size = config.vars.get_ref('batch_size')

    env = dict(target='trainer.models.cartpole:CartPole')
    config.model = dict(target='trainer.models.actor_critic:ActorCritic', num_actions=2)
    config.task = dict(target='trainer.tasks:PPO')
    config.data = dict(
        source=dict(
            target='trainer.models.rollouts:Rollouts',
            env=env,
            batch_size=batch_size,
            envs=16,
            steps=128,
            epochs=4,
            reward_scale=0.05,  # A step is worth 1 / (1 - discount) = 100 of them: about 5.
        ),
        batch_size=batch_size,
    )
    config.optimizer = dict(
        target='optax:adam',
        learning_rate=dict(
            target='optax:linear_schedule',
            init_value=1e-3,
            end_value=0.0,
            transition_steps='100%',
        ),
        eps=1e-5,
        clip_norm=0.5,
    )
    config.evals = dict(
        episodes=dict(
            every='800 steps',
            task=dict(target='trainer.tasks:Episodes', env=env),
            data=dict(
                source=dict(target='trainer.data.addition:Numbered', count=100),
                batch_size=100,
            ),
        ),
    )
    config.checkpoint = dict(every='800 steps', keep_last=1)
    config.log = dict(every='160 steps')
    return config
