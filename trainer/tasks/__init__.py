# SPDX-License-Identifier: Apache-2.0
"""Tasks: what a model is asked to do with a batch, as `trainer.tasks:Classification` names one.

`TaskOutput` is the contract, for tasks of your own.
"""

from trainer.tasks.checks import Check
from trainer.tasks.classification import Classification
from trainer.tasks.features import Features
from trainer.tasks.language import Answer, NextToken
from trainer.tasks.regression import Regression
from trainer.tasks.task import TaskOutput

__all__ = ['Answer', 'Check', 'Classification', 'Features', 'NextToken', 'Regression', 'TaskOutput']
