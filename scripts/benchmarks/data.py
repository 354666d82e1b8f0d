"""Pictures per second from files, or from memory, to batches on the device."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.benchmark import Timer

import datasets_lib
from scripts.benchmarks.runs import in_turns, median_ratio
from trainers.base import Encoder
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.data.batches import training_batches
from trainers.engine.encoders.fill import fill_caches
from trainers.engine.encoders.stages import FrozenEncoders
from trainers.engine.run.clock import Clock
from trainers.engine.run.context import DataSets
from trainers.engine.run.signals import StopSignals

IMAGES, SIDE = 500, 512
PHOTOGRAPHS, PHONE = 24, (4000, 3000)  # width, height
READ_AHEAD = 2  # batches, of each worker


class Files(NamedTuple):
    """Pictures in a folder, the option that names it, and what is made of them."""

    folder: str
    option: str = "train_data_dir"
    resolution: int = 32
    batch: int = 64


SOURCES = {
    "jpeg folder": Files("jpg"),
    "png folder": Files("png"),
    "12-megapixel jpeg folder": Files("phone", resolution=512, batch=8),
    "arrow": Files("arrow", "dataset_name"),
    "decoded cache": Files("jpg"),
    "latents cache": Files("jpg"),
}
WORKERS = {"decoded cache": (0,)}  # it never starts any; else 0, 1, 2
# no real autoencoder, as none runs once its latents are cached: one number for 8 x 8 pixels
LATENTS = Encoder(
    reads="image",
    writes=("mean", "logvar"),
    build=lambda: torch.nn.AvgPool2d(8),
    encode=lambda pool, images: {"mean": pool(images), "logvar": -pool(images.abs())},
    cache="memory",
)


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of repetitions in turns for each source and number of workers, and the decoded cache over each."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_pictures(Path(folder))
        sides = {}
        for source in SOURCES:
            for workers in WORKERS.get(source, (0, 1, 2)):
                batches = stack.enter_context(closing(batches_of(source, workers, Path(folder))))
                sides[source, workers] = partial(speed, source, batches, asked.seconds, 1 + READ_AHEAD * workers)
        found = in_turns(sides, asked.pairs)
    return [
        {
            "source": source,
            "workers": workers,
            "images_per_second": statistics.median(rates),
            "decoded_cache_over_it": median_ratio(found["decoded cache", 0], rates),
            "runs": rates,
        }
        for (source, workers), rates in found.items()
    ]


def write_pictures(folder: Path) -> None:
    """The same smooth pictures as JPEG and PNG files, and the JPEG ones as arrow; photographs of a phone's size."""
    import datasets  # slow to import, and the other tables need none of it

    rng = np.random.default_rng(0)
    for kind in ("jpg", "png"):
        (folder / kind).mkdir()
    for number in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        picture = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.save(folder / "jpg" / f"{number:05}.jpg", quality=90)
        picture.save(folder / "png" / f"{number:05}.png")
    (folder / "phone").mkdir()
    for number in range(PHOTOGRAPHS):
        photograph(number).save(folder / "phone" / f"{number:05}.jpg", quality=92)
    files = [{"bytes": path.read_bytes(), "path": None} for path in sorted((folder / "jpg").iterdir())]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": files}, features).save_to_disk(folder / "arrow")


def photograph(number: int) -> Image.Image:
    """One of scikit-learn's two photographs, enlarged, with the grain of a sensor, which is most of the file: 2 MB."""
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    large = Image.fromarray(pictures[number % len(pictures)]).resize(PHONE, Image.Resampling.BICUBIC)
    grain = np.random.default_rng(number).normal(0, 1, (PHONE[1], PHONE[0], 1))
    return Image.fromarray((np.asarray(large) + grain).clip(0, 255).astype(np.uint8))


def batches_of(source: str, workers: int, folder: Path) -> Generator[dict[str, Any]]:
    """Endless flipped training batches of a source, on the device; with latents if these are cached."""
    files = SOURCES[source]
    place: dict[str, Any] = {files.option: f"{folder}/{files.folder}"}
    budget = 512 if source == "decoded cache" else 0  # MiB
    base = BaseConfig(
        resolution=files.resolution, train_batch_size=files.batch, center_crop=True, random_flip=True,
        image_cache_mb=budget, dataloader_num_workers=workers, **place,
    )  # fmt: skip
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    stages = FrozenEncoders({"latents": LATENTS} if source == "latents cache" else {}, accelerator.device)
    dataset: Any = datasets_lib.build(base, "train")
    examples, _ = fill_caches(accelerator, stages, base, DataSets(dataset, None))
    datasets_lib.prepare(examples, show_progress=False)
    clock = Clock(len(examples), files.batch, 1, 1, max_train_steps=10**9)
    batches: Any = training_batches(examples, clock, base, 0, accelerator.device, StopSignals(1800.0))
    with closing(batches):
        yield from map(stages.encode, batches)


def wait_for_workers() -> None:
    """Waits until they have read ahead all they may, so that they take no time from the next side."""
    workers = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
    before = None
    while before != (before := [worker.cpu_times()[:2] for worker in workers]):
        time.sleep(0.3)


def speed(source: str, batches: Iterator[dict[str, Any]], seconds: float, warm_up: int) -> float:
    """Pictures per second, after the batches that were read ahead while another side was timed."""
    for _ in range(warm_up):
        next(batches)
    timer = Timer("next(batches)", globals={"batches": batches}, num_threads=torch.get_num_threads())
    rate = SOURCES[source].batch / timer.blocked_autorange(min_run_time=seconds).mean
    wait_for_workers()
    return rate
