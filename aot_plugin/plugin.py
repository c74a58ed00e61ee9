"""The plugin that Axolotl loads: aot_plugin's implementation of the host's plugin API."""

import os
import sys
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager

from .config import desugar, is_desugared, training_args
from .host.compat import refuse_untested_releases


class AOTPlugin(BasePlugin):
    """Adds ``rl: aot`` to Axolotl by writing the host's own keys into the config.

    The host finds this class through the entry-point group ``axolotl.plugins``, or by its name
    under ``plugins:``. With any other ``rl`` no method changes the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[str, Any] = {}

    def register(self, cfg: dict[str, Any]) -> None:
        """Translates ``rl: aot`` in a raw config, which the host validates afterwards.

        Raises:
            ValueError: if an ``aot_*`` key is wrong, or a key of the host contradicts them.
            RuntimeError: if the installed host is outside the tested range.
        """
        self._before = {}
        _refuse_swallowed_flags()
        updates = desugar(cfg)
        if updates:
            refuse_untested_releases()
            _warn_of_keys_without_effect(cfg)
        self._before = {key: cfg.get(key) for key in updates}
        for key, value in updates.items():
            cfg[key] = value
        if is_desugared(cfg):
            from .host.evaluate_command import load_rows_by

            load_rows_by(self._load_rows)

    def on_config_validation_error(self, cfg: dict[str, Any]) -> None:
        """Restores the user's own keys in a config that the host has rejected."""
        for key, value in self._before.items():
            if value is None:
                cfg.pop(key, None)
            else:
                cfg[key] = value

    def get_input_args(self) -> str | None:
        """The pydantic class that the host merges into its schema."""
        return "aot_plugin.config.AOTInputArgs" if self._speaks() else None

    def get_training_args_mixin(self) -> str | None:
        """The dataclass that the host merges into its training arguments."""
        return "aot_plugin.config.AOTTrainingArgs" if self._speaks() else None

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Loads the datasets with the host's own functions.

        Added are ``weight`` and ``shards`` per entry, counts of kept and dropped rows, and an error
        if the rows of an unpaired run have only one label. Before that, incomplete checkpoints and
        prepared rows of a killed run, and rows prepared from other sources, are put out of the
        host's way.

        Returns:
            The datasets; None to leave the loading to the host, if ``rl`` is not ``aot``.
        """
        if not is_desugared(cfg) or not self._speaks():
            return None
        from .host.recovery import set_aside_half_checkpoints

        if not preprocess:
            set_aside_half_checkpoints(cfg)
        return self._load_rows(cfg, preprocess)

    def _load_rows(self, cfg: Any, preprocess: bool = False) -> Any:
        if not is_desugared(cfg):
            return None
        from .data.freshness import load_fresh
        from .data.loading import load_datasets
        from .host.recovery import discard_half_prepared

        discard_half_prepared(cfg, preprocess)
        return load_fresh(cfg, lambda: load_datasets(cfg, preprocess))

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Remembers the policy, and the reference that the host loads after it."""
        if is_desugared(cfg) and self._speaks():
            from .host.loaded_models import remember

            remember(model)

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """The run's values for ``AOTTrainingArgs``; None if ``rl`` is not ``aot``."""
        if not is_desugared(cfg):
            return None
        # The trainer, which is built next, reads it from there. The host's commands have set it to
        # the same.
        PluginManager.get_instance().cfg = cfg
        from .host.nodes import share_folder

        # A node that can't read what another one saves could not resume.
        shared = share_folder(Path(cfg["output_dir"]))
        return {**training_args(cfg), "save_on_each_node": not shared}

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Tells the trainer which datasets its model card names."""
        if is_desugared(cfg) and self._speaks():
            from .host.model_card import hub_datasets

            trainer.hub_datasets = hub_datasets(cfg["datasets"])

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The callbacks of a run; none if ``rl`` is not ``aot``.

        They print a short console line per log, and implement keys that the host reads only in
        supervised fine-tuning.
        """
        if not is_desugared(cfg) or not self._speaks():
            return []
        from .host.callbacks import callbacks

        return callbacks(cfg, trainer)

    def _speaks(self) -> bool:
        # The host identifies plugins by name, and the class can be imported from two modules. So
        # another spelling under `plugins:` creates a second instance, which must do nothing.
        plugins = PluginManager.get_instance().plugins.values()
        return next((p for p in plugins if isinstance(p, AOTPlugin)), self) is self


def _warn_of_keys_without_effect(cfg: dict[str, Any]) -> None:
    from axolotl.utils.logging import get_logger

    from .host.keys import without_effect

    if said := without_effect(cfg):
        get_logger("axolotl.aot_plugin.config").warning(said)


def _refuse_swallowed_flags() -> None:
    # `axolotl train x.yml --aot-mode unpaired` never reaches the config: the host's command line
    # knows only the keys of its core schema, and passes any other flag to the launcher.
    program = os.path.basename(sys.argv[0])
    if program != "axolotl":
        return
    flags = [arg for arg in sys.argv[1:] if arg.startswith(("--aot-", "--aot_"))]
    if flags:
        raise ValueError(
            f"`axolotl` does not pass `{flags[0]}` on to the config: write the key in the YAML, "
            "or run `python -m axolotl.cli.train config.yml "
            f"{flags[0].split('=')[0].replace('-', '_').replace('__', '--', 1)}=...`"
        )
    from axolotl.utils.schemas.config import AxolotlInputConfig

    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    for flag in (arg.split("=")[0] for arg in own if arg.startswith("--") and "_" in arg):
        if flag.removeprefix("--") in AxolotlInputConfig.model_fields:
            dashed = flag.replace("_", "-")
            raise ValueError(f"`axolotl` does not pass `{flag}` on to the config: write `{dashed}`")
