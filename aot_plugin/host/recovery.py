"""After a killed run: what it left half written is found before anything reads it.

The host writes checkpoints and prepared datasets in place. It resumes from the checkpoint of the
highest number and reads any folder of prepared data that isn't empty, whole or not. Nodes that
share no folder do so each from its own.
"""

import contextlib
import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axolotl.loaders import load_tokenizer
from axolotl.utils.data.lock import FileLockLoader
from axolotl.utils.data.shared import generate_dataset_hash_from_config, get_prepared_dataset_path
from axolotl.utils.logging import get_logger
from axolotl.utils.train import determine_last_checkpoint
from filelock import FileLock

from .nodes import ask_each_node

LOG = get_logger("axolotl.aot_plugin.host.recovery")

DATASET_FILES = ("state.json", "dataset_info.json")
"""What ``datasets`` writes last, after all rows."""

CHECKPOINT_FILE = "trainer_state.json"
"""What the trainer writes last."""


def discard_half_prepared(cfg: Any, preprocess: bool = False) -> None:
    """Remove prepared data of this run that isn't whole; the host then prepares it anew.

    Args:
        preprocess: the data is about to be written over, whole or not; in place, it would look
            whole while it is being written.
    """
    if cfg.skip_prepare_dataset:
        return
    name = load_tokenizer(cfg).name_or_path
    # Another run may be writing there, and holds this lock.
    with FileLock(str(FileLockLoader(cfg).lock_file_path)):
        for entries in filter(None, (cfg.datasets, cfg.test_datasets)):
            digest = generate_dataset_hash_from_config(cfg, entries, name)
            folder = get_prepared_dataset_path(cfg, digest)
            half = any(folder.glob("*")) and not all(_is_json(folder / f) for f in DATASET_FILES)
            if half:
                LOG.warning("%s was left half written, by a killed run; prepared anew", folder)
            if half or preprocess:
                shutil.rmtree(folder, ignore_errors=True)


def set_aside_half_checkpoints(cfg: Any) -> None:
    """Rename the newest checkpoints that aren't whole on every node, so that the host resumes from
    one that is. Every rank must call it, before the host looks for the checkpoint.

    Raises:
        ValueError: if ``resume_from_checkpoint`` names one that isn't whole on every node, or if
            every whole one is missing on some node.
    """
    wanted = cfg.resume_from_checkpoint
    if isinstance(wanted, str):
        states, _ = ask_each_node(lambda: _state(Path(wanted)))
        if set(states) not in ({"whole"}, {"missing"}):  # missing on all: the host says so
            raise ValueError(
                f"`resume_from_checkpoint: {wanted}` is {_by_node(states)}; name an earlier one, "
                "or write `auto_resume_from_checkpoints: true`. Half written is what a killed run "
                "leaves; every node needs a whole one where they share no folder"
            )
    if wanted or not cfg.auto_resume_from_checkpoints:
        return
    output_dir = Path(cfg.output_dir)
    nodes, _ = ask_each_node(lambda: _whole_steps(output_dir))
    everywhere, anywhere = set.intersection(*nodes), set.union(*nodes)
    if anywhere and not everywhere:
        raise ValueError(
            "`auto_resume_from_checkpoints`: no checkpoint is whole on every node; the steps are "
            f"{_by_node([str(sorted(steps)) for steps in nodes])}. Copy `checkpoint-"
            f"{max(anywhere)}` in `output_dir: {output_dir}` to the nodes that lack it, or move "
            "the checkpoints away to start anew"
        )
    ask_each_node(lambda: _set_aside(cfg, max(everywhere, default=-1)))


def _set_aside(cfg: Any, newest: int) -> None:
    """Rename the checkpoints of later steps than that of the newest one that is to be read."""
    while found := determine_last_checkpoint(cfg, update=False):
        path = Path(found)
        if _step(path) <= newest:
            return
        aside = path.with_name(f"incomplete-{path.name}")
        LOG.warning("%s is not whole (on every node), by a killed run; now %s", path, aside.name)
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # another node was faster
            path.rename(aside)


def _whole_steps(output_dir: Path) -> set[int]:
    numbered = (path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit())
    return {_step(path) for path in numbered if _is_whole(path)}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def _state(checkpoint: Path) -> str:
    if not checkpoint.is_dir():
        return "missing"
    return "whole" if _is_whole(checkpoint) else "half written"


def _by_node(states: Sequence[str]) -> str:
    if len(states) == 1:
        return states[0]
    return ", ".join(f"{state} on node {node}" for node, state in enumerate(states))


def _is_whole(checkpoint: Path) -> bool:
    # Rank 0 writes the state last. Other ranks may still be writing what torch saves, which is a
    # zip file, and has its directory at its end.
    saved = (*checkpoint.glob("*.pth"), *checkpoint.glob("*.pt"))
    return _is_json(checkpoint / CHECKPOINT_FILE) and all(map(zipfile.is_zipfile, saved))


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return True
