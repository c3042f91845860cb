# SPDX-License-Identifier: Apache-2.0
"""Does a molecule cross the blood-brain barrier? A network of messages between its atoms.

    python -m trainer.main --config=configs/molecules.py
    python -m trainer.main --config=configs/molecules.py:scaffold
    python -m trainer.main --config=configs/molecules.py:solubility
    python -m trainer.main --config=configs/molecules.py:tiny

The network learns two properties at once: whether a molecule crosses the barrier (`bbb`), and how
its concentrations in brain and blood compare (`logbb`), which is known of one molecule in seven.
`:scaffold` evaluates on molecules with rare ring systems, which training does not have.
`:solubility` predicts the solubility in water; `:tiny` does so with a smaller network. All data
comes with the project. docs/examples/molecules.md is the page about this config.

Expected after 20 epochs: 0.959 AUC on 781 test molecules (logistic regression: 0.943); 3 minutes
on two busy CPU cores. `:scaffold`: 0.790 AUC, after 6 epochs (logistic regression: 0.711); 71 s on
two busy CPU cores. `:solubility`: 0.379 squared error (least squares: 1.02). `:tiny`: 0.357 squared
error, after 8 epochs; 20 s of processor time.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """Returns the config.

    Args:
        arg: 'scaffold' for the split by ring systems, 'solubility' for the solubility in water,
            'tiny' for a smaller network of the latter, or ''.

    Raises:
        ValueError: for another argument.
    """
    if arg not in ('', 'scaffold', 'solubility', 'tiny'):
        raise ValueError(
            f"molecules: expected 'scaffold', 'solubility', 'tiny' or nothing after :, got {arg!r}"
        )
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.train_for = '20 epochs'
    config.vars = dict(path=ml_collections.config_dict.placeholder(str))  # None: our molecules.
    config.model = dict(
        target='trainer.models.gnn:GraphNetwork', width=64, rounds=4, dropout_rate=0.2
    )
    config.optimizer = dict(
        target='optax:adamw',
        learning_rate=dict(
            target='optax:warmup_cosine_decay_schedule',
            init_value=0.0,
            peak_value=1e-3,
            warmup_steps='5%',
            decay_steps='100%',
        ),
        weight_decay=1e-5,
        clip_norm=1.0,
    )
    config.ema = dict(decay=0.99)
    if arg in ('solubility', 'tiny'):
        _predict_solubility(config)
    else:
        _predict_barrier(config, arg or 'random')
    if arg == 'scaffold':
        # Later, the AUC of `dev` falls: the network learns what only the frequent scaffolds have.
        config.train_for = '6 epochs'
    config.checkpoint = dict(every='5 epochs', keep_last=1)
    config.log = dict(every='50 steps')
    if arg == 'tiny':
        config.train_for = '8 epochs'
        config.model.update(width=32, rounds=3)
        config.optimizer.learning_rate.peak_value = 4e-3
        config.ema.decay = 0.9
    return config


def _predict_barrier(config: ml_collections.ConfigDict, kind: str) -> None:
    """Sets both tasks, and the three splits of a kind."""
    config.model.update(
        node_sizes=dict(ref='trainer.data.smiles:ATOM_SIZES'),
        edge_sizes=dict(ref='trainer.data.smiles:BOND_SIZES'),
        outputs=dict(bbb=(1,), logbb=()),
    )
    decision = dict(
        target='trainer.tasks:Classification',
        inputs='graph',
        label='bbb',
        loss='sigmoid',
        ignore_label=-1,
    )
    number = dict(
        target='trainer.tasks:Regression', inputs='graph', targets='logbb', ignore_nan=True
    )
    config.task = dict(
        target='trainer.tasks:MultiTask',
        parts=dict(bbb=decision, logbb=number),
        weights=dict(logbb=0.3),
        keep=('smiles',),
    )

    def source(split: str) -> dict:
        return dict(
            target='trainer.data.graphs:GraphSource',
            items=dict(
                target='trainer.data.molecules:Molecules',
                split=split,
                kind=kind,
                path=config.vars.get_ref('path'),
            ),
        )

    # 64 graphs with that of padding, a number that divides evenly over devices.
    config.data = dict(source=source('train'), batch_size=63)
    # AUC, average precision, and the molecules that the network is most wrong about.
    report = dict(
        target='trainer.scores:BinaryReport',
        label='bbb',
        field='smiles',
        probability='bbb_probabilities',
        fields=('bbb', 'smiles'),
    )
    # Make your choices by `dev`. `test` is evaluated once, at the end of the run.
    config.evals = dict(
        dev=dict(every='1 epoch', ema=True, score=report, data=dict(source=source('dev'))),
        test=dict(every='never', ema=True, score=report, data=dict(source=source('test'))),
    )


def _predict_solubility(config: ml_collections.ConfigDict) -> None:
    """Sets the regression, and both splits."""
    config.model.update(
        node_sizes=dict(ref='trainer.data.sdf:ATOM_SIZES'),
        edge_sizes=dict(ref='trainer.data.sdf:BOND_SIZES'),
        # Sums over states that are dropped in training are larger in evaluations, which moves all
        # predictions of a number.
        dropout_rate=0.0,
    )
    config.task = dict(target='trainer.tasks:Regression', inputs='graph', targets='solubility')

    def source(split: str) -> dict:
        return dict(
            target='trainer.data.graphs:GraphSource',
            items=dict(
                target='trainer.data.solubility:Solubility',
                split=split,
                path=config.vars.get_ref('path'),
            ),
            # One program; the molecules are small.
            num_shapes=1,
        )

    config.data = dict(source=source('train'), batch_size=31)
    config.evals = dict(test=dict(every='never', ema=True, data=dict(source=source('test'))))
