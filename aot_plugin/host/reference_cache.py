"""Cached reference log-probabilities: what they depend on, and where they are stored.

TRL names the cache after the fingerprint of the rows in `datasets`, which differs between
processes, and after the policy's weights including those of a new adapter, which the reference does
not have. So each run of a sweep, and a resumed run, would compute them again. Nor does TRL consider
the model's config.

Every node has its own file, since it may not see the disks of others. Either all nodes read or all
compute.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn
from torch.distributed.tensor import DTensor

from ..data import LEVEL, WEIGHT
from ..data.images import COLUMNS
from ..digests import digest
from .nodes import ask_each_node
from .provenance import described, forward_pass

ROWS_AT_ONCE = 10_000
REFERENCE_ADAPTER = "ref"
"""The name of TRL's frozen copy of an adapter that is trained further."""


class Identity(NamedTuple):
    """SHA-256 digests of what reference log-probabilities depend on, as seen by one node.

    Attributes:
        rows: of the token ids.
        weights: of the reference's weights; None if this process does not hold all of them (ZeRO-3
            and FSDP shard them).
        computation: of the forward pass and its settings.
    """

    rows: str
    weights: str | None
    computation: str


def identify(
    dataset: Dataset, policy: nn.Module, ref_model: nn.Module | None, settings: dict[str, Any]
) -> Identity:
    """Digests of rows, reference and computation in this process.

    Args:
        dataset: tokenized rows. Only the columns of ids and the order of the rows matter.
        policy: its weights without the trained adapter are the reference if ``ref_model`` is None.
        ref_model: a separate reference model, if there is one.
        settings: settings of the run that matter (truncation, precision).
    """
    model = policy if ref_model is None else ref_model
    adapters = getattr(policy, "peft_config", {})
    frozen = adapters.get(REFERENCE_ADAPTER) if ref_model is None else None

    counts = belongs_to_reference(policy)
    settings = settings | {"adapter": described(frozen) if frozen else None}
    computation = digest(forward_pass(model, counts, settings))
    return Identity(rows_digest(dataset), _weights_digest(model, counts), computation)


def belongs_to_reference(policy: nn.Module) -> Callable[[str], bool]:
    """Tells by its name whether a weight is the reference's: all but those of trained adapters."""
    trained = set(getattr(policy, "peft_config", {})) - {REFERENCE_ADAPTER}
    # In peft the adapter's name is a part of the names of its modules and weights.
    return lambda name: trained.isdisjoint(name.split("."))


def bits_of_reference(
    policy: nn.Module, ref_model: nn.Module | None
) -> dict[str, list[int]] | None:
    """By dtype the number of the reference's parameters and the sum of their bits as integers.

    Any change shows, and no tensor leaves its device; a digest would take a minute for a large
    model. None if this process does not hold all parameters. Arguments as of ``identify``.
    """
    counts = belongs_to_reference(policy)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found: dict[str, list[int]] = {}
    for name, parameter in (policy if ref_model is None else ref_model).named_parameters():
        if not counts(name):
            continue
        weight = parameter.detach()
        if weight.is_meta or isinstance(weight, DTensor) or not weight.numel():
            return None
        bits = weight.contiguous().reshape(-1).view(integers[min(weight.itemsize, 8)])
        numbers = found.setdefault(str(weight.dtype).removeprefix("torch."), [0, 0])
        numbers[0] += weight.numel()
        numbers[1] += int(bits.sum(dtype=torch.int64))
    return found


def reference_key(nodes: Sequence[Identity]) -> str | None:
    """SHA-256 of the identities of all nodes, 64 hexadecimal digits; None if a node's weights are
    not known.

    Raises:
        ValueError: if the nodes do not have the same rows and weights.
    """
    refuse_unlike_nodes("rows", [node.rows for node in nodes])
    weights = [node.weights for node in nodes if node.weights is not None]
    if len(weights) < len(nodes):
        return None
    refuse_unlike_nodes("reference weights", weights)
    computations = sorted({node.computation for node in nodes})
    return digest([nodes[0].rows, weights[0], computations])


def refuse_unlike_nodes(what: str, digests: Sequence[str]) -> None:
    """Raises ValueError if the nodes' digests of ``what`` differ."""
    unlike = [str(node) for node, found in enumerate(digests) if found != digests[0]]
    if unlike:
        raise ValueError(
            f"the {what} of node {', '.join(unlike)} are not those of node 0. Each node prepares "
            "its own where there is no shared folder: give all of them the same `datasets` files, "
            "`base_model` and `dataset_prepared_path` (or remove the latter's folders)"
        )


def refuse_unlike_rows(*datasets: Any) -> None:
    """Raises ValueError if the nodes do not have the same rows in the same order.

    Every rank reads its share of the rows by number.

    Args:
        datasets: tokenized rows, dictionaries of them, or None.
    """
    if len(ask_each_node(lambda: None)[0]) == 1:
        return
    for dataset in datasets:
        for part in dataset.values() if isinstance(dataset, dict) else (dataset,):
            if part is not None:
                refuse_unlike_nodes("rows", ask_each_node(partial(_all_of_the_rows, part))[0])


def reference_file(folder: Path, identity: Callable[[], Identity]) -> tuple[Path, bool]:
    """Finds this node's cache file.

    Args:
        folder: folder of this node; created if needed.
        identity: ``identify`` with its arguments; called in the first process of each node.

    Returns:
        The file, and True if every node has one. Otherwise the file is new and has the same new
        name on all nodes, so runs that write at the same time write to different files.
    """
    nodes, here = ask_each_node(identity)
    key = reference_key(nodes)

    def look() -> tuple[Path | None, str]:
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(folder.glob(f"{key}-*.arrow")) if key else []
        return next(iter(found), None), f"{key or 'unshared'}-{uuid.uuid4().hex}.arrow"

    seen, _ = ask_each_node(look)
    mine = seen[here][0]
    if mine is not None and all(file for file, _ in seen):
        return mine, True
    return folder / seen[0][1], False


def _weights_digest(model: nn.Module, counts: Callable[[str], bool]) -> str | None:
    found = hashlib.sha256()
    saved = model.state_dict()
    # Including buffers that are not saved (the frequencies of rotary embeddings).
    tensors = {**dict(model.named_buffers()), **saved}
    for name in sorted(filter(counts, tensors)):
        tensor = tensors[name]
        elsewhere = name in saved and not tensor.numel()
        if tensor.is_meta or isinstance(tensor, DTensor) or elsewhere:
            return None
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, since NumPy does not have every dtype (bfloat16).
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def rows_digest(dataset: Dataset) -> str:
    """SHA-256 of the token ids of all rows, in their order; of the turns of rows with images, which
    have no ids yet."""
    found = hashlib.sha256()
    for part in _ids(dataset):
        found.update(part)
    return found.hexdigest()


def _all_of_the_rows(dataset: Dataset) -> str:
    names = [name for name in ("label", LEVEL, WEIGHT) if name in dataset.column_names]
    return digest([rows_digest(dataset), {name: dataset[name][:] for name in names}])


def _ids(dataset: Dataset) -> Iterator[bytes]:
    names = sorted(name for name in dataset.column_names if name.endswith("_ids"))
    if not names:
        turns = dataset.select_columns([n for n in dataset.column_names if n not in COLUMNS])
        yield from (json.dumps(row, default=str).encode() for row in turns)
        return
    rows = dataset.select_columns(names).with_format("arrow")
    for batch in rows.iter(batch_size=ROWS_AT_ONCE):
        for name in names:
            column = batch[name]
            for values in (pc.list_value_length(column), pc.list_flatten(column)):
                yield f"{name} {len(values)}".encode()
                yield values.cast(pa.int64()).to_numpy().tobytes()
