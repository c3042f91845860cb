# SPDX-License-Identifier: Apache-2.0
"""A variational autoencoder on MNIST in black and white.

    python -m trainer.main --config=configs/vae.py
    python -m trainer.main --config=configs/vae.py:nnx
    python -m trainer.main --config=configs/vae.py:tiny

Each pixel is drawn once, with its grey value as the probability of white. Every epoch writes
reconstructions and samples to `summaries/` in the work directory. `:nnx` is the same model in NNX;
`:tiny` takes half a minute. docs/examples/vae.md is the page about this config.

Expected after 10 epochs: a loss of 102.4 nats per test image (published: 104); 38 s on two CPU
cores.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """Returns the config.

    Args:
        arg: 'nnx' for the model in NNX, 'tiny' for a smaller one and fewer images, or ''.
    """
    module = {'': 'vae', 'nnx': 'vae_nnx', 'tiny': 'vae'}[arg]
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.train_for = '10 epochs'

    config.model = dict(target=f'trainer.models.{module}:VAE', latents=20, hidden=500)
    config.task = dict(target='trainer.tasks:ELBO')
    config.optimizer = dict(target='optax:adam', learning_rate=1e-3)

    # Once, as in the dataset of the published figure. With once=False, each epoch draws again.
    binarize = dict(target='trainer.data.transforms:Binarize', once=True)
    config.data = dict(
        source=dict(target='trainer.data.mnist:MNIST', split='train'),
        transforms=(binarize,),
        batch_size=128,
    )
    config.evals = dict(
        test=dict(
            every='1 epoch',
            data=dict(
                source=dict(target='trainer.data.mnist:MNIST', split='test'),
                transforms=(binarize,),
                batch_size=500,
            ),
        ),
    )

    config.checkpoint = dict(every='1 epoch', keep_last=2)
    config.log = dict(every='100 steps')
    if arg == 'tiny':
        config.model.update(latents=8, hidden=64)
        config.data.source.limit = 6400
        config.evals.test.data.source.limit = 1000
    return config
