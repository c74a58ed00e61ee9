"""Reuses prepared rows only while their sources are unchanged.

The host names a folder of prepared rows after the config alone. If a data file or the tokenizer's
chat template is edited in place, the name stays the same and the next run trains on the old rows.
So a file beside the folder records the sources of the rows. A run that finds a difference removes
the folder, and the host prepares the rows again.
"""

import ast
import contextlib
import glob
import importlib.util
import json
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from axolotl.loaders import load_tokenizer
from axolotl.utils.data.lock import FileLockLoader
from axolotl.utils.data.shared import generate_dataset_hash_from_config, get_prepared_dataset_path
from axolotl.utils.logging import get_logger
from filelock import FileLock

from ..digests import digest, file_digest
from ..files import write_atomically
from .mixing import is_mixed

LOG = get_logger("axolotl.aot_plugin.data")

SETTINGS = (
    *("curriculum_sampling", "shuffle_merged_datasets", "shuffle_before_merging_datasets"),
    "excess_length_strategy",
)
"""Host keys that affect the rows or their order, but not the name that the host gives them."""

ATTEMPTS = 3

TOKENIZER_FILES = (
    *("tokenizer*", "*.model", "*.tiktoken", "*tekken*", "vocab*", "merges.txt", "*.jinja"),
    *("chat_template*", "special_tokens_map.json", "added_tokens.json", "tokenization_*.py"),
    "additional_chat_templates/*.jinja",
)
"""Files that a tokenizer is loaded from, in a local folder."""


def load_fresh[Loaded](cfg: Any, load: Callable[[], Loaded]) -> Loaded:
    """Loads the datasets after removing stale prepared rows, and records the sources of new ones.

    Processes may arrive at any time. Rows are checked and removed under the host's lock, by the
    first process that gets it. The host acquires the lock again by itself. In between, another run
    with other settings may prepare its rows, or a file may be edited; so the sources are checked
    again after loading, and everything is repeated if they differ.

    Args:
        cfg: the run's config.
        load: the host's loading.

    Returns:
        The result of ``load``.

    Raises:
        ValueError: if the rows change during each of ``ATTEMPTS`` attempts, since other runs
            prepare other rows in the same folder or files are being edited.
    """
    if cfg.skip_prepare_dataset:
        with without_cache(True):
            return load()
    tokenizer = load_tokenizer(cfg)
    settings = _settings(cfg, tokenizer)  # only once: it hashes the whole vocabulary
    splits = [
        (_folder(cfg, entries, tokenizer), entries)
        for entries in (cfg.datasets, cfg.test_datasets)
        if entries
    ]

    def under_lock(function: Callable[..., bool]) -> bool:
        with FileLock(str(FileLockLoader(cfg).lock_file_path)):
            return all([function(folder, _files(cfg, e), settings) for folder, e in splits])

    for _ in range(ATTEMPTS):
        prepared = under_lock(_keep_if_fresh)
        with without_cache(not prepared):
            loaded = load()
        if under_lock(_is_fresh):
            return loaded
        LOG.warning("the prepared rows have changed meanwhile, and are read again")
    raise ValueError(
        f"other runs prepare other rows in `dataset_prepared_path: {cfg.dataset_prepared_path}` at "
        "the same time, or their files change; give each run a folder of its own"
    )


@contextlib.contextmanager
def without_cache(off: bool) -> Iterator[None]:
    """Disables the cache of `datasets` if ``off``.

    The cache identifies a function of an importable module by its name alone.
    """
    caching = datasets.is_caching_enabled()
    if off:
        datasets.disable_caching()
    try:
        yield
    finally:
        if caching:
            datasets.enable_caching()


def sources_file(folder: Path) -> Path:
    """The file that records the sources of a folder's rows.

    It is beside the folder, since the host takes any folder that isn't empty for prepared rows.
    """
    return folder.with_name(f"aot_sources_{folder.name}.json")


def _folder(cfg: Any, entries: list[Any], tokenizer: Any) -> Path:
    digest = generate_dataset_hash_from_config(cfg, entries, tokenizer.name_or_path)
    return get_prepared_dataset_path(cfg, digest)


def _files(cfg: Any, entries: list[Any]) -> list[Path]:
    return sorted(set(_sources(cfg, entries)))


def _is_fresh(folder: Path, files: list[Path], settings: Mapping[str, Any]) -> bool:
    """Whether the recorded sources of a split's rows are those of this config."""
    return not _change(_written(sources_file(folder)), files, settings)


def _keep_if_fresh(folder: Path, files: list[Path], settings: Mapping[str, Any]) -> bool:
    """Whether a split has prepared rows that are fresh.

    Stale rows are removed, and the current sources are recorded for the rows to come.
    """
    change = _change(_written(sources_file(folder)), files, settings)
    if any(folder.glob("*")):
        if not change:
            return True
        LOG.warning("%s: the rows in %s are prepared anew", change, folder)
        shutil.rmtree(folder, ignore_errors=True)
    if change:
        stamps = {str(path): {**_times(path), "sha256": file_digest(path)} for path in files}
        text = json.dumps({"settings": settings, "files": stamps}, indent=1)
        write_atomically(sources_file(folder), lambda file: file.write_text(text))
    return False


def _written(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _change(
    made_of: Mapping[str, Any] | None, files: list[Path], settings: Mapping[str, Any]
) -> str:
    """How the sources have changed since the rows were prepared, for the log; empty if not."""
    if made_of is None:
        return "nothing says what they were made of"
    before: Mapping[str, Any] = made_of["files"]
    now = {str(path): path for path in files}
    if gone := before.keys() - now.keys():
        return f"{min(gone)} is gone"
    if new := now.keys() - before.keys():
        return f"{min(new)} is new"
    changed = (f"{name} has changed" for name, path in now.items() if not _is(path, before[name]))
    if file := next(changed, None):
        return file
    old: Mapping[str, Any] = made_of["settings"]
    return ", ".join(
        f"{key} has changed" if " " in key else f"`{key}` was {old.get(key)!r} and is {value!r}"
        for key, value in settings.items()
        if old.get(key) != value
    )


def _is(path: Path, stamp: Mapping[str, Any]) -> bool:
    # An unmodified file need not be read. A modified one may still have the same contents.
    if _times(path) == {key: stamp[key] for key in ("size", "mtime_ns")}:
        return True
    return path.stat().st_size == stamp["size"] and file_digest(path) == stamp["sha256"]


def _times(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _settings(cfg: Any, tokenizer: Any) -> dict[str, Any]:
    """What the rows depend on besides files. Names with a blank are descriptions, not keys."""
    entries = [*(cfg.datasets or []), *(cfg.test_datasets or [])]
    own = sorted(Path(__file__).parent.glob("*.py"))  # another release may render differently
    settings = {key: cfg[key] or None for key in SETTINGS}
    # The seed matters if it decides which rows are taken or held out. Otherwise it affects only
    # their order, which the trainer draws anew.
    decides = any(map(is_mixed, entries)) or bool(cfg.val_set_size)
    return settings | {
        "aot_mode": cfg["aot_mode"],
        "seed": cfg.seed if decides else None,
        "axolotl": version("axolotl"),
        "the code of aot-plugin": digest([file_digest(file) for file in own]),
        "the list of `datasets` and `test_datasets`": [str(entry["path"]) for entry in entries],
        # Of the host's types; those of ours are a part of the type's name.
        "the `field_weight` of an entry": (
            [entry.get("field_weight") for entry in entries]
            if any(entry.get("field_weight") for entry in entries)
            else None
        ),
        "the tokenizer as it is loaded (`tokens`, `special_tokens`, revision)": digest(
            list(_behaviour(tokenizer))
        ),
    }


def _behaviour(tokenizer: Any) -> Iterator[str]:
    """Everything that a tokenizer's ids and renderings depend on, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    yield json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    yield repr(sorted(tokenizer.special_tokens_map.items()))
    yield repr(sorted(tokenizer.added_tokens_decoder.items()))
    yield repr(tokenizer.chat_template)


def _sources(cfg: Any, entries: Iterable[Any]) -> Iterator[Path]:
    """Yields the local files from which the rows of some entries are prepared."""
    yield from _folder_files(Path(cfg.tokenizer_config or cfg.base_model), TOKENIZER_FILES)
    yield from _file(cfg.chat_template_jinja)
    options: Mapping[str, Any] = cfg.aot_datasets or {}
    for entry in entries:
        yield from local_files(entry)
        kind = entry["type"]
        resolved = options.get(str(kind).rpartition("_")[2]) or {}
        jinja = entry.get("chat_template_jinja") or resolved.get("options", {}).get(
            "chat_template_jinja"
        )
        yield from _file(jinja)
        if isinstance(kind, str):
            yield from _module(resolved.get("strategy") or kind)


def local_files(entry: Any) -> Iterator[Path]:
    """Yields the files that hold an entry's rows; none if they come from the hub."""
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
            # Cache files that `datasets` keeps in the folder are not part of the rows.
            own = file.name.startswith("cache-") and file.suffix == ".arrow"
            if not own and not any(part.startswith(".") for part in file.relative_to(path).parts):
                yield file


def _folder_files(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    if folder.is_dir():
        for pattern in patterns:
            yield from filter(Path.is_file, folder.glob(pattern))


def _file(text: str | None) -> Iterator[Path]:
    # If the value is the name of a file, the host reads the template from it.
    if text and "\n" not in text and os.path.isfile(text):
        yield Path(text)


def _module(kind: str) -> Iterator[Path]:
    """Yields the source files of a strategy that is neither the host's nor ours.

    They include those of the user's own modules that it imports.
    """
    from .strategy import strategies

    names = {kind.rpartition(".")[0]}
    if kind in strategies():
        strategy = strategies()[kind]
        parts = (strategy.options, strategy.examples, strategy.arrange)
        names = {part.__module__ for part in parts if part is not None}
    seen: set[str] = set()
    for name in names:
        yield from _code(name, seen)


def _code(name: str, seen: set[str], imported: bool = False) -> Iterator[Path]:
    if not name or name in seen or name.partition(".")[0] in ("axolotl", "aot_plugin"):
        return
    seen.add(name)
    spec = None
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(name)
    file = Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
    if file is None or file.suffix != ".py":
        return
    if any(file.is_relative_to(sysconfig.get_path(which)) for which in ("purelib", "platlib")):
        if not imported:  # imports of an installed strategy are expected to change with releases
            yield file
        return
    if file.is_relative_to(sysconfig.get_path("stdlib")):
        return
    yield file
    assert spec is not None
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(dots, spec.parent) if node.level else dots
            modules = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            yield from _code(module, seen, imported=True)
