"""The two models of the experiments, and what is each one's own: configs, rows, folders."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "example_configs" / "quickstart"))

import torch
import yaml
from sampling import load

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FIRST_MODEL, MODELS = "smollm2", ("smollm2", "student")


@dataclass(frozen=True)
class Model:
    name: str = FIRST_MODEL

    def own(self, path: Path) -> Path:
        """A folder of the first model, or that of this one in its place."""
        return path if self.name == FIRST_MODEL else path / self.name

    @property
    def outputs(self) -> Path:
        return self.own(ROOT / "outputs" / "experiments")

    @property
    def quickstart(self) -> Path:
        """The rows of the quickstart: those that come with it are the first model's samples."""
        if self.name == FIRST_MODEL:
            return ROOT / "example_configs" / "quickstart" / "data"
        return self.data

    @property
    def data(self) -> Path:
        """The rows that data.py makes."""
        return self.outputs / "data"

    def base(self) -> dict[str, Any]:
        changes = {}
        if self.name != FIRST_MODEL:
            changes = yaml.safe_load((HERE / "models" / f"{self.name}.yml").read_text())
        return yaml.safe_load((HERE / "base.yml").read_text()) | changes

    def load(self) -> tuple[Any, Any]:
        """The model before training, in the type it is trained in, and its tokenizer."""
        base = self.base()
        dtype = torch.bfloat16 if base["bf16"] else torch.float32
        return load(ROOT / base["base_model"], dtype)

    def with_own_rows(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config with this model's rows in place of the first one's."""
        first = Model()
        folders = {first.quickstart: self.quickstart, first.outputs: self.outputs}

        def own(entry: dict[str, Any]) -> dict[str, Any]:
            path = ROOT / entry["path"]
            before = next(folder for folder in folders if path.is_relative_to(folder))
            after = folders[before] / path.relative_to(before)
            return {**entry, "path": str(after.relative_to(ROOT))}

        found = {key: config[key] for key in ("datasets", "test_datasets") if key in config}
        return config | {key: [own(entry) for entry in entries] for key, entries in found.items()}
