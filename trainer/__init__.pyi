# SPDX-License-Identifier: Apache-2.0
# The types of the names that `__init__.py` imports late.
from trainer.evaluate.pad import pad_shard_unpad as pad_shard_unpad
from trainer.experiment import Experiment as Experiment
from trainer.experiment import build as build
from trainer.experiment import load_and_build as load_and_build
from trainer.modes.features import precompute as precompute
from trainer.tasks import TaskOutput as TaskOutput
from trainer.trainer import Trainer as Trainer
