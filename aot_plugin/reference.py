"""The name that cached reference log-probabilities have on disk: all that they depend on.

TRL names them after the fingerprint that `datasets` gives the rows, on which two processes do not
agree, and after the policy with its fresh adapter, which the reference has not. So each run of a
sweep, and a resumed one, would compute them anew.
"""

import hashlib
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ROWS_AT_ONCE = 10_000
REFERENCE_ADAPTER = "ref"
"""TRL's frozen copy of an adapter that is trained further."""


def reference_key(
    dataset: Dataset, policy: nn.Module, ref_model: nn.Module | None, settings: dict[str, Any]
) -> str | None:
    """SHA-256 of rows, reference and settings.

    Args:
        dataset: tokenized rows; what counts are the columns of ids, in the order of the rows.
        policy: whose weights without the adapter in training are the reference, if there is no
        ref_model: a model of its own.
        settings: whatever else the log-probabilities depend on (truncation, precision).

    Returns:
        64 hexadecimal digits; None if this process does not hold the reference's weights (ZeRO-3
        and FSDP share them out).
    """
    found = hashlib.sha256(repr(sorted(settings.items())).encode())
    for name, tensor in _reference_weights(policy, ref_model):
        if tensor.is_meta or isinstance(tensor, DTensor) or not tensor.numel():
            return None
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Any dtype, bfloat16 too, which NumPy does not know.
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for part in _ids(dataset):
        found.update(part)
    return found.hexdigest()


def reference_file(folder: Path, key: str | None) -> Path:
    """A whole file of this key, or else a new name: runs that write at once write two files."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(f"{key}-*.arrow")) if key else []
    return found[0] if found else folder / f"{key or 'unshared'}-{uuid.uuid4().hex}.arrow"


def _reference_weights(
    policy: nn.Module, ref_model: nn.Module | None
) -> Iterable[tuple[str, Tensor]]:
    state = (policy if ref_model is None else ref_model).state_dict()
    trained = set(getattr(policy, "peft_config", ())) - {REFERENCE_ADAPTER}
    # peft writes an adapter's name as a part of the names of its weights.
    return ((k, state[k]) for k in sorted(state) if trained.isdisjoint(k.split(".")))


def _ids(dataset: Dataset) -> Iterator[bytes]:
    names = sorted(name for name in dataset.column_names if name.endswith("_ids"))
    rows = dataset.select_columns(names).with_format("arrow")
    for batch in rows.iter(batch_size=ROWS_AT_ONCE):
        for name in names:
            column = batch[name]
            for values in (pc.list_value_length(column), pc.list_flatten(column)):
                yield f"{name} {len(values)}".encode()
                yield values.cast(pa.int64()).to_numpy().tobytes()
