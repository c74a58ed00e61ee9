"""The host's schemas of a ``datasets:`` entry, widened by the keys that its RL loader and its
preference strategies read, or that we read in its stead."""

from collections.abc import Mapping
from typing import Any

from axolotl.utils.schemas.datasets import (
    DPODataset,
    KTODataset,
    SFTDataset,
    UserDefinedDPOType,
)
from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Loading(BaseModel):
    """Where the rows are, and which of them are taken (``mixing.rows_taken``)."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    ds_type: str | None = None
    trust_remote_code: bool | None = False
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False, strict=True)
    shards: int | None = Field(default=None, ge=1, strict=True)
    shards_idx: int | None = Field(default=None, ge=0, strict=True)

    @model_validator(mode="after")
    def _check_shards(self) -> "_Loading":
        if self.shards_idx is not None and self.shards_idx >= (self.shards or 0):
            raise ValueError(
                f"`shards_idx: {self.shards_idx}` needs a `shards` above it, not {self.shards}"
            )
        return self


class UnpairedDataset(_Loading, KTODataset):
    """All that an entry of an unpaired run may say to the host."""


class TextPairs(_Loading):
    """All that an entry of pairs may say whose type renders text by itself: no such type reads
    more of its entry."""

    path: str | None = None
    split: str | None = None
    type: UserDefinedDPOType | str | None = None
    data_files: list[str] | None = None
    revision: str | None = None


class PairedDataset(_Loading, DPODataset):
    """All that an entry of pairs may say whose type is a user's ``<module>.<function>``."""

    chat_template: str | None = None
    chat_template_jinja: str | None = None
    message_property_mappings: dict[str, str] | None = None
    roles: dict[str, list[str]] | None = None


def schema(mode: str, own_module: bool) -> type[BaseModel]:
    """The class of an entry with a type that is not ours; ``own_module``: a user's function."""
    if mode == "unpaired":
        return UnpairedDataset
    return PairedDataset if own_module else TextPairs


class _Kept(SFTDataset, DPODataset, KTODataset):
    """The host converts an entry to the class of its ``rl``, which drops keys, and one that is
    not of its SFT class to that, which bounds others. An instance of both it leaves alone."""


def kept_by_host(entry: Mapping[str, Any], mode: str) -> Any:
    """A valid entry in a form that the host's validation does not cut down."""
    # A user-defined type with no further key needs none, and pydantic would warn of it.
    host_class = DPODataset if mode == "paired" else KTODataset
    if isinstance(entry.get("type"), Mapping) and entry.keys() <= host_class.model_fields.keys():
        return dict(entry)
    return _Kept.model_construct(**entry)
