# SPDX-License-Identifier: Apache-2.0
"""Which side does each member of a karate club take? Classifies the nodes of one small graph.

    python -m trainer.main --config=configs/karate.py

Only two of the 34 members have a label in training. docs/examples/karate.md is the page about this
config.

Expected after 100 steps: 96.9 % of the 32 other members; 9 s on two busy CPU cores.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.train_for = '100 steps'
    config.model = dict(
        target='trainer.models.gcn:GCN', num_nodes=34, num_classes=2, dropout_rate=0.5
    )
    # One label for each node, -1 for those without.
    config.task = dict(
        target='trainer.tasks:Classification', inputs='graph', label='side', ignore_label=-1
    )
    config.optimizer = dict(target='optax:adamw', learning_rate=0.01, weight_decay=0.01)
    config.data = dict(
        source=dict(target='trainer.data.karate:KarateClub', split='train'), batch_size=1
    )
    test = dict(source=dict(target='trainer.data.karate:KarateClub', split='test'))
    config.evals = dict(test=dict(every='20 steps', data=test))
    config.log = dict(every='20 steps')
    config.checkpoint = dict(every='100 steps', keep_last=1)
    return config
