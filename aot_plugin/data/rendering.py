"""Stores in a run's output folder how its rows were rendered.

The report reads it, so that it scores the tokens on which the run was trained.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from ..files import write_atomically
from .options import plain
from .render import Renderer
from .strategy import parsed_options, template_config

LOG = get_logger("axolotl.aot_plugin.data")
FILE = Path("aot") / "rendering.json"
"""Path in the output folder of a run."""
OPTIONS = ("system_prompt", "roles", "message_property_mappings")
"""Options of an entry that concern turns, whatever its columns are."""


def save_rendering(cfg: Mapping[str, Any], tokenizer: Any) -> None:
    """Writes the chat templates (as text) that the entries of a run use, with their keys.

    Nothing is written if no entry is rendered with a chat template.
    """
    template = template_config(cfg)
    found = []
    for resolved in (cfg.get("aot_datasets") or {}).values():
        text = Renderer(template, parsed_options(resolved), tokenizer).template
        used = {
            "chat_template": "jinja",
            "chat_template_jinja": text,
            "chat_template_kwargs": template["chat_template_kwargs"],
            "options": {k: v for k, v in plain(resolved["options"]).items() if k in OPTIONS},
        }
        if used not in found:
            found.append(used)
    if found:
        text = json.dumps(found, indent=1)
        path = Path(cfg["output_dir"]) / FILE
        write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def read_rendering(run: Path) -> dict[str, Any] | None:
    """Reads what ``save_rendering`` wrote.

    Args:
        run: the run's folder, or that of one of its checkpoints.

    Returns:
        The keys that ``Renderer`` takes, and the entry's ``options``; None if there is no file.
    """
    paths = (folder / FILE for folder in (run, run.resolve().parent))
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    first, *others = json.loads(path.read_text(encoding="utf-8"))
    if others:
        LOG.warning("%s names %d chat templates; the first one is used", path, 1 + len(others))
    return first
