# SPDX-License-Identifier: Apache-2.0
"""Every product of every shipped model is in the requested half precision."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.command import ROOT
from tests.marks import slow_except
from trainer.data.graphs import GraphsTuple
from trainer.models.actor_critic import ActorCritic
from trainer.models.bert import Encoder, SentenceEncoder, TextClassifier
from trainer.models.bilstm import BiLSTM
from trainer.models.cnn import CNN
from trainer.models.cnn_nnx import CNN as NNXCNN
from trainer.models.decoding import with_cache
from trainer.models.efficientnet import EfficientNet
from trainer.models.gcn import GCN
from trainer.models.generation import generate
from trainer.models.gnn import GraphNetwork
from trainer.models.graphs import mean_nodes, sum_edges, sum_nodes
from trainer.models.mixer import Mixer
from trainer.models.mixer_nnx import Mixer as NNXMixer
from trainer.models.mlp import MLP
from trainer.models.mlp_nnx import MLP as NNXMLP
from trainer.models.norm import GroupedBatchNorm
from trainer.models.recurrent import Seq2Seq
from trainer.models.resnet import ResNet
from trainer.models.tagger import Tagger
from trainer.models.transformer import Transformer
from trainer.models.transformer_nnx import Transformer as NNXTransformer
from trainer.models.translator import Translator
from trainer.models.vae import VAE
from trainer.models.vae_nnx import VAE as NNXVAE
from trainer.models.vit import ViT
from trainer.models.vit_nnx import ViT as NNXViT
from trainer.modules.functional import as_functional
from trainer.modules.precision import AS_IS, Precision
from trainer.modules.rng import Keys
from trainer.observe import flops
from trainer.step.context import StepContext
from trainer.step.one_model import TrainStep
from trainer.step.optimizer import Optimizer
from trainer.step.programs import Programs
from trainer.tasks.runner import TaskRunner

# Ways to compute in half precision: `precision`, arguments of the module, and the dtype.
WAYS: dict[str, tuple[Precision, dict[str, Any], str]] = {
    'cast-bfloat16': (Precision(compute='bfloat16', output='float32'), {}, 'bfloat16'),
    'cast-float16': (Precision(compute='float16', output='float32'), {}, 'float16'),
    'kept-bfloat16': (Precision(params='bfloat16', output='float32'), {}, 'bfloat16'),
    'own-bfloat16': (AS_IS, {'dtype': jnp.bfloat16}, 'bfloat16'),
    'own-float16': (AS_IS, {'dtype': jnp.float16}, 'float16'),
    'all-bfloat16': (AS_IS, {'dtype': jnp.bfloat16, 'param_dtype': jnp.bfloat16}, 'bfloat16'),
}
CAST = [name for name in WAYS if name.startswith('cast')]
# Those of the quick tests: one that casts, and one that asks the module.
QUICK_WAYS = ('cast-bfloat16', 'own-bfloat16')
SOME = [pytest.param(name, marks=() if name in QUICK_WAYS else pytest.mark.slow) for name in WAYS]


def tokens(rows: int = 2) -> Any:
    return np.random.default_rng(0).integers(1, 11, (rows, 8), np.int32)


def images(size: int = 8, channels: int = 1) -> Any:
    return np.random.default_rng(0).normal(size=(4, size, size, channels)).astype('f4')


def product_dtypes(equation: Any, around: str) -> str:
    """Returns the dtypes of the operands of a product, '' for another equation."""
    kinds = sorted({operand.aval.dtype.name for operand in equation.invars})
    return ' x '.join(kinds) if equation.primitive.name in flops.PRODUCTS else ''


def dtypes(
    module: Any,
    precision: Precision,
    *args: Any,
    mode: str = 'train',
    call: Callable[..., Any] = lambda model, *args, **kwargs: model(*args, **kwargs),
    **kwargs: Any,
) -> set[str]:
    """Returns the dtypes of all products of the forward pass, and in training of the backward."""
    model = as_functional(module, precision)

    def task(bound: Any, batch: Any) -> jax.Array:
        return jnp.asarray(call(bound, *batch[0], **batch[1]), jnp.float32).sum()

    def init(batch: Any) -> Any:
        return nn.meta.unbox(dict(model.init(task, batch, Keys(seed=0, mode='init'))))

    def loss(params: Any, rest: Any, batch: Any) -> jax.Array:
        keys = Keys(seed=0, mode=mode, step=jnp.int32(0))  # type: ignore[arg-type]
        return task(model.bind({'params': params, **rest}, keys), batch)

    batch = (args, kwargs)
    rest = jax.eval_shape(init, batch)
    params = rest.pop('params')
    run = jax.grad(loss) if mode == 'train' else loss
    return set(flops.count_by_key(jax.make_jaxpr(run)(params, rest, batch), product_dtypes, ''))


def transformer(**options: Any) -> Transformer:
    return Transformer(vocab_size=11, layers=2, width=8, heads=2, max_length=8, **options)


def translator(**options: Any) -> Translator:
    return Translator(vocab_size=11, layers=1, width=8, heads=2, **options)


def encoder(**options: Any) -> Encoder:
    return Encoder(vocab_size=11, layers=1, width=8, heads=2, max_length=8, **options)


def bilstm(**options: Any) -> BiLSTM:
    return BiLSTM(vocab_size=11, width=4, hidden=4, **options)


def seq2seq(**options: Any) -> Seq2Seq:
    return Seq2Seq(vocab_size=11, hidden=4, **options)


LOOPED = [{'remat': remat} for remat in ('none', 'full', 'dots_saveable')]
SCANNED = [{'scan_layers': True, 'unroll': unroll, **each} for unroll in (1, 2) for each in LOOPED]
FORMS = {'looped': LOOPED, 'scanned': SCANNED}
PACKED: dict[str, Any] = {
    'segments': np.array([[1, 1, 1, 2, 2, 2, 2, 0]] * 2, np.int32),
    'positions': np.array([[0, 1, 2, 0, 1, 2, 3, 0]] * 2, np.int32),
}


@pytest.mark.parametrize(
    ('form', 'way'),
    slow_except(
        [('looped', 'own-bfloat16'), ('scanned', 'cast-bfloat16')],
        itertools.product(FORMS, WAYS),
    ),
)
def test_transformer(form: str, way: str) -> None:
    """All options of the layers, with dropout and packed sequences."""
    precision, own, half = WAYS[way]
    for options in FORMS[form]:
        model = transformer(dropout_rate=0.1, **options, **own)
        assert dtypes(model, precision, tokens(), **PACKED) == {half}, options


@pytest.mark.parametrize('way', slow_except(['cast-bfloat16'], WAYS))
def test_rotary_positions_and_tied_embeddings(way: str) -> None:
    """In Linen and in NNX."""
    precision, own, half = WAYS[way]
    options: dict[str, Any] = dict(positions='rotary', tied=True, dropout_rate=0.1, **own)
    small: dict[str, Any] = dict(vocab_size=11, layers=1, width=8, heads=2, max_length=8)
    models = (
        transformer(**options),
        lambda rngs: NNXTransformer(**small, **options, rngs=rngs),
        lambda rngs: NNXTransformer(**small, **own, rngs=rngs),
    )
    for model in models:
        assert dtypes(model, precision, tokens(), **PACKED) == {half}


@pytest.mark.slow
@pytest.mark.parametrize('way', WAYS)
def test_every_combination_of_a_transformer_s_options(way: str) -> None:
    precision, own, half = WAYS[way]
    combined = itertools.product((*LOOPED, *SCANNED), (0.0, 0.1), ({}, PACKED))
    for options, dropout_rate, packed in combined:
        model = transformer(dropout_rate=dropout_rate, **options, **own)
        found = dtypes(model, precision, tokens(), **packed)
        assert found == {half}, (options, dropout_rate, bool(packed))


@pytest.mark.slow
@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('half', ['bfloat16', 'float16'])
@pytest.mark.parametrize('own', [False, True])
def test_the_cache(half: str, scan_layers: bool, own: bool) -> None:
    """It is in half precision too; one created for float32 parameters works as well."""
    model = transformer(scan_layers=scan_layers, dtype=jnp.dtype(half) if own else None)
    decoder = model.clone(decode=True)
    variables = nn.meta.unbox(decoder.init(jax.random.key(0), tokens()))
    cast = half if not own else 'float32'
    params = jax.tree.map(lambda x: x.astype(cast), variables['params'])

    def step(cache: dict[str, Any]) -> Any:
        return decoder.apply({'params': params, **cache}, tokens()[:, :1], mutable=['cache'])

    made = jax.eval_shape(lambda: step({})[1])
    assert {x.dtype for x in jax.tree.leaves(made) if x.ndim > 1} == {jnp.dtype(half)}
    for cache in (made, {'cache': variables['cache']}):
        jaxpr, (logits, after) = jax.make_jaxpr(step, return_shape=True)(cache)
        assert set(flops.count_by_key(jaxpr, product_dtypes, '')) == {half}
        assert logits.dtype == jnp.dtype(half)
        kept = jax.tree.map(lambda new, old: new.dtype == old.dtype, after, dict(cache))
        assert all(jax.tree.leaves(kept))
    if not (own or scan_layers):
        prompt = jnp.asarray(tokens()[:, :3])
        found, _ = generate(*with_cache(decoder, {'params': params}, 2, 6), prompt, count=3)
        row = jnp.concatenate([prompt, found], axis=1)
        logits = jax.jit(model.apply)({'params': params}, row)
        assert np.array_equal(found, logits[:, 2:-1].argmax(-1))


@pytest.mark.parametrize('way', SOME)
def test_translator(way: str) -> None:
    """In training, and with an encoded source that was cast to the dtype of outputs."""
    precision, own, half = WAYS[way]
    model = translator(dropout_rate=0.1, **own)
    assert dtypes(model, precision, tokens(), tokens()) == {half}

    def decode(bound: Any, sources: Any, inputs: Any) -> Any:
        return bound.extend(inputs, bound.encode(sources))

    found = dtypes(model, precision, tokens(), tokens(), mode='eval', call=decode)
    assert found == {half}


@pytest.mark.slow
@pytest.mark.parametrize('own', [False, True])
def test_the_cache_of_a_translator(own: bool) -> None:
    """It has the dtype of the computation; one of float32 works as well, and stays as it is."""
    decoder = translator(decode=True, dtype=jnp.bfloat16 if own else None)
    variables = nn.meta.unbox(decoder.init(jax.random.key(0), tokens(), tokens()))
    cast = 'float32' if own else 'bfloat16'
    params = jax.tree.map(lambda x: x.astype(cast), variables['params'])

    def step(cache: dict[str, Any]) -> Any:
        return decoder.apply({'params': params, **cache}, *2 * [tokens()[:, :1]], mutable=['cache'])

    made = jax.eval_shape(lambda: step({})[1])
    assert {x.dtype for x in jax.tree.leaves(made) if x.ndim > 1} == {jnp.dtype('bfloat16')}
    for cache in (made, {'cache': variables['cache']}):
        jaxpr, (_, after) = jax.make_jaxpr(step, return_shape=True)(cache)
        assert set(flops.count_by_key(jaxpr, product_dtypes, '')) == {'bfloat16'}
        kept = jax.tree.map(lambda new, old: new.dtype == old.dtype, after, dict(cache))
        assert all(jax.tree.leaves(kept))


@pytest.mark.slow
@pytest.mark.parametrize('way', WAYS)
def test_recurrent(way: str) -> None:
    """Including the carry from token to token, from the first one on."""
    precision, own, half = WAYS[way]
    lengths = np.array([3, 0], np.int32)
    model = seq2seq(dropout_rate=0.1, **own)
    assert dtypes(model, precision, tokens(), lengths, tokens()) == {half}

    def decode(bound: Any, inputs: Any, lengths: Any) -> Any:
        bound(inputs, lengths, inputs)  # Creates the parameters.
        return bound.greedy(inputs, lengths, 4)

    assert dtypes(model, precision, tokens(), lengths, mode='eval', call=decode) == {half}

    def state(equation: Any, around: None) -> None:
        if equation.primitive.name == 'scan':
            first = equation.params['num_consts']
            carry = equation.invars[first : first + equation.params['num_carry']]
            carried.extend(x.aval.dtype for x in carry)

    inputs = (tokens(), lengths, tokens())
    params = model.init(jax.random.key(0), *inputs)['params']
    params = jax.tree.map(lambda x: x if own else x.astype(half), params)
    carried: list[Any] = []
    jaxpr = jax.make_jaxpr(lambda params: model.apply({'params': params}, *inputs))(params)
    flops.count_by_key(jaxpr, state, None)
    # Two texts are read, one is written, each with two states.
    assert [x.name for x in carried if jnp.issubdtype(x, jnp.floating)] == 6 * [half]


@pytest.mark.slow
@pytest.mark.parametrize('way', WAYS)
def test_bilstm(way: str) -> None:
    precision, own, half = WAYS[way]
    model = bilstm(dropout_rate=0.1, word_dropout_rate=0.1, **own)
    for mode in ('train', 'eval'):
        assert dtypes(model, precision, tokens(), mode=mode) == {half}


@pytest.mark.parametrize('way', slow_except(['cast-bfloat16'], WAYS))
def test_bert(way: str) -> None:
    precision, own, half = WAYS[way]
    named = {'mask': tokens() > 3, 'token_types': tokens() % 2}
    made = encoder(dropout_rate=0.1, **own)
    assert dtypes(made, precision, tokens(), **named) == {half}
    for mode in ('train', 'eval'):
        for model in (SentenceEncoder(made), TextClassifier(made, dropout_rate=0.1)):
            assert dtypes(model, precision, tokens(), mode=mode) == {half}


RESNETS = list(itertools.product(('basic', 'bottleneck'), ('large', 'small'), (1, 2)))
QUICK_RESNETS = (('basic', 'small', 2), ('bottleneck', 'large', 1))


@pytest.mark.parametrize(
    'way', ['cast-bfloat16', 'own-bfloat16', pytest.param('cast-float16', marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ('block', 'stem', 'groups'),
    [pytest.param(*x, marks=() if x in QUICK_RESNETS else pytest.mark.slow) for x in RESNETS],
)
def test_resnet(block: Any, stem: Any, groups: int, way: str) -> None:
    precision, own, half = WAYS[way]
    sizes: dict[str, Any] = dict(stages=(1, 1), features=4, num_classes=10)
    model = ResNet(block=block, stem=stem, norm_groups=groups, **sizes, **own)
    for mode in ('train', 'eval'):
        assert dtypes(model, precision, images(16, 3), mode=mode) == {half}


@pytest.mark.parametrize(
    'way', ['cast-bfloat16', pytest.param('own-float16', marks=pytest.mark.slow)]
)
def test_efficientnet(way: str) -> None:
    precision, own, half = WAYS[way]
    stages = ((1, 3, 1, 1, 4), (1, 5, 2, 2, 4))
    model = EfficientNet(num_classes=3, stages=stages, stem=4, width=8, **own)
    for form in ('conv', 'sum'):
        changed = model.clone(depthwise=form)
        for mode in ('train', 'eval'):
            assert dtypes(changed, precision, images(8, 3), mode=mode) == {half}


PATCHES: dict[str, Any] = dict(num_classes=3, patch_size=4, layers=1, width=8, dropout_rate=0.1)


@pytest.mark.parametrize(
    # Not with half-precision parameters alone: the dtype of the images would decide.
    'way',
    [x for x in SOME if x.values[0] != 'kept-bfloat16'],
)
def test_models_of_patches(way: str) -> None:
    """Transformers and mixers, in Linen and in NNX."""
    precision, own, half = WAYS[way]
    options = {**PATCHES, **own}
    models = (
        ViT(heads=2, **options),
        Mixer(**options),
        lambda rngs: NNXViT(heads=2, size=8, channels=1, rngs=rngs, **options),
        lambda rngs: NNXMixer(size=8, channels=1, rngs=rngs, **options),
    )
    for model in models:
        assert dtypes(model, precision, images()) == {half}


@pytest.mark.parametrize('way', SOME)
def test_autoencoder(way: str) -> None:
    precision, own, half = WAYS[way]
    models: list[Any] = [VAE(shape=(8, 8, 1), latents=2, hidden=4, **own)]
    if not own:
        models.append(lambda rngs: NNXVAE(shape=(8, 8, 1), latents=2, hidden=4, rngs=rngs))

    def call(model: Any, x: Any) -> Any:
        logits, mean, log_variance = model(x, jax.random.key(0))
        return logits.sum() + mean.sum() + log_variance.sum()

    # In bytes, as images are read: floats of another dtype would decide that of the products.
    pixels = np.ones((4, 8, 8, 1), np.uint8)
    for model in models:
        assert dtypes(model, precision, pixels, call=call) == {half}


@pytest.mark.parametrize('way', SOME)
def test_tagger(way: str) -> None:
    precision, own, half = WAYS[way]
    model = Tagger(
        num_tags=3, num_words=11, num_characters=11, word_width=4, filters=4, hidden=4,
        dropout_rate=0.1, word_dropout_rate=0.1, **own,
    )  # fmt: skip
    inputs = {'words': tokens(), 'characters': np.repeat(tokens()[..., None], 4, axis=-1)}
    assert dtypes(model, precision, inputs) == {half}


@pytest.mark.parametrize('half', [jnp.bfloat16, jnp.float16])
def test_sums_over_graphs(half: Any) -> None:
    nodes, ends, counts = jnp.ones((4, 3), half), jnp.array([0, 1]), jnp.array([3, 1])
    graph = GraphsTuple(nodes, None, ends, ends, None, counts, jnp.array([2, 0]))
    found = (sum_nodes(graph, nodes), mean_nodes(graph, nodes), sum_edges(graph, nodes[:2]))
    assert {x.dtype for x in found} == {jnp.dtype(half)}


@pytest.mark.parametrize(
    'way', ['cast-bfloat16', *(pytest.param(x, marks=pytest.mark.slow) for x in [*WAYS][1:])]
)
@pytest.mark.parametrize('norm', ['batch', pytest.param('layer', marks=pytest.mark.slow)])
def test_graph_network(way: str, norm: str) -> None:
    precision, own, half = WAYS[way]
    ends, counts = jnp.array([0, 1]), jnp.array([3, 1])
    features = jnp.ones((4, 2), int)
    graph = GraphsTuple(features, features[:2], ends, ends, None, counts, jnp.array([2, 0]))
    sizes: Any = {'node_sizes': (2, 3), 'edge_sizes': (2, 3), 'outputs': (1,), 'width': 4}
    model = GraphNetwork(**sizes, rounds=2, dropout_rate=0.1, norm=norm, **own)
    assert dtypes(model, precision, graph) == {half}


@pytest.mark.slow
@pytest.mark.parametrize('way', WAYS)
def test_graph_convolutions(way: str) -> None:
    precision, own, half = WAYS[way]
    graph = {name: tokens() for name in ('nodes', 'senders', 'receivers')}
    model = GCN(11, num_classes=3, width=4, dropout_rate=0.1, **own)
    assert dtypes(model, precision, graph) == {half}


class Normed(nn.Module):
    """A group normalization between two dense layers."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        norm = GroupedBatchNorm(use_running_average=not train, groups=2)
        return nn.Dense(4)(norm(nn.Dense(8)(x)))


class Policy(nn.Module):
    """The logits of a policy and the value of its critic in one array."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        logits, value = ActorCritic(features=(8, 8))(x)
        return logits + value[:, None]


NNX_OPTIONS: dict[str, Any] = {'inputs': 64, 'features': (8, 8, 4)}
FOLLOWING: dict[str, Any] = {
    'actor_critic': Policy(),
    'cnn': CNN(dropout_rate=0.1),
    'cnn_nnx': lambda rngs: NNXCNN(dropout_rate=0.1, size=8, rngs=rngs),
    'mlp': MLP((8, 8, 4), dropout_rate=0.1),
    'mlp_norm': MLP((8, 8, 4), batch_norm=True),
    'mlp_nnx': lambda rngs: NNXMLP(dropout_rate=0.1, **NNX_OPTIONS, rngs=rngs),
    'mlp_nnx_norm': lambda rngs: NNXMLP(batch_norm=True, **NNX_OPTIONS, rngs=rngs),
    'norm': Normed(),
}


@pytest.mark.parametrize('way', CAST)
@pytest.mark.parametrize('name', FOLLOWING)
def test_models_without_a_dtype_of_their_own(name: str, way: str) -> None:
    precision, _, half = WAYS[way]
    for mode in ('train', 'eval'):
        assert dtypes(FOLLOWING[name], precision, images(), mode=mode) == {half}


def test_every_model_file_is_covered() -> None:
    files = {path.stem for path in (ROOT / 'models').glob('*.py')}
    # They compute nothing but sums of logits, in float32, and environments.
    files -= {'beam_search', 'cartpole', 'rollouts'}
    text = pathlib.Path(__file__).read_text()
    assert all(f'from trainer.models.{name} import' in text for name in files)


# Of seven options with two values, each pair of values in one of eight rows.
OPTIONS = ('scan_layers', 'remat', 'dropout', 'packed', 'float16', 'own', 'micro-batches')
PAIRWISE = [
    [a, b, a ^ b, c, a ^ c, b ^ c, a ^ b ^ c] for a, b, c in itertools.product((0, 1), repeat=3)
]
# Of the quick tests: layers that are scanned over.
QUICK = ([1, 1, 0, 1, 0, 0, 1],)


def test_the_option_rows_cover_every_pair() -> None:
    for one, two in itertools.combinations(range(len(OPTIONS)), 2):
        assert {(row[one], row[two]) for row in PAIRWISE} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def check_step(module: Any, precision: Precision, task: Any, batch: Any, **options: Any) -> None:
    """Runs a step, and checks that every parameter changes to a finite value."""
    step = TrainStep(StepContext(
        model=as_functional(module, precision), task=TaskRunner.from_task(task), seed=0,
        optimizer=Optimizer(base=optax.sgd(0.1)), **options
))  # fmt: skip
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ('data',), types, devices=jax.devices()[:1])
    spec = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()}
    programs = Programs(step, spec, mesh)
    state = programs.init()
    before = jax.tree.map(np.array, state.params)
    state = programs.step(state, batch)
    changes = jax.tree.leaves(
        jax.tree.map(lambda new, old: np.abs(np.asarray(new) - old).max(), state.params, before)
    )
    assert all(np.isfinite(x) for x in changes)
    # In a fresh ResNet, everything before a scale of 0 has zero gradient.
    assert sum(x > 0 for x in changes) > 0.5 * len(changes)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}


@pytest.mark.slow
@pytest.mark.parametrize(
    'row',
    [pytest.param(row, marks=() if row in QUICK else pytest.mark.slow) for row in PAIRWISE],
    ids=lambda row: ''.join(map(str, row)),
)
def test_a_step_of_a_transformer(row: list[int]) -> None:
    given = dict(zip(OPTIONS, row, strict=True))
    half = 'float16' if given['float16'] else 'bfloat16'
    model = transformer(
        scan_layers=bool(given['scan_layers']),
        remat='full' if given['remat'] else 'none',
        dropout_rate=0.1 * given['dropout'],
        dtype=jnp.dtype(half) if given['own'] else None,
    )
    precision = Precision(compute=None if given['own'] else half, output='float32')
    batch = {'tokens': tokens(4)}
    if given['packed']:
        batch.update({name: np.repeat(x, 2, 0) for name, x in PACKED.items()})

    def task(model: Any, batch: Any) -> jax.Array:
        rest = {name: x for name, x in batch.items() if name != 'tokens'}
        loss = optax.softmax_cross_entropy_with_integer_labels
        return loss(model(batch['tokens'], **rest).astype(jnp.float32), batch['tokens'])

    scale = 2.0**10 if given['float16'] else None
    check_step(
        model, precision, task, batch, accumulate=1 + given['micro-batches'], loss_scale=scale
    )


OTHERS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    'bert': (TextClassifier(encoder(dropout_rate=0.1)), (tokens(),)),
    'bilstm': (bilstm(dropout_rate=0.1, word_dropout_rate=0.1), (tokens(),)),
    'translator': (translator(dropout_rate=0.1), (tokens(), tokens())),
    'recurrent': (seq2seq(), (tokens(), np.array([3, 1], np.int32), tokens())),
    'resnet': (ResNet(stages=(1, 1), features=4, num_classes=4, stem='small', norm_groups=2),
               (images(8, 3),)),
    'efficientnet': (EfficientNet(num_classes=3, stages=((1, 3, 1, 1, 4), (1, 5, 2, 2, 4)), stem=4,
                                  width=8), (images(8, 3),)),
    **{name: (module, (images(),)) for name, module in FOLLOWING.items()},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [pytest.param(x, marks=() if x == 'mlp_nnx_norm' else pytest.mark.slow) for x in OTHERS],
)
def test_a_step_of_another_model(name: str) -> None:
    module, inputs = OTHERS[name]
    half = ('bfloat16', 'float16')[list(OTHERS).index(name) % 2]
    batch = {f'x{index}': x for index, x in enumerate(inputs)}

    def task(model: Any, batch: Any) -> jax.Array:
        output = model(*(batch[name] for name in sorted(batch)))
        # A different weight per row; otherwise a normalisation cancels the gradient.
        aim = jnp.arange(output.size, dtype=jnp.float32).reshape(output.shape) % 7
        return (output - aim) ** 2

    scale = 2.0**10 if half == 'float16' else None
    check_step(module, Precision(compute=half, output='float32'), task, batch, loss_scale=scale)
