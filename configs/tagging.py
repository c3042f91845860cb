# SPDX-License-Identifier: Apache-2.0
"""Parts of speech of Turkish words: a bidirectional LSTM over words and their characters.

    python -m trainer.main --config=configs/tagging.py
    python -m trainer.main --config=configs/tagging.py:tiny

The data is the Turkish Web Treebank, which comes with the project; `vars.path` reads other files in
the CoNLL-U format. Every epoch is evaluated on the development split, and writes tagged sentences
to `summaries/` in the work directory. The test split is evaluated once, at the end. `:tiny` takes
47 s of processor time. docs/examples/tagging.md is the page about this config.

Expected after 12 epochs: 94.6 % of the 8,025 words of the test split; 12 minutes on two busy CPU
cores.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """Returns the config.

    Args:
        arg: 'tiny' for a smaller model and fewer epochs, or ''.
    """
    is_tiny = {'': False, 'tiny': True}[arg]
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.train_for = '12 epochs'
    config.vars = dict(num_words=8192, num_characters=128)
    config.vars.path = ml_collections.config_dict.placeholder(str)  # None: the Turkish treebank.

    config.model = dict(
        target='trainer.models.tagger:Tagger',
        num_tags=14,
        num_words=config.vars.get_ref('num_words'),
        num_characters=config.vars.get_ref('num_characters'),
        dropout_rate=0.4,
        word_dropout_rate=0.1,
    )
    # Padding is not labeled, so it is left out of the loss and of the accuracy.
    config.task = dict(
        target='trainer.tasks:Classification',
        inputs='inputs',
        label='tag',
        ignore_label=-1,
        keep=('text', 'length'),
    )
    config.optimizer = dict(
        target='optax:adam',
        learning_rate=dict(
            target='optax:warmup_cosine_decay_schedule',
            init_value=0.0,
            peak_value=4e-3,
            warmup_steps='5%',
            decay_steps='100%',
        ),
        clip_norm=1.0,
    )

    train, dev, test = (_source(config, split, is_tiny) for split in ('train', 'dev', 'test'))
    # Sentences of similar length together: less padding.
    config.data = dict(source=dict(train, group=128), batch_size=32)
    score = dict(
        target='trainer.scores:TaggedText',
        tags=dict(target='trainer.data.tagged:list_tags', path=config.vars.get_ref('path')),
        fields=('tag',),
    )
    config.evals = dict(
        dev=dict(every='1 epoch', data=dict(source=dev, batch_size=64), score=score),
        test=dict(every='never', data=dict(source=test, batch_size=64)),  # Once, at the end.
    )

    config.checkpoint = dict(every='1 epoch', keep_last=1, best=dict(metric='eval/dev/accuracy'))
    config.log = dict(every='50 steps')
    if is_tiny:
        config.train_for = '3 epochs'
        config.model.update(hidden=32, filters=32)
    return config


def _source(config: ml_collections.ConfigDict, split: str, is_tiny: bool) -> dict:
    """Returns the sentences of a split, in batches of a few lengths."""
    return dict(
        target='trainer.data.sequences:PaddedSequences',
        items=dict(
            target='trainer.data.tagged:TaggedSentences',
            split=split,
            path=config.vars.get_ref('path'),
            max_words=config.vars.get_ref('num_words'),
            max_characters=config.vars.get_ref('num_characters'),
        ),
        fields=('inputs/words', 'inputs/characters', 'tag'),
        fill={'tag': -1},
        # One program each; two take less time to compile.
        lengths=(32, 96) if is_tiny else (16, 32, 96),
    )
