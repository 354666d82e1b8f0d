"""Exports the finished pipeline: float32 CPU copies of the networks, with averaged weights if there are any."""

from __future__ import annotations

import secrets
import shutil
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from datasets_lib.errors import FileError, InputError
from datasets_lib.foreign import shown
from trainers.base import MeasuresData, Trainer
from trainers.engine.checkpoint.snapshot import TrainState, first_not_finite, full_tensor
from trainers.engine.distributed.collectives import run_on_main
from trainers.engine.distributed.sharding import is_sharded, weight_of
from trainers.engine.export.variant import write_variant
from trainers.engine.optim.ema import EMA
from trainers.engine.optim.networks import filled
from trainers.engine.run.context import RunContext
from trainers.engine.run.run_folder import publish_pipeline
from trainers.engine.run.signals import Abandoned
from trainers.engine.tracking.tracker import Tracker
from trainers.engine.validation.validation import Validation
from trainers.pretrained import hub_name
from trainers.weight_files import forget_places, make_readable


def export_pipeline(
    ctx: RunContext, trainer: Trainer, state: TrainState, tracker: Tracker, validation: Validation
) -> list[str]:
    """Writes the finished pipeline, unless a stop interrupts it; returns the names of its entries. Collective."""
    try:
        with tracker.phase("export", ctx.stop.steps_done):
            if isinstance(trainer, MeasuresData):
                trainer.statistics = validation.training_statistics()
            return _export(ctx, trainer, state, tracker)
    except Abandoned:
        ctx.accelerator.print(f"The pipeline of step {ctx.stop.steps_done} is not written: the run is asked to stop")
        return []


def _export(ctx: RunContext, trainer: Trainer, state: TrainState, tracker: Tracker) -> list[str]:
    live, output_dir, steps_done = trainer.unwrapped, ctx.output_dir, ctx.stop.steps_done
    wanted = ctx.accelerator.is_main_process
    weights = {name: _averaged_weights(name, network, state.ema, wanted) for name, network in live.items()}
    staging = output_dir / f".tmp-pipeline-{secrets.token_hex(4)}"

    def write() -> list[str]:
        broken = first_not_finite(
            {f"{name}.{key}": value for name, own in weights.items() for key, value in own.items()}
        )
        if broken is not None:  # such as of a checkpoint that somebody sent
            raise InputError(
                f"the pipeline is not written: {shown(broken)} is not finite; continue from an earlier checkpoint"
            )
        trainer.unwrapped = {name: filled(plain, weights[name]).eval() for name, plain in state.meta_networks.items()}
        for network in trainer.unwrapped.values():
            _forget_place(network)
        try:
            trainer.save_pipeline(staging)
            if ctx.run.base.export_variant is not None:
                for warning in write_variant(staging, ctx.run.base.export_variant):
                    print(f"WARNING: base.export_variant: {warning}", flush=True)
            forget_places(staging)
            make_readable(staging)
            names = publish_pipeline(staging, output_dir)
            tracker.log_pipeline(names, {"step": steps_done} | ctx.clock.epochs(steps_done))
        except (OSError, SafetensorError) as error:
            raise FileError(f"the pipeline could not be written to {output_dir}: {error}") from None
        finally:
            trainer.unwrapped = live
            shutil.rmtree(staging, ignore_errors=True)
        return names

    return run_on_main(ctx.accelerator, write)


def _forget_place(network: Any) -> None:
    """Clears the place that a network of diffusers was read from, which its config would name, unless it is a hub's."""
    config = network.config if hasattr(network, "register_to_config") else {}
    if config.get("_name_or_path") is not None and hub_name(config["_name_or_path"]) is None:
        network.register_to_config(_name_or_path=None)


def _averaged_weights(name: str, network: nn.Module, ema: EMA | None, wanted: bool) -> dict[str, Tensor]:
    """Collects weights and buffers: trained or averaged ones in float32, frozen ones in their own type. Collective."""
    frozen = {key: p for key, p in network.named_parameters() if not p.requires_grad}
    own = {key: weight_of(p) for key, p in network.named_parameters()} | dict(network.named_buffers())
    own |= ema.averages_of(name) if ema is not None else {}
    values = {key: full_tensor(tensor, wanted) for key, tensor in own.items() if key not in frozen}
    values = {key: value.float() if value.is_floating_point() else value for key, value in values.items()}
    # a base model is large: frozen weights that are on the CPU already are not copied
    return values | {key: _on_host(p, wanted) for key, p in frozen.items()}


def _on_host(frozen: Tensor, wanted: bool) -> Tensor:
    in_place = frozen.device.type == "cpu" and not is_sharded(frozen)
    return frozen.detach().contiguous() if in_place else full_tensor(weight_of(frozen), wanted)
