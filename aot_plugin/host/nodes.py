"""Several nodes: machines that may have no folder in common.

Like the host, we read and write files in the first process of each node. Its answers, errors
included, are gathered on all ranks, so that no rank deadlocks waiting for one that failed.
"""

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object


def ask_each_node[Answer](question: Callable[[], Answer]) -> tuple[list[Answer], int]:
    """What the first process of each node answers, and which of them is this rank's.

    Every rank must call it. Without ranks there is one node, which is this process.

    Raises:
        RuntimeError: on every rank, if a node's process raised an error (there: that error).
    """
    state = PartialState()
    mine: tuple[Answer | None, Exception | None] | None = None
    if state.is_local_main_process:
        try:
            mine = question(), None
        except Exception as error:
            mine = None, error
    told = [(mine[0], mine[1] and (str(mine[1]) or repr(mine[1]))) if mine else None]
    everybody: Sequence[Any] = gather_object(told)
    if mine and mine[1]:
        raise mine[1]
    answers = [said for said in everybody if said is not None]
    for number, (_, failure) in enumerate(answers):
        if failure:
            raise RuntimeError(f"on node {number}: {failure}")
    # Ranks are numbered node by node.
    mine_is = sum(said is not None for said in everybody[: state.process_index + 1]) - 1
    return [answer for answer, _ in answers], mine_is


def share_folder(folder: Path) -> bool:
    """Whether all nodes see the same folder at this path (which is made, if need be)."""
    nodes, _ = ask_each_node(lambda: None)
    if len(nodes) == 1:
        return True
    mark = folder / f".aot-{uuid.uuid4().hex}"

    def leave() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
        return mark

    marks, here = ask_each_node(leave)
    seen, _ = ask_each_node(lambda: all(path.exists() for path in marks))
    if PartialState().is_local_main_process:
        marks[here].unlink(missing_ok=True)
    return all(seen)


def let_each_node_save(model: Any) -> None:
    """With ``save_on_each_node`` the host's trainer saves on the first process of each node, but
    ``save_pretrained`` writes weights on rank 0 alone, whoever calls it: changed for this model."""
    if hasattr(model, "should_save_on_this_rank"):
        model.should_save_on_this_rank = bool


class EachNodeWrites:
    """An accelerator in whose eyes the first process of every node is the main one, for a method of
    the host that lets the main process write a file, which all ranks read."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    @property
    def is_main_process(self) -> bool:
        return self._accelerator.is_local_main_process
