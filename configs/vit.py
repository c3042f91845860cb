# SPDX-License-Identifier: Apache-2.0
"""Vision transformers and MLP-Mixers: ViT-S/16 on ImageNet, and small ones on 28 x 28 images.

    python -m trainer.main --config=configs/vit.py
    python -m trainer.main --config=configs/vit.py:fashion
    python -m trainer.main --config=configs/vit.py:fashion,finetune
    python -m trainer.main --config=configs/vit.py:tiny,mixer,nnx

The words after the colon choose

- the data: ImageNet (TFDS `imagenet2012`) by default; `fashion` is Fashion-MNIST (Debian package
  `dataset-fashion-mnist`), `tiny` a smaller model on MNIST
- the model: a ViT in Linen by default; `mixer`, and `nnx` for the same in NNX
- `finetune`: starts from the weights of the run without this word, and trains at 56 x 56 pixels.

Published for ViT-S/16 after 90 epochs: 76.5 % of the 50,000 validation images (Beyer et al., 2022,
"Better plain ViT baselines for ImageNet-1k"). ImageNet: not run yet. Fashion-MNIST: not run yet.
`:tiny`: 93.7 % of 2,000 test images after 600 steps; 26 s on two CPU cores.
docs/examples/vit.md is the page about this config.
"""

import ml_collections

WORDS = ('fashion', 'tiny', 'mixer', 'nnx', 'finetune')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """Returns the config.

    Args:
        arg: words separated by commas, see above.

    Raises:
        ValueError: for an unknown word, and for words that exclude each other.
    """
    words = set(arg.split(',')) - {''}
    if unknown := sorted(words - set(WORDS)):
        raise ValueError(f'vit: unknown {unknown}; expected some of {", ".join(WORDS)}')
    small = words & {'fashion', 'tiny'}
    if len(small) > 1 or ('finetune' in words and (not small or 'mixer' in words)):
        raise ValueError(
            "vit: expected one of 'fashion' and 'tiny'; 'finetune' needs one of them, and a ViT: a "
            f'mixer fits images of one size only; got {arg!r}'
        )
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = _model(words)
    config.task = dict(target='trainer.tasks:Classification')
    config.optimizer = dict(
        target='optax:adamw',
        learning_rate=dict(
            target='optax:warmup_cosine_decay_schedule',
            init_value=0.0,
            peak_value=1e-3,
            warmup_steps='5%',
            decay_steps='100%',
        ),
        weight_decay=0.1,
        decay_mask='.*/kernel',  # Neither biases, positions nor scales.
        clip_norm=1.0,
    )
    if small:
        _train_on_small_images(config, words)
    else:
        _train_on_imagenet(config)
    if 'finetune' in words:
        _finetune(config, words)
    return config


def _model(words: set[str]) -> dict:
    """Returns the model that the words choose."""
    if words & {'fashion', 'tiny'}:
        # 7 x 7 or 4 x 4 patches of the images.
        fashion, tiny = (
            dict(patch_size=4, layers=6, width=96),
            dict(patch_size=7, layers=2, width=64),
        )
        model = dict(tiny if 'tiny' in words else fashion, num_classes=10)
        if 'mixer' not in words:
            model.update(heads=4)
        pixels, channels = 56 if 'finetune' in words else 28, 1
    else:
        # The defaults of the models are those of S/16.
        model = dict(num_classes=1000)
        if 'mixer' not in words:
            model.update(positions='sincos')
        pixels, channels = 224, 3
    if 'nnx' in words:
        model.update(size=pixels, channels=channels)
    module, name = ('mixer', 'Mixer') if 'mixer' in words else ('vit', 'ViT')
    return dict(model, target=f'trainer.models.{module}{"_nnx" * ("nnx" in words)}:{name}')


def _train_on_imagenet(config: ml_collections.ConfigDict) -> None:
    """The setting of Beyer et al.: 90 epochs of 1,251 steps, RandAugment and Mixup."""
    config.train_for = '90 epochs'
    config.optimizer.learning_rate.warmup_steps = '10000 steps'
    config.vars = dict(name='imagenet2012', data_dir='~/tensorflow_datasets')
    source = dict(
        target='trainer.data.tfds:TFDS',
        name=config.vars.get_ref('name'),
        data_dir=config.vars.get_ref('data_dir'),
        keys=('image', 'label'),
        encoded=('image',),  # Images of many sizes: the transforms decode them.
    )
    decode = dict(target='trainer.data.images:Decode', key='image', size=224)
    # To decode and augment, 16 processes of this computer.
    loader = dict(target='trainer.data.grain_loader:GrainLoader', workers=16)
    to_float = dict(target='trainer.data.transforms:Normalize', mean=127.5, std=127.5)
    config.data = dict(
        source=dict(source, split='train'),
        loader=loader,
        transforms=(
            dict(decode, crop='random', area=(0.05, 1.0)),
            dict(target='trainer.data.transforms:RandomFlip'),
            dict(target='trainer.data.rand_augment:RandAugment', layers=2, magnitude=10.0),
        ),
        device_transforms=(
            to_float,
            dict(target='trainer.device_transforms:Mixup', alpha=0.2, num_classes=1000),
        ),
        batch_size=1024,
    )
    config.evals = dict(
        validation=dict(
            every='5 epochs',
            task=dict(config.task, top_k=(5,)),
            data=dict(
                source=dict(source, split='validation'),
                loader=dict(target='trainer.data.loader:EvalLoader', threads=16),
                transforms=(dict(decode, crop='center'),),
                device_transforms=(to_float,),
                batch_size=1024,
            ),
        ),
    )
    config.precision = dict(compute='bfloat16', output='float32')
    config.checkpoint = dict(every='1 epoch', keep_last=2)
    config.log = dict(every='50 steps')


def _train_on_small_images(config: ml_collections.ConfigDict, words: set[str]) -> None:
    """28 x 28 images: clothes, or digits."""
    tiny = 'tiny' in words
    config.train_for = '600 steps' if tiny else '20 epochs'

    module = 'mnist:MNIST' if tiny else 'fashion_mnist:FashionMNIST'
    train = dict(target=f'trainer.data.{module}', split='train')
    test = dict(target=f'trainer.data.{module}', split='test')
    # In the compiled step: the host sends bytes, not floats.
    to_float = dict(target='trainer.data.transforms:Normalize', mean=73.0, std=90.0)
    mixup = dict(target='trainer.device_transforms:Mixup', alpha=0.2, num_classes=10)
    flip = () if tiny else (dict(target='trainer.data.transforms:RandomFlip'),)
    if tiny:
        config.optimizer.learning_rate.peak_value = 3e-3
        test.update(limit=2000)
    config.data = dict(
        source=train,
        transforms=(
            *flip,
            dict(
                target='trainer.data.rand_augment:RandAugment',
                layers=1,
                magnitude=3.0,  # Few epochs need weaker augmentation than many.
                fill=0,  # These images have a black background.
            ),
        ),
        device_transforms=(to_float, mixup),
        batch_size=128,
    )
    every = '200 steps' if tiny else '1 epoch'
    config.evals = dict(
        test=dict(
            every=every,
            data=dict(source=test, device_transforms=(to_float,), batch_size=500),
        ),
        # How well a linear classifier does that has seen a few images of each class.
        few_shot=dict(
            every=every,
            task=dict(target='trainer.tasks:Features', keep=('label', 'shot')),
            score=dict(target='trainer.scores:LinearProbe', shots=(1, 5, 10)),
            data=dict(
                source=dict(
                    target='trainer.data.few_shot:FewShot',
                    train=train,
                    test=test,
                    num_classes=10,
                    shots=10,
                ),
                device_transforms=(to_float,),
                batch_size=500,
            ),
        ),
    )
    config.checkpoint = dict(every=every, keep_last=1)
    config.log = dict(every='100 steps')


def _finetune(config: ml_collections.ConfigDict, words: set[str]) -> None:
    """Four times as many patches, with the positions in between interpolated."""
    # The default work directory of the run without `finetune`.
    config.init_from = dict(path='runs/vit-tiny' if 'tiny' in words else 'runs/vit-fashion')
    if 'nnx' in words:
        # That run is in Linen, where the blocks have other names.
        config.init_from.rename = ((r'^blocks_(\d+)/', r'blocks/\1/'),)
    patches = (8, 8) if 'tiny' in words else (14, 14)
    config.surgery = (
        dict(target='trainer.weights:Interpolate', pattern='positions', size=patches),
    )
    larger = dict(target='trainer.device_transforms:Resize', size=(56, 56))
    for data in (config.data, *(each.data for each in config.evals.values())):
        data.device_transforms = (*data.device_transforms, larger)
    config.train_for = '100 steps' if 'tiny' in words else '2 epochs'
    config.optimizer.learning_rate.peak_value = 1e-4
