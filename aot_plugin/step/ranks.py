"""A step's rows over all ranks."""

import torch
from accelerate import Accelerator
from torch import Tensor


def gather_rows(accelerator: Accelerator, rows: Tensor) -> tuple[Tensor, slice]:
    """The rows of all ranks, in their order, and where this rank's stand among them.

    Args:
        rows: [n, columns]; n may differ from rank to rank.
    """
    if accelerator.num_processes == 1:
        return rows, slice(0, len(rows))
    sizes = accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = accelerator.pad_across_processes(rows, dim=0)
    parts = accelerator.gather(padded).split(max(sizes))
    start = sum(sizes[: accelerator.process_index])
    everything = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return everything, slice(start, start + len(rows))
