"""Console output: a summary at the start, the progress bar's numbers, and the result's place at the end."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from datasets_lib.example import ImageData
from trainers.base import Trainer
from trainers.engine.data.batches import skipped
from trainers.engine.distributed.backends import engine_of
from trainers.engine.distributed.sharding import shape_of
from trainers.engine.optim.optimizer import warmup_steps
from trainers.engine.run.context import RunContext


def start_block(ctx: RunContext, trainer: Trainer, networks: dict[str, nn.Module], train_set: ImageData) -> str:
    """Summarises the run at its start."""
    accelerator, folders, run, clock = ctx.accelerator, ctx.folders, ctx.run, ctx.clock
    base, config = run.base, run.config
    rows = {"task": f"{run.task}, data {base.data_name}"}
    for name, network in networks.items():
        trained = sum(shape_of(p).numel() for p in network.parameters() if p.requires_grad)
        frozen = sum(shape_of(p).numel() for p in network.parameters()) - trained
        rows[f"network {name}"] = f"{trained:,} parameters trained, {frozen:,} frozen"
    rows["examples"] = "a stream" if clock.num_examples is None else f"{clock.num_examples:,}"
    epochs = "".join(f" ({count:.1f} epochs)" for count in clock.epochs(clock.total_steps).values())
    resumed = f", resumed at {clock.origin_step:,}" if clock.origin_step else ""
    rows["steps"] = f"{clock.total_steps:,}{epochs}{resumed}"
    parts = f"{clock.micro_batch_size} x {clock.accumulation_steps} micro-batches x {clock.num_processes} processes"
    rows["global batch"] = f"{clock.global_batch_size} = {parts}"
    warmup = warmup_steps(config, clock.total_steps)
    rows["learning rate"] = f"{config.learning_rate} {config.lr_scheduler}, {warmup:.0f} warm-up"
    rows["precision"] = "float32" if base.mixed_precision == "no" else str(base.mixed_precision)
    gpu = f" ({torch.cuda.get_device_name(ctx.device)})" if ctx.device.type == "cuda" else ""
    rows["devices"] = f"{accelerator.num_processes} x {ctx.device.type}{gpu}"
    rows["engine"] = engine_of(accelerator)
    rows["output"] = str(Path(base.output_dir))
    if folders.several:
        rows["output"] = f"{folders.places[0]}: checkpoints, logs, pictures, pipeline"
        rows["output elsewhere"] = f"{', '.join(folders.places[1:])}: checkpoints"
    notes = [*train_set.notes, *trainer.notes(train_set)]
    if base.mixed_precision == "no" and has_bf16(ctx.device):
        notes.append("this device computes bf16 in hardware: base.mixed_precision=bf16 would use it")
    if clock.bucket_counts:
        count = sum(clock.bucket_counts)
        again = f"an epoch draws {clock.epoch_slots - count:,} again, to fill the last step of each size"
        notes.append(f"buckets: {count:,} examples in {len(clock.bucket_counts)} sizes; {again}")
    if clock.origin_step >= clock.total_steps:
        notes.append("the run is finished already; its pipeline is written again")
    if warmup >= clock.total_steps:
        notes.append("the warm-up is as long as the run; the learning rate never reaches its value")
    lines = [f"  {name:16} {value}" for name, value in rows.items()]
    return "\n".join([*lines, *(f"  NOTE: {note}" for note in notes)])


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU or CPU computes bfloat16 in hardware; False for other devices, where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def end_block(ctx: RunContext, trainer: Trainer, train_set: ImageData, lost_writes: int) -> str:
    """Says where the pipeline is, how to load and sample it, and what could not be read or written. Collective."""
    folders, output_dir = ctx.folders, ctx.output_dir
    location = folders.paths[0] if folders.several else output_dir
    usage = "\n\n".join([trainer.usage_of(location), *trainer.usage_notes(Path(location))])
    if bad := train_set.bad_count:
        usage += f"\n\nNOTE: {bad} of {len(train_set)} training images could not be read and were replaced"
    if any(counts := skipped(train_set).values()):
        shards, images = counts
        usage += f"\n\nNOTE: skipped as unreadable: {images} images, and the remainder of {shards} shards"
    if lost_writes:
        usage += f"\n\nNOTE: {lost_writes} pictures or entries of trackers could not be written"
    place = folders.places[0] if folders.several else output_dir
    return f"The pipeline is in {place}. To load and sample it:\n\n{textwrap.indent(usage, '  ')}\n"


def show_metrics(bar: tqdm, metrics: dict[str, float]) -> None:
    if metrics["skipped"] > 0:
        bar.write(f"WARNING: {metrics['skipped']:.0%} of the last steps were skipped: a gradient was not finite")
    speed = f"{metrics['examples_per_second']:.0f} examples/s"
    bar.set_postfix_str(f"loss {metrics['loss']:.4f}, lr {metrics['lr']:.2e}, {speed}")
