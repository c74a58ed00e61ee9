"""A step's rows over all ranks."""

import torch
from accelerate import Accelerator
from torch import Tensor


def gather_rows(accelerator: Accelerator, rows: Tensor) -> tuple[Tensor, slice]:
    """Gathers rows over ranks.

    Args:
        rows: [n, columns]; n may differ between ranks.

    Returns:
        The rows of all ranks in rank order, and the slice that is this rank's.
    """
    if accelerator.num_processes == 1:
        return rows, slice(0, len(rows))
    sizes = accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = accelerator.pad_across_processes(rows, dim=0)
    parts = accelerator.gather(padded).split(max(sizes))
    start = sum(sizes[: accelerator.process_index])
    everything = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return everything, slice(start, start + len(rows))
