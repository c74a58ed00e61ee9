"""The host's schema of a ``datasets:`` entry, widened by what the host's loader reads."""

from axolotl.utils.schemas.datasets import KTODataset


class UnpairedDataset(KTODataset):
    """An entry that keeps ``name`` and ``ds_type``.

    The host converts entries to its own class, which drops the two, unless they are instances of
    it already.
    """

    name: str | None = None
    ds_type: str | None = None
