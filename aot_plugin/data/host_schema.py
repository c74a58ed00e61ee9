"""The host's schemas of a ``datasets:`` entry, extended.

The added keys are those that the host's RL loader and preference strategies read, and those that we
read in the host's place.
"""

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
    """Keys that say where the rows are, which of them are taken (``mixing.rows_taken``), and what
    each weighs (``weights.weighed``)."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    ds_type: str | None = None
    trust_remote_code: bool | None = False
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False, strict=True)
    shards: int | None = Field(default=None, ge=1, strict=True)
    shards_idx: int | None = Field(default=None, ge=0, strict=True)
    field_weight: str | None = Field(default=None, min_length=1, strict=True)

    @model_validator(mode="after")
    def _check_shards(self) -> "_Loading":
        if self.shards_idx is not None and self.shards_idx >= (self.shards or 0):
            raise ValueError(
                f"`shards_idx: {self.shards_idx}` needs a `shards` above it, not {self.shards}"
            )
        return self


class UnpairedDataset(_Loading, KTODataset):
    """All keys of an entry of an unpaired run, as the host gets it."""


class TextPairs(_Loading):
    """All keys of an entry of pairs, as the host gets it, unless its type is a user's function.

    The host's types that render without a chat template read no further keys.
    """

    path: str | None = None
    split: str | None = None
    type: UserDefinedDPOType | str | None = None
    data_files: list[str] | None = None
    revision: str | None = None


class PairedDataset(_Loading, DPODataset):
    """All keys of an entry of pairs whose type is a user's ``<module>.<function>``."""

    chat_template: str | None = None
    chat_template_jinja: str | None = None
    message_property_mappings: dict[str, str] | None = None
    roles: dict[str, list[str]] | None = None


def schema(mode: str, own_module: bool) -> type[BaseModel]:
    """The schema of an entry as the host gets it.

    Args:
        mode: ``paired`` or ``unpaired``.
        own_module: True if the type is a function in a user's module.
    """
    if mode == "unpaired":
        return UnpairedDataset
    return PairedDataset if own_module else TextPairs


class _Kept(SFTDataset, DPODataset, KTODataset):
    """An entry that the host's validation leaves unchanged.

    The host converts an entry to the class of its ``rl``, which drops keys; and an entry that is
    not an instance of its SFT class to that class, which restricts the values of other keys
    (``weight`` is at most 1). It leaves an instance of both classes as it is.
    """

    field_weight: str | None = None


def kept_by_host(entry: Mapping[str, Any], mode: str) -> Any:
    """A valid entry in a form that the host's validation does not reduce."""
    # An entry with a user-defined type and no further keys needs none, and pydantic would warn.
    host_class = DPODataset if mode == "paired" else KTODataset
    if isinstance(entry.get("type"), Mapping) and entry.keys() <= host_class.model_fields.keys():
        return dict(entry)
    return _Kept.model_construct(**entry)
