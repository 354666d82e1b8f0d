"""Reads networks straight from a single file: no second copy of the weights is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from datasets_lib.foreign import shown
from trainers.single_file.configs import SD2_TEXT_LAYERS, network_config
from trainers.single_file.families import KINDS, SD2
from trainers.single_file.names import original_names
from trainers.single_file.recognition import DROPPED, SingleFile
from trainers.single_file.tensors import as_original, from_original

if TYPE_CHECKING:
    from torch import Tensor


def read_network(single: SingleFile, network: str, kind: Any, dtype: Any) -> Any:
    """Reads a network as a `kind`, for evaluation; ValueError unless all its tensors are there, and none besides."""
    made = without_weights(single, network, kind)
    state = {key: tensor.to(dtype) for key, tensor in _tensors(single, network, made.state_dict())}
    made.load_state_dict(state, assign=True)
    return made.eval()


def network_tensors(single: SingleFile, network: str, kind: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a network by a `kind`'s keys, in the file's types."""
    return _tensors(single, network, without_weights(single, network, kind).state_dict())


def _tensors(single: SingleFile, network: str, wanted: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    names, files = original_names(single.family.networks[network].kind, wanted), single.names(network)
    shapes = {name: as_original(name, [wanted[key] for key in keys]).shape for name, keys in names.items()}
    for problem in _misfits(single, network, shapes):
        raise single.error(f"its {network} {problem}: it is not built as {single.family.title} is")
    with safe_open(single.path, "pt") as opened:
        for name, keys in names.items():
            parts = from_original(name, opened.get_tensor(files[name]), len(keys))
            yield from zip(keys, parts, strict=True)


def without_weights(single: SingleFile, network: str, kind: Any) -> Any:
    """Builds a network whose weights take no memory; ValueError for a config that its class refuses."""
    from accelerate import init_empty_weights

    if network not in single.family.networks or KINDS[network][1] not in [base.__name__ for base in kind.__mro__]:
        raise single.error(f"is a {single.family.title}, and holds no {kind.__name__}")
    config = network_config(single, network)
    try:
        with init_empty_weights():
            return kind.from_config(config) if hasattr(kind, "from_config") else kind(kind.config_class(**config))
    except Exception as error:  # whatever a library raises for sizes that no model has
        raise single.error(f"its {network} is of no usual size ({shown(error)})") from None


def _misfits(single: SingleFile, network: str, wanted: dict[str, Any]) -> Iterator[str]:
    """Yields how a network's tensors differ from those of its config."""
    found = single.shapes(network)
    for name, shape in wanted.items():
        if name not in found:
            yield f"lacks {shown(name)}"
        elif tuple(shape) != found[name] and tuple(shape) != (*found[name], 1, 1):  # linear, as some write it
            yield f"has {shown(name)} {list(found[name])}, and {list(shape)} is wanted"
    for name in sorted(found.keys() - wanted.keys()):
        if not _is_dropped(single, network, name):
            yield f"has {shown(name)} besides"


def _is_dropped(single: SingleFile, network: str, name: str) -> bool:
    """Whether a tensor is one that diffusers' network has no place for, and that no picture depends on."""
    last = rf"transformer\.resblocks\.{SD2_TEXT_LAYERS}\."
    unused = single.family is SD2 and network == "text_encoder" and re.match(last, name)
    return bool(unused or re.match(DROPPED[single.family.networks[network].kind], name))
