# SPDX-License-Identifier: Apache-2.0
"""Examples per second of the input pipelines, beside others that read the same, in turn.

    python tests/benchmarks/input.py memory     # MNIST in memory: a numpy gather, torch
    python tests/benchmarks/input.py records    # JPEGs in ArrayRecord files: bare Grain, torch
    python tests/benchmarks/input.py tfds       # a dataset prepared by TFDS: bare Grain, torch
    python tests/benchmarks/input.py images     # a folder of photographs: torch with torchvision

torch is compared where it is installed. Machines are noisy: read the ratios.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
BATCH = 64
# A picture is this many digits wide and high: 224 x 224 pixels.
TILES = 8
PICTURES = 2048
THREADS = 8
WORKERS = 2

Batches = Callable[[], Iterator[Any]]


def main() -> None:
    """Runs the comparison that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument('what', choices=list(WHAT))
    parser.add_argument('--pairs', type=int, default=5)
    parser.add_argument('--batches', type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        readers, batches = WHAT[args.what](pathlib.Path(directory))
        if importlib.util.find_spec('torch') is None:
            print("torch is not installed, so its DataLoader is left out: pip install 'torch'")
        compare(readers, args.pairs, args.batches or batches)


def compare(readers: dict[str, Batches], pairs: int, batches: int) -> None:
    """Reads some batches with each in turn; prints the ratio of the first to each other.

    Half as many come before, untimed: what a reader has made ahead while others were measured would
    count in its favour, and the others still make batches ahead while it is read.
    """
    open_readers = {name: make() for name, make in readers.items()}
    for reader in open_readers.values():  # Opens files, starts threads and processes.
        _take(reader, batches)
    rates: dict[str, list[float]] = {name: [] for name in readers}
    costs: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(pairs):
        for name, reader in open_readers.items():
            _take(reader, batches // 2)
            began, before = time.perf_counter(), _cpu_secs()
            _take(reader, batches)
            rates[name].append(batches * BATCH / (time.perf_counter() - began))
            costs[name].append((_cpu_secs() - before) / batches / BATCH)
    ours, *others = rates
    print(f'{ours}: {statistics.median(rates[ours]):,.0f} examples/s')
    for name in rates:
        print(f'{name}: {1000 * statistics.median(costs[name]):.2f} ms of CPU time per example')
    for name in others:
        ratios = [a / b for a, b in zip(rates[ours], rates[name], strict=True)]
        print(
            f'{name}: {statistics.median(rates[name]):,.0f} examples/s; '
            f'the first is {statistics.median(ratios):.2f} times as fast'
        )


def _cpu_secs() -> float:
    """Returns the CPU time so far of this process and of those that it has started."""
    ticks, parents = {}, {}
    for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
        try:
            # The name of a program, the second word, may have spaces.
            words = path.read_text().rpartition(')')[2].split()
        except OSError:  # It has ended.
            continue
        process = int(path.parent.name)
        parents[process], ticks[process] = int(words[1]), int(words[11]) + int(words[12])
    own = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in own} - own:
        own |= more
    return sum(ticks[process] for process in own) / os.sysconf('SC_CLK_TCK')


def _take(reader: Iterator[Any], batches: int) -> None:
    for _ in range(batches):
        next(reader)


def memory(directory: pathlib.Path) -> tuple[dict[str, Batches], int]:
    """MNIST, shuffled."""
    from trainer.data.loader import TrainLoader
    from trainer.data.mnist import MNIST

    source = MNIST('train')
    whole = source.gather(np.arange(len(source)))

    def bare() -> Iterator[Any]:
        order = np.random.default_rng(0).permutation(len(source))
        for start in _starts(len(source)):
            rows = order[start : start + BATCH]
            yield {name: x[rows] for name, x in whole.items()}

    def ours() -> Iterator[Any]:
        loader = TrainLoader(source=source, batch_size=BATCH)
        return _blocks(loader, 16)

    class Items:
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> Any:
            return {name: x[index] for name, x in whole.items()}

    return {'TrainLoader': ours, 'numpy': bare, **_torch(Items(), 0)}, 3200


def records(directory: pathlib.Path) -> tuple[dict[str, Batches], int]:
    """JPEGs of 224 x 224 pixels, decoded."""
    from trainer.data.array_record import ArrayRecord

    write_pictures(directory)
    path = str(directory / '*.array_record')
    return _decoders(ArrayRecord(path, decode=decode_picture), Pictures(directory))


def tfds(directory: pathlib.Path) -> tuple[dict[str, Batches], int]:
    """The same pictures as a dataset of TFDS, which brings its own decoding."""
    import tensorflow_datasets

    from trainer.data.tfds import TFDS

    write_pictures(directory)
    subprocess.run([sys.executable, '-c', _PREPARE, str(directory)], check=True, cwd=ROOT)
    whole = {'split': 'train', 'data_dir': str(directory)}
    return _decoders(
        TFDS('pictures', **whole), tensorflow_datasets.data_source('pictures', **whole)
    )


def images(directory: pathlib.Path) -> tuple[dict[str, Batches], int]:
    """JPEGs of 500 x 375 pixels, with random resized crops of 224 pixels and flips."""
    from trainer.data.grain_loader import GrainLoader
    from trainer.data.images import Decode, ImageFolder
    from trainer.data.transforms import RandomFlip

    write_photographs(directory)
    options: dict[str, Any] = {
        'source': ImageFolder(directory),
        'transforms': (Decode(size=224, crop='random'), RandomFlip()),
        'batch_size': BATCH,
    }

    def ours(**more: int) -> Batches:
        return lambda: _blocks(GrainLoader(**options, **more), 1)

    readers = {f'GrainLoader, {workers} workers': ours(workers=workers) for workers in (1, 2)}
    readers['GrainLoader, threads'] = ours(threads=THREADS)
    if importlib.util.find_spec('torchvision') is not None:
        from torchvision import datasets, transforms

        steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
        items = datasets.ImageFolder(
            str(directory), transforms.Compose([*steps, transforms.PILToTensor()])
        )
        for workers in (1, 2):
            readers.update(_torch(items, workers))
    return readers, 16


def _decoders(source: Any, items: Any) -> tuple[dict[str, Batches], int]:
    from trainer.data.grain_loader import GrainLoader

    def ours(**options: Any) -> Batches:
        return lambda: _blocks(GrainLoader(source=source, batch_size=BATCH, **options), 1)

    return {
        'GrainLoader, threads': ours(threads=THREADS),
        f'GrainLoader, {WORKERS} workers': ours(workers=WORKERS),
        'Grain DataLoader, threads': lambda: _grain(items, 0),
        f'Grain DataLoader, {WORKERS} workers': lambda: _grain(items, WORKERS),
        'Grain MapDataset, threads': lambda: _grain_dataset(items),
        **_torch(items, WORKERS),
    }, 24


def _grain(items: Any, workers: int) -> Iterator[Any]:
    import grain.python as grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    loader = grain.DataLoader(
        data_source=items,
        sampler=grain.IndexSampler(len(items), grain.NoSharding(), shuffle=True, seed=0),
        operations=[grain.Batch(BATCH, drop_remainder=True)],
        worker_count=workers,
        read_options=grain.ReadOptions(num_threads=THREADS),
    )
    return iter(loader)


def _grain_dataset(items: Any) -> Iterator[Any]:
    """Yields what Grain reads quickest: whole batches are the tasks of its threads."""
    import grain.python as grain

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=THREADS)
    dataset = grain.MapDataset.source(items).shuffle(0).repeat().batch(BATCH)
    return iter(dataset.to_iter_dataset(options))


def _torch(items: Any, workers: int) -> dict[str, Batches]:
    if importlib.util.find_spec('torch') is None:
        return {}
    from torch.utils.data import DataLoader

    def batches() -> Iterator[Any]:
        loader = DataLoader(
            items, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=workers,
            persistent_workers=workers > 0,
        )  # fmt: skip
        while True:
            yield from loader

    return {f'torch DataLoader, {workers} workers': batches}


def _blocks(loader: Any, steps: int) -> Iterator[Any]:
    """Yields the batches of a loader, read so many at once."""
    start = 0
    while True:
        block = loader.block(start, steps)
        for step in range(steps):
            yield {name: x[step] for name, x in block.arrays.items()}
        start += steps


def _starts(examples: int) -> Iterator[int]:
    while True:
        yield from range(0, examples - BATCH, BATCH)


def write_pictures(directory: pathlib.Path) -> None:
    """Writes JPEGs of real digits, side by side, into four ArrayRecord files."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image

    from trainer.data.mnist import MNIST

    source, rng = MNIST('train'), np.random.default_rng(0)
    for part in range(4):
        writer = ArrayRecordWriter(str(directory / f'{part}.array_record'), 'group_size:1')
        for _ in range(PICTURES // 4):
            digits = source.gather(rng.integers(len(source), size=TILES**2))['image'][..., 0]
            tiles = digits.reshape(TILES, TILES, 28, 28).transpose(0, 2, 1, 3)
            pixels = np.repeat(tiles.reshape(TILES * 28, TILES * 28, 1), 3, axis=2)
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, 'JPEG')
            writer.write(out.getvalue())
        writer.close()


def write_photographs(directory: pathlib.Path) -> None:
    """Writes JPEGs of the size of a photograph in ImageNet, about 60 kB each."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(PICTURES // 4):
        file = directory / f'class{i % 8}' / f'{i}.jpg'
        file.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3)).astype(np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, quality=88)


class Pictures:
    """What is in such files, as the other libraries read it: one example at a time."""

    def __init__(self, directory: pathlib.Path):
        """Opens the files."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._records = ArrayRecordDataSource(sorted(map(str, directory.glob('*.array_record'))))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return decode_picture(self._records[index])


def decode_picture(record: bytes) -> dict[str, np.ndarray]:
    """Returns the pixels, uint8 (224, 224, 3)."""
    from PIL import Image

    return {'image': np.asarray(Image.open(io.BytesIO(record)))}


_PREPARE = """
import io
import pathlib
import sys

import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

DIRECTORY = pathlib.Path(sys.argv[1])


class Pictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        image = tfds.features.Image(shape=(224, 224, 3), encoding_format='jpeg')
        features = tfds.features.FeaturesDict({'image': image})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        records = ArrayRecordDataSource(sorted(map(str, DIRECTORY.glob('*.array_record'))))
        for i in range(len(records)):
            yield i, {'image': io.BytesIO(records[i])}


Pictures(data_dir=str(DIRECTORY), file_format='array_record').download_and_prepare()
"""

WHAT: dict[str, Callable[[pathlib.Path], tuple[dict[str, Batches], int]]] = {
    'memory': memory,
    'records': records,
    'tfds': tfds,
    'images': images,
}


if __name__ == '__main__':
    main()
