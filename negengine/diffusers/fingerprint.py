"""By what a model is known again: its family, its class, its configuration, its adapters, and a sample of every tensor."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from negengine.bank import checksum
from negengine.diffusers.families import Family

_VALUES = 64  # of each tensor that are looked at, at least, if it has as many
_FUSED = {"to_qkv": "to_q", "to_kv": "to_k", "to_added_qkv": "add_q_proj"}  # copies of weights that stay beside them


def dtype_of(denoiser: nn.Module) -> torch.dtype:
    """What the denoiser computes in: quantised weights are of another dtype."""
    return next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.get_default_dtype())


def fingerprint(family: Family, denoiser: nn.Module) -> dict[str, str]:
    """The fields of :class:`negengine.bank.About` that say which model it is.

    Made anew whenever it is asked for: fused and hot-swapped adapters are written by way of ``Tensor.data``, which neither moves a
    tensor nor counts as a change of it.

    Raises:
        ValueError: the weights are not there (sequential offload, FSDP).
    """
    given = getattr(denoiser, "config", {})
    config = json.dumps({str(k): v for k, v in dict(given).items() if not str(k).startswith("_")}, sort_keys=True, default=str)
    found = _Found()
    _look(denoiser, "", found)
    adapters = [f"{name} (scaling {'/'.join(f'{scale:g}' for scale in sorted(s))})" for name, s in sorted(found.adapters.items())]
    return {
        "family": family.name,
        "denoiser": type(denoiser).__name__,
        "config": _hashed(config),
        "dtype": str(dtype_of(denoiser)).removeprefix("torch."),
        "adapters": ", ".join(adapters) or "none",
        "weights": _weights(type(denoiser).__name__, found.tensors),
        "numbers": _hashed(repr(sorted(found.numbers.items()))),
    }


@dataclass
class _Found:
    """What a denoiser computes with, by path.

    Attributes:
        tensors: without those of adapters that do nothing, and without copies that are fused.
        numbers: attributes of modules that are not torch's (FreeU sets some, and the scale of an adapter is one), and what attends.
        adapters: name -> its scales in the layers that have it.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, set[float]] = field(default_factory=lambda: defaultdict(set))


def _look(module: nn.Module, path: str, found: _Found) -> None:
    if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
        _look_at_adapters(module, path, found)
        return
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            found.tensors[f"{path}.{name}"] = tensor
    if not type(module).__module__.startswith("torch."):
        _look_at_numbers(module, path, found)
    processor = vars(module).get("processor") or module._modules.get("processor")
    if processor is not None and not type(processor).__module__.startswith("diffusers.models."):  # these all attend alike
        found.numbers[f"{path}.processor"] = type(processor).__qualname__
        _look_at_numbers(processor, f"{path}.processor", found)
    children = module._modules
    for name, child in children.items():
        if child is not None and _FUSED.get(name) not in children:
            _look(child, f"{path}.{name}", found)


def _look_at_numbers(thing: Any, path: str, found: _Found) -> None:
    for name, value in getattr(thing, "__dict__", {}).items():
        if not name.startswith("_") and _is_number(value):
            found.numbers[f"{path}.{name}"] = repr(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_number, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _look_at_adapters(layer: Any, path: str, found: _Found) -> None:
    """At a layer of PEFT, which may be switched off, weighted with 0, or merged into the layer beneath."""
    _look(layer.base_layer, path, found)
    if layer.disable_adapters or layer.merged:
        return
    parts = {name: child for name, child in layer._modules.items() if name != "base_layer" and child is not None}
    for adapter in layer.active_adapters:
        scale = float(getattr(layer, "scaling", {}).get(adapter, 1.0))
        own = {name: part[adapter] for name, part in parts.items() if adapter in part}
        if not own or not scale:
            continue
        found.adapters[adapter].add(scale)
        found.numbers[f"{path}.{adapter}.scaling"] = repr(scale)
        for name, part in own.items():
            if isinstance(part, nn.Module):
                _look(part, f"{path}.{name}.{adapter}", found)
            else:
                found.tensors[f"{path}.{name}.{adapter}"] = part


def _weights(denoiser: str, tensors: Mapping[str, Tensor]) -> str:
    """Of the names, the shapes and some values of all tensors."""
    if not tensors:
        raise ValueError(f"this {denoiser} has no parameters, so no bank can tell it from another")
    parts = [(name, part) for name, tensor in sorted(tensors.items()) for part in _plain(tensor)]
    if any(part.is_meta for _, part in parts):
        raise ValueError(
            "the denoiser's weights are offloaded, so that a reference bank cannot be compared with them; use "
            "enable_model_cpu_offload instead of sequential offload"
        )
    names = [(name, str(part.dtype), tuple(part.shape)) for name, part in parts]
    samples: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    with torch.no_grad():
        for _, part in parts:
            sample = _sample(part)
            samples[sample.dtype].append(sample)
        return _hashed(f"{_hashed(repr(names))} {checksum(*map(_on_host, samples.values()))}")


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """A quantised tensor may be a wrapper around several."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor if type(tensor) in (Tensor, nn.Parameter) else tensor.detach().as_subclass(Tensor)


def _sample(tensor: Tensor) -> Tensor:
    """Values from all over a tensor, without a copy of it; the odd distance goes through the columns of a matrix, too."""
    flat = tensor.reshape(-1)
    chosen = flat[:: len(flat) // _VALUES | 1]
    chosen = chosen if tensor.is_contiguous() else chosen.clone()  # which does not keep all of it
    return chosen.view(torch.uint8) if chosen.itemsize == 1 else chosen


def _on_host(samples: Sequence[Tensor]) -> Tensor:
    """One tensor of all; brought together where they are, so that the host waits once, unless they are on several devices."""
    together = len({sample.device for sample in samples}) == 1
    return torch.cat(list(samples) if together else [sample.cpu() for sample in samples]).cpu()


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
