"""Finds incomplete files of a killed run before anything reads them.

The host writes checkpoints and prepared datasets in place. It resumes from the checkpoint with the
highest number and reads any folder of prepared data that isn't empty, complete or not. If nodes do
not share a folder, each reads its own.
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
"""The files that ``datasets`` writes last, after all rows."""

CHECKPOINT_FILE = "trainer_state.json"
"""The file that the trainer writes last."""


def discard_half_prepared(cfg: Any, preprocess: bool = False) -> None:
    """Removes incomplete prepared data of this run; the host then prepares it again.

    Args:
        cfg: the run's config.
        preprocess: True if the data is about to be overwritten. Then complete data is removed as
            well: overwritten in place, it would look complete while it is being written.
    """
    if cfg.skip_prepare_dataset:
        return
    name = load_tokenizer(cfg).name_or_path
    # Another run that is writing there holds this lock.
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
    """Renames the newest checkpoints that are not complete on every node.

    So the host resumes from one that is. Every rank must call this, before the host looks for the
    checkpoint.

    Raises:
        ValueError: if ``resume_from_checkpoint`` names a checkpoint that is not complete on every
            node, or if there are complete checkpoints, but none is complete on every node.
    """
    wanted = cfg.resume_from_checkpoint
    if isinstance(wanted, str):
        states, _ = ask_each_node(lambda: _state(Path(wanted)))
        if set(states) not in ({"whole"}, {"missing"}):  # the host reports one that all nodes lack
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
    """Renames the checkpoints of steps after ``newest``."""
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
    # Rank 0 writes the trainer state last. Other ranks may still be writing files with torch.save;
    # these are zip files, which have their directory at the end.
    saved = (*checkpoint.glob("*.pth"), *checkpoint.glob("*.pt"))
    return _is_json(checkpoint / CHECKPOINT_FILE) and all(map(zipfile.is_zipfile, saved))


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return True
