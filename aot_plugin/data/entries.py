"""Checks the entries under ``datasets:`` and ``test_datasets:`` and rewrites them for the host."""

import difflib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from pydantic import BaseModel, ValidationError

from .. import entry_type
from .options import LOADER_KEYS, plain
from .strategy import strategies

LISTS = ("datasets", "test_datasets")


def resolve_datasets(cfg: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """Rewrites the dataset entries of a raw config for the host.

    Pure: neither the config nor its entries are modified. Entries with one of the host's types keep
    all their keys, as instances of a class that the host's validation does not reduce
    (``host_schema``). Entries with one of our types get a type that ends in a hash of the whole
    entry. The host's cache of prepared datasets hashes the type, so it is not reused after a change
    of our options. The options themselves are stored in ``aot_datasets`` under that hash.

    Args:
        cfg: the raw config.
        mode: ``paired`` or ``unpaired``.

    Returns:
        The keys to set in the config: ``datasets``, ``test_datasets`` and ``aot_datasets``, where
        there is something to set.

    Raises:
        ValueError: for an unknown type or key, or a missing, wrong or contradictory option; the
            message names ``datasets[i].key``.
    """
    updates: dict[str, Any] = {}
    options: dict[str, dict[str, Any]] = {}
    grades: dict[str, list[Any]] = {}
    for where in LISTS:
        if cfg.get(where):
            if not isinstance(cfg[where], list):
                raise ValueError(f"`{where}: {cfg[where]}` is wrong: write a list of datasets")
            updates[where], found = _resolve(cfg[where], mode, where, cfg)
            options |= found
            grades[where] = [entry["options"].get("grades") for entry in found.values()]
    if options:
        updates["aot_datasets"] = options
    _check_grades(cfg, grades)
    return updates


def kept_entries(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """``datasets`` of a config that ``resolve_datasets`` has rewritten and the host has validated,
    in the form that another validation does not reduce either; empty if they are in it."""
    from .host_schema import kept_by_host

    entries = cfg.get("datasets") or []
    kept = [
        kept_by_host({k: v for k, v in plain(entry).items() if v is not None}, cfg["aot_mode"])
        if isinstance(entry, Mapping)
        else entry
        for entry in entries
    ]
    return {} if kept == entries else {"datasets": kept}


def resolve_unpaired_datasets(
    entries: Sequence[Any], where: str = "datasets"
) -> tuple[list[Any], dict[str, dict[str, Any]]]:
    """``resolve_datasets`` for one list of an unpaired run.

    Returns:
        The entries for the host, and our options by the hash that ends the entry's type.
    """
    return _resolve(entries, "unpaired", where, {})


def _resolve(
    entries: Sequence[Any], mode: str, where: str, cfg: Mapping[str, Any]
) -> tuple[list[Any], dict[str, dict[str, Any]]]:
    from .host_schema import kept_by_host, schema

    rewritten: list[Any] = []
    options: dict[str, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        at = f"{where}[{index}]"
        if not isinstance(entry, Mapping):
            raise ValueError(f"`{at}` must be a mapping with `path` and `type`, not {entry!r}")
        host_entry = {key: value for key, value in plain(entry).items() if value is not None}
        name = host_entry.get("type")
        name = "chat_template.default" if name == "chat_template" else name
        own_module = False
        if isinstance(name, str) and name in strategies(mode):
            if _reads_ratings(host_entry, name, mode) and (grades := cfg.get("aot_grades")):
                host_entry["grades"] = grades
            host_entry, key, resolved = _ours(host_entry, name, mode, at)
            options[key] = resolved
        else:
            own_module = _is_own_module(name, mode, at)
            if where == "test_datasets" and "field_weight" in host_entry:
                raise ValueError(
                    f"`{at}.field_weight`: Axolotl drops the key from entries of `test_datasets` "
                    "with types of its own; write `type: chat_template.default`, or hold rows of "
                    "`datasets` out with `val_set_size`"
                )
            _check_user_defined(name, mode, at)
        _build(schema(mode, own_module), host_entry, at)
        _check_repeats(host_entry, at, where, cfg)
        if where == "test_datasets" and (own_module or isinstance(name, Mapping)):
            _check_same_options(host_entry, index, cfg)
        # Of an entry of `test_datasets:` the host drops only keys that no class of its own has.
        rewritten.append(kept_by_host(host_entry, mode) if where == "datasets" else host_entry)
    return rewritten, options


def _ours(
    entry: dict[str, Any], name: str, mode: str, at: str
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Rewrites an entry with one of our types.

    Returns:
        The entry for the host, and the key and value of its options in ``aot_datasets``.
    """
    source = {key: entry[key] for key in LOADER_KEYS if key in entry}
    own = {k: v for k, v in entry.items() if k not in (*LOADER_KEYS, "type")}
    if "path" not in source:
        raise ValueError(f"`{at}.path` is missing")
    _build(strategies(mode)[name].options, own, at)
    resolved = {"strategy": name, "mode": mode, "options": own, "source": source}
    kind, key = entry_type.encode(mode, resolved)
    return {**source, "type": kind}, key, resolved


LABELLING_KEYS = frozenset(
    ("grades", "positive_min", "negative_max", "best_and_worst", "field_preference")
)
"""Keys of an entry that say what its labels are made of."""


def _reads_ratings(entry: Mapping[str, Any], name: str, mode: str) -> bool:
    """Whether ``aot_grades`` divides the ratings of an entry that says nothing else."""
    knows = "grades" in strategies(mode)[name].options.model_fields
    said = {key for key, value in entry.items() if value is not False}  # `best_and_worst: false`
    return knows and not LABELLING_KEYS & said


def _check_grades(cfg: Mapping[str, Any], grades: Mapping[str, list[Any]]) -> None:
    if cfg.get("aot_grades") and not any(grades.get("datasets", ())):
        raise ValueError(
            "`aot_grades`: no entry of `datasets` takes ratings; write `type: "
            "chat_template.default` or `chat_template.listwise`, without `positive_min`, "
            "`best_and_worst` and `field_preference`"
        )
    # With two levels rows are positive and negative, which goes with any number of levels.
    counts = sorted({len(found) + 1 for found in chain(*grades.values()) if found} - {2})
    if len(counts) > 1:
        raise ValueError(
            f"`grades` of one entry make {counts[0]} levels, those of another {counts[-1]}: write "
            "as many thresholds in each, so that levels can be compared"
        )


def _check_repeats(entry: Mapping[str, Any], at: str, where: str, cfg: Mapping[str, Any]) -> None:
    if entry.get("weight", 1) <= 1:
        return
    repeats = f"`{at}.weight: {entry['weight']:g}` repeats rows"
    if where == "test_datasets":
        raise ValueError(f"{repeats}: an evaluation counts each row once; write at most 1")
    if cfg.get("dataset_exact_deduplication"):
        raise ValueError(
            f"{repeats}, and `dataset_exact_deduplication: true` would take them out again: keep "
            "one of the two"
        )
    if cfg.get("val_set_size"):
        raise ValueError(
            f"{repeats}, and `val_set_size` would put copies of one row on both sides of the "
            "split: write `test_datasets`, or a weight of at most 1"
        )


OPTION_KEYS = (
    *("field_messages", "field_chosen", "field_rejected", "message_property_mappings", "roles"),
    *("chat_template", "chat_template_jinja"),
)
"""Keys of its entry that a preference type in a user's module may read."""


def _check_same_options(entry: Mapping[str, Any], index: int, cfg: Mapping[str, Any]) -> None:
    # The host also applies the options of `datasets[i]` to `test_datasets[i]`.
    name, trained = entry.get("type"), cfg.get("datasets") or []
    if not trained:
        return
    other = trained[index] if index < len(trained) else {}
    keys = (*OPTION_KEYS, *(["type"] if isinstance(name, Mapping) else []))
    different = [f"`{key}`" for key in keys if plain(entry.get(key)) != plain(other.get(key))]
    if different or not other:
        raise ValueError(
            f"`test_datasets[{index}]`: Axolotl's types read it by the options of "
            f"`datasets[{index}]`, which differs in {', '.join(different) or 'all'}: give both "
            "lists the same order and options"
        )


def _build(model: type[BaseModel], values: dict[str, Any], at: str) -> BaseModel:
    try:
        return model(**values)
    except ValidationError as error:
        raise ValueError(
            "; ".join(_readable(problem, model, at) for problem in error.errors())
        ) from None


def _readable(problem: Any, model: type[BaseModel], at: str) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = list(dict.fromkeys((*LOADER_KEYS, *model.model_fields)))
        turned = "_".join(reversed(key.split("_")))  # `label_field`
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        close = [turned] if turned in known else close
        meant = f"did you mean `{close[0]}`? Accepted are" if close else "accepted are"
        return f"`{at}.{key}` is not an option of this entry's type; {meant} {', '.join(known)}"
    if problem["type"] == "value_error":
        return f"`{at}`: {problem['ctx']['error']}"
    return f"`{at}.{key}: {problem['input']}` is wrong: {problem['msg']}"


_HOST_MODULES = {
    "paired": "axolotl.prompt_strategies.dpo",
    "unpaired": "axolotl.prompt_strategies.kto",
}


def _check_user_defined(kind: Any, mode: str, at: str) -> None:
    if not isinstance(kind, Mapping):
        return
    from axolotl.utils.schemas.datasets import UserDefinedDPOType, UserDefinedKTOType

    known = (UserDefinedDPOType if mode == "paired" else UserDefinedKTOType).model_fields
    unknown = next((key for key in kind if key not in known), None)
    if unknown == "field_weight":
        raise ValueError(f"`{at}.type.field_weight` belongs into the entry, beside `type`")
    if unknown is not None:
        raise ValueError(
            f"`{at}.type.{unknown}` is not a key of a user-defined type; accepted are "
            f"{', '.join(known)}"
        )


def _is_own_module(name: Any, mode: str, at: str) -> bool:
    """Whether a type that is not ours names a function in a user's module.

    Raises:
        ValueError: if it names no function at all.
    """
    # A mapping is the host's user-defined type; rows without a type are used as they are.
    if not name or isinstance(name, Mapping):
        return False
    base = _HOST_MODULES[mode]
    module, _, function = (str(name) if "." in str(name) else f"{name}.default").rpartition(".")
    for candidate in (f"{base}.{module}", module):
        if _find(candidate) and hasattr(importlib.import_module(candidate), function):
            return candidate == module
    ours = f"{', '.join(strategies(mode))}, " if mode == "unpaired" else ""
    raise ValueError(
        f"`{at}.type: {name}` is not a strategy for {mode} rows; accepted are {ours}the host's "
        f"{', '.join(_host_types(base))}, a user-defined mapping, or `<module>.<function>`"
    )


def _find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _host_types(base: str) -> Iterable[str]:
    package = importlib.import_module(base)
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{base}.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                yield f"{info.name}.{name}"
