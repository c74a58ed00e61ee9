"""Runs on several nodes, which may not share a file system.

Like the host, we read and write files in the first process of each node. Its results, including
errors, are gathered on all ranks, so that no rank deadlocks waiting for one that failed.
"""

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object


def ask_each_node[Answer](question: Callable[[], Answer]) -> tuple[list[Answer], int]:
    """Calls a function in the first process of each node. Every rank must call this.

    Without distributed training there is one node, which is this process.

    Returns:
        The results of all nodes, and the index of this rank's node.

    Raises:
        RuntimeError: on every rank, if the function raised an error on some node. The process that
            raised it gets the original error.
    """
    state = PartialState()
    mine: tuple[Answer | None, Exception | None] | None = None
    if state.is_local_main_process:
        try:
            mine = question(), None
        except Exception as error:
            mine = None, error
    told = [(mine[0], mine[1] and (str(mine[1]) or repr(mine[1]))) if mine else None]
    gathered: Sequence[Any] = gather_object(told)
    if mine and mine[1]:
        raise mine[1]
    answers = [answer for answer in gathered if answer is not None]
    for number, (_, failure) in enumerate(answers):
        if failure:
            raise RuntimeError(f"on node {number}: {failure}")
    # Ranks are numbered node by node.
    here = sum(answer is not None for answer in gathered[: state.process_index + 1]) - 1
    return [answer for answer, _ in answers], here


def share_folder(folder: Path) -> bool:
    """Whether all nodes see the same folder at this path, which is created if needed."""
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
    """Makes ``save_pretrained`` of a model write weights on every node.

    With ``save_on_each_node`` the host's trainer saves in the first process of each node, but the
    model's ``save_pretrained`` writes weights only on rank 0.
    """
    if hasattr(model, "should_save_on_this_rank"):
        model.should_save_on_this_rank = bool


class EachNodeWrites:
    """An accelerator for which the first process of every node is the main process.

    It is for a method of the host in which the main process writes a file that all ranks read.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    @property
    def is_main_process(self) -> bool:
        return self._accelerator.is_local_main_process
