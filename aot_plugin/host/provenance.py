"""What a model's log-probabilities depend on besides its weights and the tokens.

Cached log-probabilities are invalid as soon as anything differs that the forward pass depends on: a
config key, the attention kernel, a patched layer, the precision, the release of a package. A key
that includes too much costs one more pass over the data; a key that includes too little silently
trains on a wrong reference. So everything that can be observed is hashed.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..digests import file_digest

PACKAGES = (
    "accelerate",
    "aot-plugin",
    "axolotl",
    "bitsandbytes",
    "causal-conv1d",
    "deepspeed",
    "flash-attn",
    "flash-linear-attention",
    "kernels",
    "liger-kernel",
    "mamba-ssm",
    "peft",
    "torch",
    "torchao",
    "transformers",
    "triton",
    "trl",
    "xformers",
)
"""Packages that take part in a forward pass."""

UNRELATED = frozenset({"_name_or_path", "_commit_hash", "use_cache", "base_model_name_or_path"})
"""Keys of a config that say where it comes from, or that do not affect log-probabilities."""

NOT_SCORING = frozenset({"data", "ot", "report"})
"""Folders of this package that no log-probability depends on."""


def forward_pass(
    model: nn.Module, counts: Callable[[str], bool], settings: dict[str, Any]
) -> dict[str, Any]:
    """Describes ``model``'s forward pass as a JSON value.

    Args:
        model: the reference, or the policy whose adapter is disabled.
        counts: whether a module of this name takes part (those of a trained adapter do not).
        settings: what else the pass depends on (truncation, precision, which adapter).
    """
    modules = [(name, module) for name, module in model.named_modules() if counts(name)]
    sources = {function.__module__ for _, m in modules for function in (type(m), _forward(m))}
    files = (getattr(sys.modules.get(source), "__file__", None) for source in sources)
    return {
        "settings": settings,
        "configs": list(_configs(model)),
        "modules": [_layer(name, module) for name, module in modules],
        "code": sorted(_digest(Path(file)) for file in (*filter(None, files), *_own_files())),
        "versions": dict(_versions()),
        "machine": _machine(model),
    }


def described(config: Any) -> dict[str, Any]:
    """A config of transformers or peft as a dictionary, without ``UNRELATED``."""
    return {key: value for key, value in config.to_dict().items() if key not in UNRELATED}


def _configs(model: nn.Module) -> Iterator[dict[str, Any]]:
    seen: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict") and not any(config is other for other in seen):
            seen.append(config)
            # `to_dict` leaves out the attention kernel that was chosen.
            kernel = getattr(config, "_attn_implementation", None)
            yield {**described(config), "_attn_implementation": kernel}


def _layer(name: str, module: nn.Module) -> list[str]:
    """Name, class, forward function (which may have been patched) and sizes of a module."""
    forward, kind = _forward(module), type(module)
    function = f"{forward.__module__}.{getattr(forward, '__qualname__', forward)}"
    return [name, f"{kind.__module__}.{kind.__qualname__}", function, module.extra_repr()]


def _forward(module: nn.Module) -> Any:
    function: Any = module.forward
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__func__", function)


def _own_files() -> Iterable[Path]:
    package = Path(__file__).parents[1]
    files = (file.relative_to(package) for file in package.rglob("*.py"))
    return [package / file for file in files if file.parts[0] not in NOT_SCORING]


@functools.cache
def _digest(file: Path) -> str:
    """SHA-256 of a source file; the name of any other file.

    Code that comes with a model has no version, nor does edited code.
    """
    return file_digest(file) if file.suffix == ".py" else file.name


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _machine(model: nn.Module) -> dict[str, Any]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    on_gpu = device.type == "cuda"
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    kernels = [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()]
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "float32": [torch.get_float32_matmul_precision(), cudnn.allow_tf32],
        "kernels": kernels,
    }
