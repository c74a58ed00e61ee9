"""Prepared rows are read only while what they were made of is what it was.

The host names a folder of prepared rows after the config alone: a data file, or the tokenizer's
chat template, that is edited in place keeps the name, and the next run trains the old rows. So a
file beside them says what they were made of, and a run that finds anything else removes them,
whereupon the host prepares them anew.
"""

import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from axolotl.loaders import load_tokenizer
from axolotl.utils.data.lock import FileLockLoader
from axolotl.utils.data.shared import generate_dataset_hash_from_config, get_prepared_dataset_path
from axolotl.utils.logging import get_logger
from filelock import FileLock

LOG = get_logger("axolotl.aot_plugin.data")

SETTINGS = (
    *("curriculum_sampling", "shuffle_merged_datasets", "shuffle_before_merging_datasets"),
    "excess_length_strategy",
)
"""Host keys that decide about the rows and their order, and are not in the host's name for them."""

TOKENIZER_FILES = (
    *("tokenizer*", "*.model", "*.tiktoken", "*tekken*", "vocab*", "merges.txt", "*.jinja"),
    *("chat_template*", "special_tokens_map.json", "added_tokens.json", "tokenization_*.py"),
    "additional_chat_templates/*.jinja",
)
"""What a tokenizer is read from, in a local folder."""


@contextlib.contextmanager
def fresh(cfg: Any) -> Iterator[None]:
    """Around the host's loading: stale rows are out of its way, and what the new ones are made of
    is written down.

    Every process may come at any time: what is here happens under the host's lock, and the one that
    comes first does it. Files are hashed before the rows are read, so that an edit meanwhile makes
    the next run prepare them again.
    """
    if cfg.skip_prepare_dataset:
        yield
        return
    name = load_tokenizer(cfg).name_or_path
    # Another run may be writing there, and holds this lock.
    with FileLock(str(FileLockLoader(cfg).lock_file_path)):
        prepared = [
            _keep_if_fresh(cfg, entries, name)
            for entries in (cfg.datasets, cfg.test_datasets)
            if entries
        ]
    # The cache of `datasets` knows a function of an importable module by its name alone.
    caching = datasets.is_caching_enabled()
    if not all(prepared):
        datasets.disable_caching()
    try:
        yield
    finally:
        if caching:
            datasets.enable_caching()


def sources_file(folder: Path) -> Path:
    """Where it stands what the rows of a folder are made of: not in it, since a folder that isn't
    empty counts as prepared."""
    return folder.with_name(f"aot_sources_{folder.name}.json")


def _keep_if_fresh(cfg: Any, entries: list[Any], tokenizer: str) -> bool:
    """Whether there are prepared rows of a split, which are fresh; stale ones are removed."""
    folder = get_prepared_dataset_path(
        cfg, generate_dataset_hash_from_config(cfg, entries, tokenizer)
    )
    files, settings = sorted(set(_sources(cfg, entries))), _settings(cfg)
    made_of = _written(sources_file(folder))
    there = any(folder.glob("*"))
    if there:
        change = _change(made_of, files, settings) if made_of else _newer(folder, files)
        if change is None:
            return True
        LOG.warning("%s: the rows in %s are prepared anew", change, folder)
        shutil.rmtree(folder, ignore_errors=True)
    if made_of is None or _change(made_of, files, settings):
        stamps = {str(path): {**_times(path), "sha256": _digest(path)} for path in files}
        # A killed run must not leave half of it.
        temporary = folder.with_name(f".{sources_file(folder).name}.{os.getpid()}")
        temporary.write_text(json.dumps({"settings": settings, "files": stamps}, indent=1))
        os.replace(temporary, sources_file(folder))
    return False


def _written(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _newer(folder: Path, files: list[Path]) -> str | None:
    """For rows that Axolotl prepared alone, or an earlier release: the clock has to do."""
    prepared = max(path.stat().st_mtime_ns for path in folder.glob("*"))
    newer = next((path for path in files if path.stat().st_mtime_ns > prepared), None)
    return f"{newer} is newer" if newer else None


def _change(
    made_of: Mapping[str, Any], files: list[Path], settings: Mapping[str, Any]
) -> str | None:
    """What is not as it was when the rows were prepared, for the log; None if all is."""
    if made_of["settings"] != settings:
        return ", ".join(
            f"`{key}` was {made_of['settings'].get(key)!r} and is {value!r}"
            for key, value in settings.items()
            if made_of["settings"].get(key) != value
        )
    before: Mapping[str, Any] = made_of["files"]
    now = {str(path): path for path in files}
    if gone := before.keys() - now.keys():
        return f"{min(gone)} is gone"
    if new := now.keys() - before.keys():
        return f"{min(new)} is new"
    return next(
        (f"{name} has changed" for name, path in now.items() if not _is(path, before[name])), None
    )


def _is(path: Path, stamp: Mapping[str, Any]) -> bool:
    # A file that was not touched need not be read; one that was may hold the same all the same.
    if _times(path) == {key: stamp[key] for key in ("size", "mtime_ns")}:
        return True
    return path.stat().st_size == stamp["size"] and _digest(path) == stamp["sha256"]


def _times(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _settings(cfg: Any) -> dict[str, Any]:
    settings = {key: cfg[key] or None for key in SETTINGS}
    return settings | {"axolotl": version("axolotl")}


def _sources(cfg: Any, entries: Iterable[Any]) -> Iterator[Path]:
    """The local files that the prepared rows of some entries are made of."""
    yield from _folder_files(Path(cfg.tokenizer_config or cfg.base_model), TOKENIZER_FILES)
    yield from Path(__file__).parent.glob("*.py")  # another release renders otherwise
    yield from _file(cfg.chat_template_jinja)
    options: Mapping[str, Any] = cfg.aot_datasets or {}
    for entry in entries:
        yield from _rows(entry)
        kind = entry["type"]
        resolved = options.get(str(kind).rpartition("_")[2]) or {}
        jinja = entry.get("chat_template_jinja") or resolved.get("options", {}).get(
            "chat_template_jinja"
        )
        yield from _file(jinja)
        if isinstance(kind, str):
            yield from _module(resolved.get("strategy") or kind)


def _rows(entry: Any) -> Iterator[Path]:
    path, data_files = Path(entry["path"]), entry.get("data_files")
    if data_files and not path.is_file():
        groups = data_files.values() if isinstance(data_files, Mapping) else [data_files]
        for group in groups:
            for pattern in [group] if isinstance(group, str) else group:
                found = glob.glob(pattern, recursive=True)
                yield from filter(Path.is_file, map(Path, found))
    elif path.is_file():
        yield path
    elif path.is_dir():
        for file in _folder_files(path, ("**/*",)):
            # What `datasets` keeps there of its own is none of the rows.
            own = file.name.startswith("cache-") and file.suffix == ".arrow"
            if not own and not any(part.startswith(".") for part in file.relative_to(path).parts):
                yield file


def _folder_files(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    if folder.is_dir():
        for pattern in patterns:
            yield from filter(Path.is_file, folder.glob(pattern))


def _file(text: str | None) -> Iterator[Path]:
    # The host takes a template that names a file for its contents.
    if text and "\n" not in text and os.path.isfile(text):
        yield Path(text)


def _module(kind: str) -> Iterator[Path]:
    """The module of a strategy, if it is a user's own and not an installed package's."""
    from .strategy import strategies

    name = kind.rpartition(".")[0]
    if kind in strategies():
        name = strategies()[kind].options.__module__
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(name) if name else None
        installed = [sysconfig.get_path(which) for which in ("purelib", "platlib", "stdlib")]
        if spec and spec.origin and not spec.origin.startswith(tuple(installed)):
            yield from _file(spec.origin)
