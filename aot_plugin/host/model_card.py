"""What TRL's model card of a trained model says: the paper, the tags, the datasets."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load, metadata_save
from transformers import Trainer

PAPER = {
    "title": "Distributional Preference Alignment of LLMs via Optimal Transport",
    "id": "2406.05882",
    "citation": textwrap.dedent("""\
        @inproceedings{melnyk2024distributional,
            title        = {{Distributional Preference Alignment of LLMs via Optimal Transport}},
            author       = {Igor Melnyk and Youssef Mroueh and others},
            year         = 2024,
            booktitle    = {Advances in Neural Information Processing Systems 37 (NeurIPS 2024)},
            eprint       = {2406.05882},
            archivePrefix = {arXiv},
        }"""),
}


class ModelCardMixin(Trainer):
    """Names the run's datasets in the metadata of the model card.

    The host does so for its own DPO trainer, by an argument ``dataset_tags`` of the card.

    Attributes:
        hub_datasets: names of the datasets; the plugin sets them.
    """

    hub_datasets: Sequence[str] = ()

    @property
    def tag_names(self) -> list[str]:
        """The tags that the host adds when it pushes a model: to a list that others add to, so each
        call makes a new one."""
        return ["axolotl", "aot"]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.hub_datasets and self.is_world_process_zero():
            card = Path(str(self.args.output_dir)) / "README.md"
            metadata = metadata_load(card) or {}
            metadata_save(card, {**metadata, "datasets": list(self.hub_datasets)})


def hub_datasets(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The datasets of the Hub, by owner and name, that entries of ``datasets:`` load: neither local
    files nor other addresses."""
    paths = dict.fromkeys(str(entry["path"]) for entry in entries)
    named = [path for path in paths if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)]
    return [path for path in named if not Path(path).exists()]
