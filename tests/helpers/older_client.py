"""Opens what diffloop wrote as its users' programs do, in whatever versions are installed: older_client.py JOBS OUT

JOBS is a JSON object of {name: arguments of opened()}: the folder of a pipeline or network, a LoRA's file, a single file whose
pipeline has the configs, a variant, a card's lines. OUT.safetensors gets what was drawn and which changes of weights
were loaded, OUT.json the errors and the versions. Nothing of diffloop is imported.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

STEPS = {"num_inference_steps": 2, "output_type": "np"}


@torch.no_grad()
def opened(folder, lora=None, file=None, variant=None, lines=""):
    folder = Path(folder)
    generator = torch.Generator().manual_seed(0)
    if not (folder / "model_index.json").is_file():
        return applied(folder, generator)
    own = next(folder.glob("*.py"), None)  # a pipeline that brings its class
    if file is not None:
        kind = getattr(diffusers, json.loads((folder / "model_index.json").read_text())["_class_name"])
        pipeline = kind.from_single_file(file, config=str(folder), local_files_only=True)
    else:
        settings = {"trust_remote_code": True} if own else {}
        settings |= {"variant": variant, "torch_dtype": torch.float32} if variant else {}
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **settings)
    exec(lines, {"pipeline": pipeline})  # of the card
    pipeline.set_progress_bar_config(disable=True)
    found = {}
    if lora is not None:
        pipeline.load_lora_weights(str(Path(lora).parent), weight_name=Path(lora).name, adapter_name="read")
        found |= changes(pipeline)
    if hasattr(pipeline, "text_encoder"):
        texts = {"padding": "max_length", "truncation": True, "max_length": pipeline.tokenizer.model_max_length}
        tokens = pipeline.tokenizer(["a photo of a dog"], return_tensors="pt", **texts).input_ids
        found |= {"tokens": tokens, "embedding": pipeline.text_encoder(tokens)[0]}
        size = {"height": 32, "width": 32, "guidance_scale": 3.0}
        drawn = pipeline("a photo of a cat", generator=generator, **size, **STEPS).images
    elif own:
        drawn = pipeline([1, 2], generator=generator, **STEPS).images
    else:
        drawn = pipeline(batch_size=2, generator=generator, **STEPS).images
    return found | {"picture": torch.from_numpy(np.asarray(drawn))}


def applied(folder, generator):
    """What a network alone makes of noise."""
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    network = getattr(diffusers, kind).from_pretrained(folder)
    pixels = torch.randn(2, network.config.in_channels, 16, 16, generator=generator)
    if kind == "AutoencoderKL":
        return {"picture": network(pixels).sample, "scaling": torch.tensor(network.config.scaling_factor)}
    return {"picture": network(pixels, 3).sample}


def changes(pipeline):
    """What the adapter adds to each weight; text encoders' names are those of transformers 4."""
    found = {}
    for name in ("unet", "text_encoder", "text_encoder_2"):
        for key, layer in getattr(pipeline, name, torch.nn.Module()).named_modules():
            if "read" in getattr(layer, "scaling", ()):
                found[f"{name}.{key.removeprefix('text_model.')}"] = layer.get_delta_weight("read")
    return found


def main():
    jobs, out = sys.argv[1:]
    tensors, errors = {}, {}
    for name, job in json.loads(Path(jobs).read_text()).items():
        try:
            tensors |= {f"{name}|{key}": value.contiguous().clone() for key, value in opened(**job).items()}
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    save_file(tensors, f"{out}.safetensors")
    about = {"diffusers": diffusers.__version__, "transformers": transformers.__version__, "errors": errors}
    Path(f"{out}.json").write_text(json.dumps(about | {"diffloop": importlib.util.find_spec("trainers") is not None}))


if __name__ == "__main__":
    main()
