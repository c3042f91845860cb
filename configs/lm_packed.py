# SPDX-License-Identifier: Apache-2.0
"""The transformer of `lm.py` on whole Python files, packed into examples of the same length.

    python -m trainer.main --config=configs/lm_packed.py

The data is a stream. Checkpoints contain its position, and a run with the same number of processes
resumes exactly. The length of a stream is unknown, so all durations are in steps.

Expected after 2,000 steps: 1.96 nats per byte of held-out files; 8 minutes on two busy CPU cores.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.train_for = '2000 steps'

    config.model = dict(
        target='trainer.models.transformer:Transformer',
        layers=4,
        width=256,
        heads=4,
        max_length=128,
    )
    config.task = dict(
        target='trainer.tasks:NextToken',
        segments='tokens_segment_ids',
        positions='tokens_positions',
    )
    config.optimizer = dict(
        target='optax:adamw',
        learning_rate=dict(
            target='optax:warmup_cosine_decay_schedule',
            init_value=0.0,
            peak_value=1e-3,
            warmup_steps='5%',
            decay_steps='100%',
        ),
        weight_decay=0.1,
        decay_mask='.*/kernel',  # Neither biases, embeddings nor scales.
        clip_norm=1.0,
    )

    source = dict(target='trainer.data.text:python_documents')
    stages = (
        # Very short files, such as an empty `__init__.py`, carry little information.
        dict(
            target='trainer.data.stages:Filter',
            keep=dict(target='trainer.data.stages:LongerThan', length=64),
        ),
        dict(target='trainer.data.stages:Pack', length=128),
    )
    config.data = dict(
        loader=dict(target='trainer.data.streaming:StreamLoader', stages=stages),
        source=dict(source, split='train'),
        batch_size=8,
    )
    config.evals = dict(
        test=dict(
            every='1000 steps',
            data=dict(
                loader=dict(target='trainer.data.streaming:StreamEvalLoader', stages=stages),
                source=dict(source, split='test'),
                batch_size=32,
            ),
        ),
    )

    config.checkpoint = dict(every='500 steps', keep_last=2)
    config.log = dict(every='50 steps')
    return config
