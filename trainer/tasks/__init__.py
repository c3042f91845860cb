# SPDX-License-Identifier: Apache-2.0
"""Tasks, which compute the loss and metrics of a batch, such as `trainer.tasks:Classification`.

Tasks of your own return a `TaskOutput`.
"""

from trainer.tasks.checks import Check
from trainer.tasks.classification import Classification
from trainer.tasks.continuation import Continuation
from trainer.tasks.elbo import ELBO
from trainer.tasks.features import Features
from trainer.tasks.language import Answer, NextToken
from trainer.tasks.multi_task import MultiTask
from trainer.tasks.ppo import PPO, Episodes
from trainer.tasks.regression import Regression
from trainer.tasks.sequence_to_sequence import SequenceToSequence
from trainer.tasks.task import TaskOutput

__all__ = [
    'ELBO',
    'PPO',
    'Answer',
    'Check',
    'Classification',
    'Continuation',
    'Episodes',
    'Features',
    'MultiTask',
    'NextToken',
    'Regression',
    'SequenceToSequence',
    'TaskOutput',
]
