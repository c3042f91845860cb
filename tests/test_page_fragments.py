# SPDX-License-Identifier: Apache-2.0
"""Every config fragment of a page, inserted into a config, does what the page says."""

from __future__ import annotations

import functools
import os
import pathlib
import shlex
import tempfile
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import contrib
from PIL import Image

from data import text as text_data
from tests import command
from tests.pages import FRAGMENTS, OVERRIDES, TEXTS, Block, Project, needs, parameters, run
from tests.parallel import group
from trainer.config import loading, overrides, schema
from trainer.config.errors import UserError
from trainer.experiment import Experiment, build
from trainer.models.beam_search import beam_search
from trainer.models.decoding import with_cache
from trainer.models.transformer import Transformer
from trainer.modules.rng import Keys
from trainer.trainer import Trainer
from trainer.weights import safetensors


@pytest.fixture(scope='module')
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Returns the project with the checkpoints that fragments name."""
    return Project(tmp_path_factory.mktemp('project'))


@pytest.fixture(scope='module')
def encoder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Returns the directory of a Hugging Face sentence encoder of the size `TINY`."""
    tokenizers = pytest.importorskip('tokenizers')
    root = tmp_path_factory.mktemp('encoder')
    words = {
        word: i for i, word in enumerate(('[PAD]', '[UNK]', '[CLS]', '[SEP]', 'return', 'the'))
    }
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token='[UNK]'))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pieces.save(str(root / 'tokenizer.json'))
    dense = {
        'attention.self.query': (8, 8), 'attention.self.key': (8, 8),
        'attention.self.value': (8, 8), 'attention.output.dense': (8, 8),
        'intermediate.dense': (32, 8), 'output.dense': (8, 32),
    }  # fmt: skip
    norms = ('attention.output.LayerNorm', 'output.LayerNorm')
    shapes: dict[str, tuple[int, ...]] = {
        'embeddings.word_embeddings.weight': (6, 8),
        'embeddings.position_embeddings.weight': (48, 8),
        'embeddings.token_type_embeddings.weight': (2, 8),
        'embeddings.LayerNorm.weight': (8,),
        'embeddings.LayerNorm.bias': (8,),
    }
    for name, shape in {**dense, **dict.fromkeys(norms, (8,))}.items():
        shapes[f'encoder.layer.0.{name}.weight'] = shape
        shapes[f'encoder.layer.0.{name}.bias'] = shape[:1]
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype('f4') for name, shape in shapes.items()}
    safetensors.write(root / 'model.safetensors', tensors)
    return root


TINY = {
    'model.encoder': {'layers': 1, 'width': 8, 'heads': 2, 'vocab_size': 6, 'max_length': 48},
    'data.source.limit': 64,
    'evals.test.data.source.limit': 32,
}
TINY_LM = {'model': {'layers': 2, 'width': 16, 'heads': 2}, 'evals': {}}
MNIST = {'data.source.limit': 320, 'evals.test.data.source.limit': 64}


def build_fragment(config: str, fragment: str, options: dict[str, Any]) -> Experiment:
    """Returns the experiment of a config file with a fragment inserted, two steps long."""
    loaded = loading.load(str(command.ROOT / 'configs' / config))
    with loaded.config.unlocked():
        exec(compile(fragment, 'fragment', 'exec'), {'c': loaded.config, 'config': loaded.config})
    given = {'train_for': '2 steps', 'log.every': '1 steps', **options}
    overrides.apply(loaded.config, assignments(given))
    return build(loaded)


def assignments(options: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, x if isinstance(x, str) else repr(x)) for key, x in options.items()]


def fit(experiment: Experiment, workdir: str | None = None) -> tuple[Trainer, Any]:
    trainer = Trainer(experiment, workdir)
    result = trainer.fit()
    assert (result.status, result.step) == ('finished', experiment.training.total_steps)
    return trainer, result


def check_stacking(text: str) -> None:
    model = Transformer(layers=2, width=16, heads=2, max_length=128)
    tokens = jnp.zeros((1, 128), jnp.int32)
    params = jax.device_get(nn.meta.unbox(model.init(jax.random.key(0), tokens)['params']))
    pathlib.Path('old.msgpack').write_bytes(flax.serialization.to_bytes({'params': params}))
    options = {
        **TINY_LM,
        'model': {**TINY_LM['model'], 'scan_layers': True},
        'init_from.path': 'old.msgpack',
    }
    new = Trainer(build_fragment('lm.py:bytes', text, options)).init_state().params
    layers = [jax.tree.leaves(params[f'block_{i}']) for i in range(2)]
    for found, *old in zip(jax.tree.leaves(new['blocks']), *layers, strict=True):
        np.testing.assert_array_equal(found, np.stack(old))


SMALL_LM = {
    'model': TINY_LM['model'], 'evals.test.every': 'never', 'evals.test.final': False,
}  # fmt: skip


def check_samples(text: str) -> None:
    """The texts are written, and continue what the page says."""
    workdir = tempfile.mkdtemp(dir='.')
    trainer, result = fit(build_fragment('lm.py:bytes', text, SMALL_LM), workdir)
    (found,) = trainer.predict('samples', result.state)
    assert len(found['generated']) in (4, 8) and found['generated'].shape[1] == 64
    [path] = pathlib.Path(workdir).rglob('samples.txt')
    assert path.read_text().count('▶') == len(found['generated'])


def check_search(text: str) -> None:
    limits = {'evals.lines.data.source.limit': 3, 'evals.lines.task.count': 8}
    trainer, result = fit(build_fragment('lm.py:bytes', text, {**SMALL_LM, **limits}))
    (found,) = trainer.predict('lines', result.state)
    source = text_data.python_source(128, split='test', limit=3)
    prompt = jnp.asarray(source.gather(np.arange(3))['inputs'][:, :32])
    model, variables = trainer.model(result.state).unbind()
    decoder = with_cache(model.clone(decode=True), variables, 3, 40)
    expected = beam_search(*decoder, prompt, count=8, beams=4, stop=10)
    np.testing.assert_array_equal(found['line'], expected.tokens[:, 0])
    assert 'eval/lines/loss' not in result.metrics


class Edited(nn.Module):
    """The model after the surgery of the pages."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)[:, :4]
        x = x + self.param('positions', nn.initializers.normal(), (577, 4)).mean(0)
        x = nn.LayerNorm(name='norm')(nn.Dense(4, name='new')(x))
        return nn.Dense(20, name='head')(x)


def check_surgery(text: str) -> None:
    old = {
        'positions': np.arange(17 * 4, dtype='f4').reshape(17, 4),
        'old': {'kernel': np.full((4, 4), 3, 'f4'), 'bias': np.full(4, 5, 'f4')},
        'norm': {'scale': np.full(4, 7, 'f4'), 'bias': np.full(4, 9, 'f4')},
        'head': {'kernel': np.full((4, 10), 11, 'f4'), 'bias': np.full(10, 13, 'f4')},
    }
    pathlib.Path('old.msgpack').write_bytes(flax.serialization.to_bytes({'params': old}))
    options = {**MNIST, 'model': {'target': f'{__name__}:Edited'}, 'init_from.path': 'old.msgpack'}
    new = Trainer(build_fragment('mnist_mlp.py', text, options)).init_state().params
    np.testing.assert_array_equal(new['positions'][0], old['positions'][0])
    assert (new['new']['kernel'] == 3).all() and (new['norm']['bias'] == 9).all()
    assert (new['norm']['scale'] == 1).all()
    assert (new['head']['kernel'][:, :10] == 11).all() and (new['head']['bias'][10:] == 0).all()


def from_torch(text: str, encoder: pathlib.Path) -> None:
    os.chdir(encoder)
    params = (
        Trainer(build_fragment('docstrings.py', text, {**TINY, 'vars.encoder': '.'}))
        .init_state()
        .params
    )
    held = safetensors.read(encoder / 'model.safetensors')
    np.testing.assert_array_equal(
        params['encoder']['layer_0']['mlp_in']['kernel'],
        held['encoder.layer.0.intermediate.dense.weight'].T,
    )


def swept(text: str) -> None:
    _, result = fit(build_fragment('mnist_mlp.py', text, MNIST))
    assert {f'train/member_{i}/loss' for i in range(3)} <= set(result.metrics)


def spread(text: str) -> None:
    made = build_fragment('mnist_mlp.py', text, {**MNIST, 'ensemble.size': 4})
    trainer = Trainer(made)
    assert dict(trainer.set_up().mesh.shape) == {'ensemble': 4, 'data': 2}
    kernel = trainer.init_state().params['Dense_0']['kernel']
    assert kernel.sharding.spec[0] == 'ensemble'


def one_member(text: str) -> None:
    made = build_fragment('mnist_mlp.py', text, MNIST)
    assert made.start.weights is not None and made.start.weights.member == 2
    Trainer(made).init_state()


def cut(text: str) -> None:
    trainer = Trainer(build_fragment('mnist_mlp.py', text, MNIST))
    assert dict(trainer.set_up().mesh.shape) == {'data': 2, 'fsdp': 4}
    assert 'fsdp' in trainer.init_state().params['Dense_0']['kernel'].sharding.spec


def check_grain_loader(text: str) -> None:
    trainer, _ = fit(build_fragment('mnist_mlp.py', text, MNIST))
    assert type(trainer.experiment.data.loader).__name__ == 'GrainLoader'


def check_image_folder(text: str) -> None:
    pytest.importorskip('simplejpeg')
    pytest.importorskip('cv2')
    pixels = np.random.default_rng(0).integers(0, 256, (9, 90, 70, 3)).astype(np.uint8)
    for i, image in enumerate(pixels):
        path = pathlib.Path('photos', f'class{i % 3}', f'{i}.jpg')
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    trainer, _ = fit(build_fragment('mnist_mlp.py', text, {'evals': {}, 'data.batch_size': 8}))
    assert trainer.experiment.data.spec['image'].shape == (8, 224, 224, 3)


def check_packing(text: str) -> None:
    fit(build_fragment('lm_packed.py', text, TINY_LM))


def check_stages(text: str) -> None:
    """Only images of the digits below five, each followed by its mirror image."""
    loader = build_fragment('mnist_mlp.py', text, MNIST).data.loader
    arrays = loader.block(0, 1).arrays
    assert set(arrays['label'].ravel()) <= set(range(5))
    labels = arrays['label'].reshape(-1, 2)
    np.testing.assert_array_equal(labels[:, 0], labels[:, 1])
    images = arrays['image'].reshape(-1, 2, 28, 28).astype(int)
    # Each of the two has noise of its own.
    near = [np.abs(images[:, 0] - x).mean() for x in (images[:, 1, :, ::-1], images[:, 1])]
    assert near[0] < near[1]
    fit(
        build_fragment(
            'mnist_mlp.py',
            text,
            {**MNIST, 'evals.test.every': '2 steps', 'checkpoint.every': 'never'},
        )
    )


def check_augmentation(text: str, library: str = 'numpy') -> None:
    """The images of a batch change with the epoch, and not with the time they are read."""
    pytest.importorskip(library)
    loader = build_fragment('mnist_mlp.py', text, {**MNIST, 'data.shuffle': False}).data.loader
    per_epoch = int(loader.steps_per_epoch)
    first, again, later = (loader.block(i, 1).arrays['image'] for i in (0, 0, per_epoch))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.uint8 and (first != later).any()
    fit(build_fragment('mnist_mlp.py', text, MNIST))


def augmented_on_devices(text: str) -> None:
    made = build_fragment('mnist_mlp.py', text, MNIST)
    image = np.asarray(made.data.loader.block(0, 1).arrays['image'][0])

    def prepare(mode: str, step: int) -> np.ndarray:
        keys = Keys(seed=made.seed, mode=mode, step=step)
        return np.asarray(made.task.prepare_batch({'image': jnp.asarray(image)}, keys)['image'])

    np.testing.assert_allclose(prepare('eval', 0), image / 255, rtol=1e-6)
    np.testing.assert_array_equal(prepare('train', 3), prepare('train', 3))
    assert (prepare('train', 3) != prepare('train', 4)).any()
    fit(made)


def classified_mirrored(text: str) -> None:
    _, result = fit(build_fragment('mnist_mlp.py', text, MNIST))
    assert {'train/accuracy', 'eval/test/accuracy'} <= set(result.metrics)


def halves(text: str) -> None:
    trainer, _ = fit(build_fragment('mnist_mlp.py', text, MNIST))
    assert 'bf16' in str(trainer.set_up().programs.step.jaxpr())


def check_loss_scale(text: str) -> None:
    trainer, result = fit(build_fragment('mnist_mlp.py', text, MNIST))
    assert trainer.experiment.training.loss_scale == 1024
    assert result.metrics['train/loss_scale'] == 1024
    assert 'f16' in str(trainer.set_up().programs.step.jaxpr())


def check_eval_params(text: str) -> None:
    trainer, result = fit(build_fragment('mnist_mlp.py', text, MNIST))
    point = contrib.schedule_free_eval_params(result.state.opt_state, result.state.params)
    found = trainer.eval_params(result.state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, point)


def check_plateau(text: str) -> None:
    trainer, result = fit(build_fragment('mnist_mlp.py', text, MNIST))
    length = trainer.experiment.origin.schedule_steps['config.optimizer.args[1].accumulation_size']
    assert length == trainer.experiment.clock.steps_per_epoch
    state = result.state.opt_state[1]
    # The mean of the losses so far, or of a whole epoch.
    assert float(state.avg_value) > 0 or float(state.best_value) < np.inf


def check_early_stopping(text: str) -> None:
    trainer, _ = fit(build_fragment('mnist_mlp.py', text, MNIST))
    assert trainer.experiment.training.early_stopping is not None
    assert trainer.experiment.training.early_stopping.patience == 2


def check_metrics(text: str) -> None:
    _, result = fit(build_fragment('mnist_mlp.py', text, MNIST))
    assert {'eval/test/f1', 'eval/test/auc', 'train/f1'} <= set(result.metrics)


def check_profile(text: str) -> None:
    fit(build_fragment('mnist_mlp.py', text, {**MNIST, 'train_for': '11 steps'}), 'profiled')
    assert any(path.is_file() for path in pathlib.Path('profiled/profile').rglob('*'))


# By a word of the fragment: the config that it belongs into, and what it must have done there.
CASES: dict[str, Callable[..., None]] = {
    'weights:Stack': check_stacking,
    'weights:Resize': check_surgery,
    "layout='torch'": from_torch,
    'vary=': swept,
    'dict(ensemble=4': spread,
    'member=2': one_member,
    'fsdp': cut,
    'images:ImageFolder': check_image_folder,
    'threads=8': check_grain_loader,
    'stages:Pack': check_packing,
    'mine.on_host:Below': check_stages,
    'mine.on_host:invert_some': check_augmentation,
    'mine.on_host:erase': check_augmentation,
    "(dict(target='mine.on_host:Noise'),)": check_augmentation,
    'albumentations:': functools.partial(check_augmentation, library='albumentations'),
    'torchvision.': functools.partial(check_augmentation, library='torchvision'),
    'mine.on_devices:shift': augmented_on_devices,
    'mine.on_devices:classify_mirrored': classified_mirrored,
    "compute='bfloat16'": halves,
    "compute='float16'": check_loss_scale,
    'trainer.metrics:F1': check_metrics,
    'mine.even:Even': check_metrics,
    'mine.searched': check_search,
    'tasks:Continuation': check_samples,
    'early_stopping': check_early_stopping,
    'config.profile': check_profile,
    'eval_params': check_eval_params,
    'reduce_on_plateau': check_plateau,
}


@pytest.mark.slow
@pytest.mark.parametrize('block', parameters(FRAGMENTS))
def test_fragment(
    block: Block, project: Project, request: Any, monkeypatch: Any, tmp_path: Any
) -> None:
    """The fragment builds and, if there is a case for it, does what the page says."""
    cases = [case for word, case in CASES.items() if word in block.text]
    needed = needs(block.text)
    for line in needed:
        project.run(line)
    monkeypatch.chdir(project.root)
    monkeypatch.syspath_prepend(str(project.root))
    for case in cases:
        more = [request.getfixturevalue('encoder')] if case is from_torch else []
        case(block.text, *more)
    if not cases:
        build_fragment(block.config, block.text, {})


def test_each_case_has_its_fragment() -> None:
    texts = [block.text for block in FRAGMENTS]
    assert [word for word in CASES if not any(word in text for text in texts)] == []


CONFIGS = sorted(path.name for path in (command.ROOT / 'configs').glob('*.py'))


@pytest.mark.parametrize('block', parameters(OVERRIDES))
def test_override_within_a_sentence(block: Block) -> None:
    """It can be passed to at least one config, and changes it."""
    _, given, rest = overrides.parse_argv(shlex.split(block.text))
    assert given and not rest
    errors = []
    for name in CONFIGS:
        loaded = loading.load(str(command.ROOT / 'configs' / name))
        before = loading.to_plain(loaded.config)
        try:
            overrides.apply(loaded.config, given)
            schema.read(loading.to_plain(loaded.config))
        except UserError as error:
            errors.append(str(error))
        else:
            if loading.to_plain(loaded.config) != before:
                return
    raise AssertionError(f'{block.text} suits no config:\n' + '\n'.join(dict.fromkeys(errors)))


@pytest.mark.slow
def test_fine_tuning(encoder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Runs the command, with the directory of a small encoder."""
    [line] = {text.strip() for text in TEXTS if 'vars.encoder=DIRECTORY' in text}
    small = [f'--config.{key}={value!r}' for key, value in TINY.items()]
    finished = run(line.replace('DIRECTORY', str(encoder)), tmp_path, *small)
    assert finished.code == 0, finished.err
    assert 'model.safetensors' in finished.out
    assert 'eval test at step 3' in finished.out


@pytest.mark.slow
@pytest.mark.parametrize('line', [*dict.fromkeys(x.strip() for x in TEXTS if '--coordinator' in x)])
def test_two_processes(line: str, tmp_path: pathlib.Path) -> None:
    """Runs the command in two processes; they connect, and the first one prints."""
    assert '/shared/run' in line and 'host0:1234' in line and line.endswith('--process_id=0')
    line = line.replace('/shared/run', str(tmp_path / 'run'))
    line = line.replace('host0:1234', f'127.0.0.1:{group.free_port()}')
    words = shlex.split(line.removeprefix('python -m trainer.main').removesuffix('0'))
    running = [
        command.start(*words[:-1], f'{words[-1]}{i}', '--mode=summary', cwd=tmp_path)
        for i in range(2)
    ]
    codes, outputs, errors = group.finish(running)
    assert codes == [0, 0], errors
    assert 'mesh data 2' in outputs[0]
    assert outputs[1] == ''


def test_no_other_text_is_a_command() -> None:
    """Two commands with placeholders are run above; one downloads, and one needs a user's file."""
    shown = [text for text in TEXTS if text.startswith(('python ', 'launch/'))]
    fine_tuning = [text for text in shown if '=DIRECTORY' in text]
    two_processes = [text for text in shown if '--coordinator' in text]
    downloads = [text for text in shown if 'download_and_prepare' in text]
    own_files = [text for text in shown if 'mine.tsv' in text]
    assert fine_tuning and two_processes
    known = (fine_tuning, two_processes, downloads, own_files)
    assert len(shown) == sum(map(len, known))
    assert len(downloads) <= 1
