"""A run of the host with or without the plugin, in a process that has not imported the plugin."""

import json
import sys
from pathlib import Path

from harness import saved_in_process


def train(path: str, plugin: str) -> None:
    """Trains, and writes what the process has loaded and how the host has validated the config."""
    assert not any(name.startswith("aot_plugin") for name in sys.modules)
    if plugin == "hidden":  # as if the plugin were not installed
        import axolotl.integrations.base as host

        real = host.entry_points
        host.entry_points = lambda **keys: [
            point for point in real(**keys) if not point.value.startswith("aot_plugin")
        ]
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_cli

    sys.argv = ["train"]
    cfg = load_cfg(path).to_dict()
    with saved_in_process():
        do_cli(config=path)
    loaded = "aot_plugin" in sys.modules, any(m.startswith("aot_plugin.t") for m in sys.modules)
    seen = {"loaded": loaded, "config": cfg}
    Path(path).with_suffix(".json").write_text(json.dumps(seen, sort_keys=True, default=str))
