# SPDX-License-Identifier: Apache-2.0
"""The names that other frameworks use for config keys, and the keys that they correspond to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Other names of dtypes -> the names that a section accepts.
VALUES = {
    'bf16': 'bfloat16', 'fp16': 'float16', 'half': 'float16', 'f16': 'float16',
    'bf16-mixed': 'bfloat16', '16-mixed': 'float16', 'fp32': 'float32', 'f32': 'float32',
    'float': 'float32', 'single': 'float32', 'full': 'float32',
}  # fmt: skip

# The same for arguments of targets, which accept any dtype.
DTYPES = {**VALUES, 'fp8': 'float8_e4m3fn', 'fp64': 'float64', 'f64': 'float64'}

_LENGTH = '--config.train_for=10epochs, or 2000steps'
_SCHEDULE = (
    'A schedule is an object in place of the learning rate: --config.optimizer.learning_rate='
    '\'{"target": "optax:warmup_cosine_decay_schedule", "init_value": 0, "peak_value": 0.1, '
    '"warmup_steps": "5%", "decay_steps": "100%"}\''
)
_DECAY = (
    'Weight decay is an argument of the optimizer: --config.optimizer.target=optax:adamw has it'
)
_LOADER = (
    'The number of reader processes is an argument of the loader: --config.data.loader='
    '\'{"target": "trainer.data.grain_loader:GrainLoader", "workers": 4}\''
)
_PRECISION = '--config.precision.compute=bfloat16 (and precision.params, precision.output)'

_DEVICE = (
    'JAX uses the accelerators that it finds; set the environment variable JAX_PLATFORMS=cpu to '
    'use the CPU'
)
_TRACKER = (
    'Metrics are written to metrics.jsonl and TensorBoard files in the work directory; for another '
    'tracker, add a hook: --config.hooks.NAME=\'{"ref": "package.module:function"}\''
)

# Each line: names that other frameworks use, then the leads to try, in this order. A lead is a key
# path, which counts only if the config has or may set it, or else a flag or a sentence. '*' in a
# path is the first evaluation.
_TABLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ('lr learning_rate lrate eta base_lr max_lr initial_lr peak_lr', ('optimizer.learning_rate',)),
    (
        'epochs num_epochs n_epochs nb_epoch max_epochs num_train_epochs total_epochs',
        (_LENGTH, 'log.every'),
    ),
    (
        'steps max_steps num_steps n_steps total_steps train_steps num_train_steps training_steps '
        'num_training_steps iterations max_iters num_iterations max_iterations',
        (_LENGTH, 'log.every'),
    ),
    ('interval freq frequency period', ('log.every',)),
    ('wd weight_decay l2 l2_reg decay', ('optimizer.weight_decay', _DECAY)),
    ('momentum', ('optimizer.momentum',)),
    ('betas', ('optimizer.b1', '--config.optimizer.b1 and b2, of optimizers like optax:adam')),
    ('b1 beta1 beta_1 adam_beta1', ('optimizer.b1',)),
    ('b2 beta2 beta_2 adam_beta2', ('optimizer.b2',)),
    ('eps epsilon adam_epsilon', ('optimizer.eps',)),
    ('opt optim optimiser', ('optimizer.target',)),
    (
        'batch bs batch_size batchsize train_batch_size global_batch_size '
        'per_device_train_batch_size micro_batch_size',
        ('data.batch_size',),
    ),
    (
        'eval_batch_size val_batch_size test_batch_size per_device_eval_batch_size',
        ('evals.*.data.batch_size', '--config.evals.NAME.data.batch_size=512'),
    ),
    (
        'warmup warmup_steps num_warmup_steps warmup_epochs warmup_ratio lr_schedule lr_scheduler '
        'lr_scheduler_type schedule scheduler lr_decay',
        (_SCHEDULE,),
    ),
    (
        'ckpt checkpoints checkpointing save_every save_steps save_interval save_freq ckpt_every '
        'checkpoint_every checkpoint_interval checkpoint_every_steps save_strategy',
        ('checkpoint.every',),
    ),
    ('save_total_limit max_to_keep max_checkpoints save_top_k keep', ('checkpoint.keep_last',)),
    (
        'eval_every eval_steps eval_interval eval_freq val_every val_check_interval '
        'validation_steps eval_strategy evaluation_strategy check_val_every_n_epoch',
        ('evals.*.every', '--config.evals.NAME.every=1epochs'),
    ),
    (
        'clip grad_clip clip_grad gradient_clip grad_clip_norm clip_grad_norm max_grad_norm '
        'max_norm clipnorm global_clipnorm gradient_clip_val gradient_clip_norm',
        ('optimizer.clip_norm',),
    ),
    (
        'gradient_accumulation_steps grad_accumulation_steps gradient_accumulation grad_accum '
        'grad_accum_steps accum_steps accumulation_steps accumulate_grad_batches '
        'accumulate_steps every_k_schedule',
        ('accumulate',),
    ),
    (
        'bf16 fp16 fp32 amp half dtype param_dtype compute_dtype mixed_precision use_bf16 use_fp16 '
        'half_precision policy jmp torch_dtype',
        (_PRECISION,),
    ),
    ('loss_scale loss_scaling dynamic_loss_scale', ('precision.loss_scale',)),
    ('log_every logging_steps log_steps log_interval log_freq print_every log_every_n_steps '
     'log_every_steps report_every', ('log.every',)),
    ('seed random_seed seed_everything manual_seed rng_seed rng prng_seed', ('seed',)),
    ('mode run_mode', ('--mode=train (or eval, plan, ...), a flag and no key of the config',)),
    (
        'num_workers n_workers dataloader_num_workers loader_workers num_proc',
        ('data.loader.workers', _LOADER),
    ),
    (
        'pretrained pretrained_path ckpt_path load_from restore_from init_checkpoint '
        'init_from_checkpoint model_name_or_path weights',
        ('init_from.path',),
    ),
    (
        'resume resume_from resume_from_checkpoint auto_resume',
        ('The same command resumes; --config.init_from.path=DIRECTORY loads weights only',),
    ),
    (
        'restart overwrite force start_over from_scratch no_resume',
        ('To start over, delete the work directory, or give another one: --workdir=DIRECTORY',),
    ),
    (
        'workdir work_dir output_dir out_dir logdir log_dir save_dir checkpoint_dir ckpt_dir '
        'default_root_dir exp_dir run_dir',
        ('--workdir=DIRECTORY',),
    ),
    ('ema_decay ema_rate polyak', ('ema.decay',)),
    ('patience early_stopping_patience', ('early_stopping.patience',)),
    ('monitor metric_for_best_model', ('checkpoint.best.metric',)),
    ('dataset train_dataset train_data train_set', ('data.source',)),
    ('val_dataset eval_dataset test_dataset valid validation val', ('evals',)),
    ('loss loss_fn criterion objective', ('task',)),
    ('callbacks callback', ('hooks',)),
    ('arch network net architecture backbone', ('model.target',)),
    ('_target_ class_path class_name cls', ('model.target', 'optimizer.target')),
    ('gpus num_gpus devices num_devices n_gpu tpus tpu_cores mesh_shape dp tp fsdp', ('mesh',)),
    ('device accelerator use_gpu cuda no_cuda use_cpu', (_DEVICE,)),
    ('wandb report_to tensorboard mlflow', (_TRACKER,)),
    ('run_name experiment_name exp_name', ('--workdir=DIRECTORY',)),
)  # fmt: skip
# Names for the class of an object. They are not in the table: elsewhere they may mean anything.
_CLASSES = ('name', 'type')

_LEADS = {word: find_leads for words, find_leads in _TABLE for word in words.split()}


def hint(
    word: str, config: Mapping[str, Any], exists: Callable[[Mapping[str, Any], str], bool]
) -> str | None:
    """Returns what to use in place of another framework's name, None if it is not such a name.

    Args:
        word: the last key of a path.
        config: the plain config.
        exists: whether the config contains a path, or may set it.
    """
    for lead in find_leads(word):
        if not _is_path(lead):
            return f'{lead}.' if not lead.startswith('--') else f'Write {lead}.'
        path = _fill_in_eval(lead, config)
        # A path that this config cannot set would be a wrong suggestion: the next lead follows.
        if path is not None and exists(config, path):
            return f'Did you mean config.{path}?'
    return None


def find_synonym(word: str, names: Sequence[str]) -> str | None:
    """Returns the name that has the same meaning as another framework's name, or None.

    Args:
        word: the name that another framework uses.
        names: the valid names at that place.
    """
    if word in _CLASSES and 'target' in names:
        return 'target'
    ours = [lead.rpartition('.')[2] for lead in find_leads(word) if _is_path(lead)]
    # A user's own model may use a name of the table, too: of its `num_steps`, `steps` is a synonym.
    same = [name for name in names if find_leads(word) and find_leads(name) == find_leads(word)]
    return next((name for name in (*ours, *same) if name in names), None)


def find_leads(word: str) -> tuple[str, ...]:
    """Returns the paths, flags and sentences that another framework's name leads to."""
    return _LEADS.get(word.lower().replace('-', '_'), ())


def _is_path(lead: str) -> bool:
    return not lead.startswith('--') and ' ' not in lead


def _fill_in_eval(path: str, config: Mapping[str, Any]) -> str | None:
    """Returns a path with '*' replaced by the first evaluation, None if there is none."""
    if '*' not in path:
        return path
    evals = config.get('evals')
    return path.replace('*', next(iter(evals))) if isinstance(evals, Mapping) and evals else None
