"""After a killed run: what it left half written is found before anything reads it.

The host writes checkpoints and prepared datasets in place. It resumes from the checkpoint of the
highest number and reads any folder of prepared data that isn't empty, whole or not.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from axolotl.loaders import load_tokenizer
from axolotl.utils.data.lock import FileLockLoader
from axolotl.utils.data.shared import generate_dataset_hash_from_config, get_prepared_dataset_path
from axolotl.utils.logging import get_logger
from axolotl.utils.train import determine_last_checkpoint
from filelock import FileLock

LOG = get_logger("axolotl.aot_plugin.recovery")

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
    """Rename the newest checkpoints that aren't whole, so that the host resumes from one that is.

    Every rank may do so, at any time before the host looks for the checkpoint.

    Raises:
        ValueError: if ``resume_from_checkpoint`` names one that isn't whole.
    """
    wanted = cfg.resume_from_checkpoint
    if isinstance(wanted, str) and os.path.isdir(wanted) and not _is_whole(Path(wanted)):
        raise ValueError(
            f"`resume_from_checkpoint: {wanted}` was left half written, by a killed run; name an "
            "earlier one, or write `auto_resume_from_checkpoints: true`"
        )
    if wanted or not cfg.auto_resume_from_checkpoints:
        return
    while (found := determine_last_checkpoint(cfg, update=False)) and not _is_whole(Path(found)):
        path = Path(found)
        aside = path.with_name(f"incomplete-{path.name}")
        LOG.warning("%s was left half written, by a killed run; now %s", path, aside.name)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            path.rename(aside)
        except FileNotFoundError:
            continue  # another rank was faster


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
