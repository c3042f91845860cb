# SPDX-License-Identifier: Apache-2.0
"""Translation with a transformer, shared byte-pair tokens and beam search.

    python -m trainer.main --config=configs/wmt.py --config.vars.path='{split}.tsv'
    python -m trainer.main --config=configs/wmt.py:verses
    python -m trainer.main --config=configs/wmt.py:numbers

By default, the base model of "Attention Is All You Need" for some million pairs of sentences of
your own, such as those of WMT: `train.tsv`, `dev.tsv` and `test.tsv` with a sentence, a tab and its
translation in each line. `:verses` is a smaller one for 30,000 verses of the Bible in English and
Spanish, which come with the project, and `:numbers` translates English number words into German.

Tokens need the package tokenizers, and BLEU, in all but `:numbers`, sacrebleu:

    pip install tokenizers sacrebleu

docs/examples/wmt.md is the page about this config.

Default: not run yet. `:verses`: not run yet. `:numbers`: 99.8 % of 500 numbers without a mistake
after 1,000 steps; 98 s of processor time.
"""

import ml_collections

WORDS = ('verses', 'numbers')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """Returns the config.

    Args:
        arg: 'verses', 'numbers', or '' for files of your own.

    Raises:
        ValueError: for another argument.
    """
    if arg not in ('', *WORDS):
        raise ValueError(f'wmt: expected {", ".join(WORDS)} or nothing after :, got {arg!r}')
    config = ml_collections.ConfigDict()
    config.seed = 0
    # vocabulary: the directory where the tokens are kept once they have been made.
    config.vars = dict(vocab_size=32_000, vocabulary='runs')
    config.model = dict(
        target='trainer.models.translator:Translator',
        vocab_size=config.vars.get_ref('vocab_size'),
        layers=6,
        width=512,
        heads=8,
        dropout_rate=0.1,
    )
    config.task = dict(target='trainer.tasks:SequenceToSequence', label_smoothing=0.1)
    config.optimizer = dict(
        target='optax:adam',
        learning_rate=dict(target='trainer.schedules:rsqrt', peak_value=7e-4, warmup_steps=4000),
        b2=0.98,
        eps=1e-9,
        clip_norm=1.0,
    )
    config.log = dict(every='50 steps')
    {'': _read_files, 'verses': _read_verses, 'numbers': _read_numbers}[arg](config)
    return config


def _read_files(config: ml_collections.ConfigDict) -> None:
    """100,000 steps of about 25,000 tokens, as in the paper."""
    config.train_for = '100000 steps'
    config.vars.path = '{split}.tsv'

    def pairs(split: str) -> dict:
        path = config.vars.get_ref('path')
        return dict(target='trainer.data.translation:PairFile', path=path, split=split)

    splits = {split: pairs(split) for split in ('train', 'dev', 'test')}
    _set_data(config, splits, lengths=(16, 32, 48, 64, 96, 128), batch_size=768)
    config.evals.dev.every = '5000 steps'
    # Any mesh: these rules leave axes of size 1 out.
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.sharding = (
        dict(
            target='trainer.sharding:ByName',
            rules=(
                ('batch', ('data', 'fsdp')),
                ('vocab', ('fsdp', 'model')),
                ('heads', 'model'),
                ('mlp', 'model'),
                ('embed', 'fsdp'),
            ),
        ),
    )
    config.precision = dict(compute='bfloat16', output='float32')
    config.checkpoint = dict(every='5000 steps', keep_last=2)


def _read_verses(config: ml_collections.ConfigDict) -> None:
    """Few pairs: a smaller model and vocabulary, and small batches."""
    config.train_for = '15 epochs'
    config.vars.vocab_size = 4096
    config.model.update(layers=3, width=192, heads=4)
    config.optimizer.learning_rate.update(peak_value=1.5e-3, warmup_steps=1000)

    def pairs(split: str) -> dict:
        return dict(target='trainer.data.verses:Verses', split=split)

    splits = {split: pairs(split) for split in ('train', 'dev', 'test')}
    _set_data(config, splits, lengths=(24, 32, 40, 48, 64, 96), batch_size=32)
    config.evals.dev.every = '3 epochs'
    # The rate of this schedule never gets small; an average of the parameters does as well.
    config.ema = dict(decay=0.999)
    for each in config.evals.values():
        each.ema = True
        # Enough for all references but one, which has 131 tokens. Two sources are truncated to 96.
        each.task.extra_tokens = 20
    config.checkpoint = dict(every='1 epoch', keep_last=1)


def _read_numbers(config: ml_collections.ConfigDict) -> None:
    """Number words, of which each mistake is one of the model, or of the search."""
    config.train_for = '1000 steps'
    config.vars.vocab_size = 400
    config.model.update(layers=2, width=64, heads=4, dropout_rate=0.0)
    config.optimizer.learning_rate.update(peak_value=2e-3, warmup_steps=200)

    def pairs(split: str, count: int) -> dict:
        return dict(target='trainer.data.number_words:NumberWords', split=split, count=count)

    splits = {'train': pairs('train', 20_000), 'test': pairs('test', 500)}
    _set_data(config, splits, lengths=(16,), batch_size=64)
    config.evals.test.every = '500 steps'
    config.ema = dict(decay=0.98)
    config.evals.test.ema = True
    config.evals.test.task.extra_tokens = 8
    config.evals.test.score.metrics = ()  # Exact matches are enough.
    config.checkpoint = dict(every='500 steps', keep_last=1)


def _set_data(
    config: ml_collections.ConfigDict,
    splits: dict[str, dict],
    lengths: tuple[int, ...],
    batch_size: int,
) -> None:
    """Sets the splits, in batches of a few lengths.

    Args:
        config: the config.
        splits: pairs of texts by name; one is 'train'.
        lengths: tokens of a padded text; each is compiled once.
        batch_size: number of pairs.
    """
    vocabulary = dict(
        target='trainer.data.translation:make_bpe',
        pairs=splits['train'],
        size=config.vars.get_ref('vocab_size'),
        directory=config.vars.get_ref('vocabulary'),
    )

    def source(split: str, lengths: tuple[int, ...], **options: object) -> dict:
        tokenized = 'trainer.data.translation:TokenizedPairs'
        return dict(
            target='trainer.data.sequences:PaddedSequences',
            items=dict(target=tokenized, pairs=splits[split], vocabulary=vocabulary),
            fields=('sources', 'targets'),
            lengths=lengths,
            **options,
        )

    # Pairs of similar length together: less padding.
    train = source('train', lengths, group=4 * batch_size)
    train['items']['max_tokens'] = lengths[-1]
    config.data = dict(source=train, batch_size=batch_size)
    # One length: most batches have a long text, and a search takes long to compile. All pairs
    # count: longer ones are truncated, but not the text that their translation is compared with.
    config.evals = {
        split: _evaluate(config.task, vocabulary, source(split, lengths[-1:], truncate=True))
        for split in splits
        if split != 'train'
    }


def _evaluate(task: ml_collections.ConfigDict, vocabulary: dict, source: dict) -> dict:
    """Returns an evaluation with the search for translations, once, at the end."""
    return dict(
        every='never',
        data=dict(source=source, batch_size=64),
        model=dict(decode=True),
        task=dict(
            task,
            search=dict(ref='trainer.models.beam_search:beam_search'),
            beams=4,
            length_penalty=0.6,
            extra_metrics=dict(perplexity=dict(target='trainer.metrics:Perplexity')),
        ),
        score=dict(
            target='trainer.scores:Translation',
            vocabulary=vocabulary,
            metrics=('bleu', 'chrf'),
            fields=('source_text', 'target_text'),
        ),
    )
