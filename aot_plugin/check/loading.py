"""The config of a training as the host validates it, and the facts that follow from it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import yaml
from axolotl.cli import config as host_config
from axolotl.integrations.base import PluginManager
from axolotl.loaders import load_tokenizer
from axolotl.loaders import tokenizer as host_tokenizer
from axolotl.utils import config as host_validation
from axolotl.utils.dict import DictDefault
from pydantic import ValidationError
from transformers import PretrainedConfig

from ..data.loading import SPLITS, replaced, restore_types
from .facts import Facts
from .rows import entry_facts, failure_of, shown
from .run import logged_facts, memory_facts, settings, step_facts


def load_facts(path: Path, rows: int) -> Facts:
    """Finds out what a training with this config will do.

    Args:
        path: the YAML file.
        rows: rows of each entry that are looked at.

    Raises:
        Exception: what a training would raise before it loads a model.
    """
    datasets.disable_progress_bars()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    with _alone():
        return _facts(path, rows, ranks)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hides the number of ranks from the host, which would wait for the others."""
    ranks = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        if ranks is not None:
            os.environ["WORLD_SIZE"] = ranks


def _facts(path: Path, rows: int, ranks: int) -> Facts:
    with _kept_models() as models:
        cfg = load_config(path)
        restore_types(cfg)
        tokenizer = _tokenizer(cfg)
    with tempfile.TemporaryDirectory(prefix="aot-check-") as folder:
        found = [
            entry_facts(cfg, split, index, rows, tokenizer, tempfile.mkdtemp(dir=folder))
            for split, where in SPLITS.items()
            for index in range(len(cfg.get(where) or ()))
        ]
    entries = [entry for entry, _ in found]
    train = [(entry, kept) for entry, kept in found if entry.is_train]
    memory, no_memory = memory_facts(cfg, models[0], entries)
    return Facts(
        config=str(path),
        settings=settings(cfg),
        asked=rows,
        held_out=cfg.val_set_size or 0,
        entries=entries,
        shown=shown(train, cfg, tokenizer),
        step=step_facts(cfg, ranks, [entry for entry, _ in train]),
        memory=memory,
        no_memory=no_memory,
        adapter=cfg.adapter,
        precomputed=bool(cfg.precompute_ref_log_probs),
        logged=logged_facts(cfg, graded=any(entry.levels for entry, _ in train)),
        failure=failure_of(found, cfg),
    )


def load_config(path: Path) -> Any:
    """Loads a config as the host's commands do, without the log in its output directory.

    Raises:
        ValueError: if it is no config of ``rl: aot``.
        Exception: the host's or the plugin's own, if the config is wrong.
    """
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: this is no config; write keys and values in YAML")
    rl = raw.get("rl")
    if not str(rl).lower().startswith("aot"):
        says = f"says `rl: {rl}`" if rl else "has no `rl`"
        raise ValueError(f"{path} {says}, and this command checks trainings with `rl: aot`")
    try:
        with replaced(host_config, "prepare_debug_log", lambda prepare, cfg: None):
            return host_config.load_cfg(str(path))
    except Exception:
        plugins = PluginManager.get_instance().plugins.values()
        if any(type(plugin).__name__ == "AOTPlugin" for plugin in plugins):
            raise
        raise ValueError(
            "the plugin is not registered: this release of Axolotl needs `plugins: "
            "[aot_plugin.AOTPlugin]` in the config"
        ) from None


def _tokenizer(cfg: Any) -> Any:
    # With `added_tokens_overrides` the host writes a tokenizer into the output directory.
    with tempfile.TemporaryDirectory(prefix="aot-check-") as folder:
        try:
            return load_tokenizer(DictDefault({**cfg, "output_dir": folder}))
        except OSError as error:
            name = cfg.tokenizer_config or cfg.base_model
            raise ValueError(
                f"the tokenizer of `{name}` can't be loaded, without which no row can be read: "
                f"{error}"
            ) from error


@contextlib.contextmanager
def _kept_models() -> Iterator[list[PretrainedConfig | Exception]]:
    """Keeps the model's config that the host loads; if it can't be loaded, the reason, and gives
    the host an empty one, since the rows need none."""
    models: list[PretrainedConfig | Exception] = []

    def load_or_not(load: Any, cfg: Any) -> Any:
        try:
            models.append(load(cfg))
        except (OSError, ValueError) as error:
            models.append(error)
            return PretrainedConfig()
        return models[-1]

    with contextlib.ExitStack() as stack:
        for module in (host_validation, host_tokenizer):
            if hasattr(module, "load_model_config"):
                stack.enter_context(replaced(module, "load_model_config", load_or_not))
        yield models


def in_one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    if isinstance(error, ValidationError):
        problems = [
            f"`{'.'.join(map(str, problem['loc']))}`: {problem['msg']}"
            if problem["loc"]
            else problem["msg"]
            for problem in error.errors()
        ]
        return "; ".join(problems)
    return " ".join(str(error).split()) or type(error).__name__
