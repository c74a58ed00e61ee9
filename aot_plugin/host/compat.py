"""All that a release of Axolotl or TRL decides.

What is installed is asked for its features; versions only bound what was tested, since the next
release is likely to work (docs/compatibility.md has the table of what was seen where).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

TESTED = {"axolotl": ("0.19", "0.22"), "trl": ("1.9", "1.17")}
"""Host packages, and the half-open range of releases that were tested."""

ANYWAY = "AOT_PLUGIN_UNTESTED_HOST"
"""Environment variable that lets other releases pass."""


def releases() -> str:
    """What is installed, for messages."""
    return ", ".join(f"{package} {version(package)}" for package in TESTED)


def refuse_untested_releases() -> None:
    """Raises RuntimeError for a host that was never tested, unless ``ANYWAY`` is set."""
    from packaging.version import Version

    if os.environ.get(ANYWAY):
        return
    for package, (low, high) in TESTED.items():
        installed = version(package)
        if not Version(low) <= Version(installed) < Version(high):
            raise RuntimeError(
                f"this aot-plugin was tested with {package}>={low},<{high}, and {installed} is "
                f"installed. Install a tested release (pip install '{package}>={low},<{high}') or "
                f"another aot-plugin; or set the environment variable {ANYWAY}=1 to try this one: "
                "what must hold is checked before the first step all the same, and "
                "`tests/hosts/run.sh` of the source tells more"
            )


@contextmanager
def cached_at(dataset: Any, file: Path) -> Iterator[list[str]]:
    """While it is entered, TRL finds a dataset's cached columns in a file of ours.

    TRL asks the dataset for the path of a fingerprint, once or (up to 1.8) twice. Whatever else is
    cached of this dataset keeps a path of its own.

    Yields:
        The fingerprints that were asked for; the first one is TRL's.
    """
    asked: list[str] = []
    original = dataset._get_cache_file_path

    def path(fingerprint: str) -> str:
        asked.append(fingerprint)
        return str(file) if fingerprint == asked[0] else original(fingerprint)

    dataset._get_cache_file_path = path
    try:
        yield asked
    finally:
        del dataset._get_cache_file_path


def saved_adapter_config(adapter: Path) -> dict[str, Any] | None:
    """The config saved with an adapter in a folder or, for a relative path that is none, on the
    hub; None if there is none."""
    try:
        from axolotl.loaders.adapter import read_saved_adapter_config
    except ImportError:  # Axolotl 0.19
        return _saved_config_by_peft(adapter)
    saved: dict[str, Any] | None = read_saved_adapter_config(
        adapter, from_hub=not adapter.is_absolute()
    )
    return saved


def _saved_config_by_peft(adapter: Path) -> dict[str, Any] | None:
    from peft import PeftConfig

    try:
        found: dict[str, Any] = PeftConfig.from_pretrained(str(adapter)).to_dict()
    except (OSError, ValueError):
        return None
    return found
