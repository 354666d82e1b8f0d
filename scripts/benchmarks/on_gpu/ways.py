"""Whether each way to run computes what the plain one does: memory format, averages on the host, copies, compiled."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from scripts.benchmarks.on_gpu.section import Asked, Case, Skip
from scripts.benchmarks.on_gpu.tiny_runs import OTHER_KERNELS, TinyRuns, bounded, difference, losses
from trainers.engine.checkpoint.manifest import list_checkpoints
from trainers.engine.data import prefetch

EIGHT_BIT = 0.05


def cases(asked: Asked, runs: TinyRuns) -> dict[str, Case]:
    alike: Callable[..., Case] = partial(partial, like_plain, runs)
    found: dict[str, Case] = {
        "channels_last": alike("ddpm", {"base.channels_last": True}, {"base.channels_last": False}),
        "offload_ema": alike("text_to_image", {"text_to_image.offload_ema": True}, {}, 1e-6),
        "workers, pinned": alike("ddpm", {"base.dataloader_num_workers": 1, "base.image_cache_mb": 0}, {}, 0.0),
        "copies on a stream": partial(copy_stream, runs),
    }
    if not asked.tiny:
        blocks = {"base.compile": True, "base.compile_repeated_blocks": True}
        found["adamw_8bit"] = partial(eight_bit, runs)
        found["compile_repeated_blocks"] = alike("text_to_image", blocks, {})
        found["compile"] = alike("ddpm", {"base.compile": True}, {})
    return found


def like_plain(
    runs: TinyRuns, task: str, options: dict[str, Any], others: dict[str, Any], bound: float = OTHER_KERNELS
) -> dict[str, Any]:
    """The losses with options beside those without; with averages on the host, the averages too."""
    fixed = runs.without_dropout(task) | ({"base.deterministic": True} if bound == 0.0 else {})
    name = next(iter(options)).replace(".", "-")
    plain, changed = (runs.train(task, f"{name}-{n}", **fixed, **o) for n, o in enumerate((others, options)))
    found = difference(losses(changed), losses(plain))
    if f"{task}.offload_ema" in options:
        found = max(found, averages_difference(changed, plain))
    return bounded(found, bound)


def averages_difference(folder: Path, other: Path) -> float:
    """The largest difference of the averaged weights in two runs' last checkpoints."""
    from safetensors.torch import load_file

    sides = []
    for each in (folder, other):
        [(_, checkpoint), *_] = list_checkpoints(each)
        files = sorted(path for path in checkpoint.rglob("*.safetensors") if "ema" in str(path.relative_to(checkpoint)))
        sides.append({f"{path.name}/{key}": tensor for path in files for key, tensor in load_file(path).items()})
    if not sides[0] or sides[0].keys() != sides[1].keys():
        raise ValueError("the checkpoints hold no averages, or different ones")
    return max(float((sides[0][key] - sides[1][key]).abs().max()) for key in sides[0])


def copy_stream(runs: TinyRuns) -> dict[str, Any]:
    """Copies on the stream beside copies that the step waits for."""
    options = {"base.deterministic": True}
    ahead = runs.losses("ddpm", "ahead", **options)

    def waiting(batches: Any, stream: prefetch.CopyStream) -> Any:
        for batch in batches:
            moved = stream.finish({k: v.to(stream.device) if isinstance(v, Tensor) else v for k, v in batch.items()})
            torch.cuda.synchronize()
            yield moved

    with patch.object(prefetch, "copied_ahead", waiting):
        return bounded(difference(ahead, runs.losses("ddpm", "waiting", **options)), 0.0)


def eight_bit(runs: TinyRuns) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skip("bitsandbytes is not installed")
    return like_plain(runs, "ddpm", {"ddpm.optimizer": "adamw_8bit"}, {}, EIGHT_BIT)
