"""Trains the host on one of several CPU ranks; it is a test's, never the plugin's. torchrun starts
it as a script, and ``ranks_helpers.on_ranks`` as a fork with the environment that torchrun gives.

The host expects a GPU wherever there are several ranks. This shim takes the place of what needs
one, and of nothing else:

- the host asks CUDA whether the devices reach each other (``check_cuda_p2p_support``), and maps
  the model to the device of its local rank (``cfg.device_map``);
- accelerate's device mesh selects that device (``torch.cuda.set_device``);
- accelerate on CPU ranks (``ACCELERATE_USE_CPU``) *ignores* a DeepSpeed or FSDP config and trains
  with DDP, without a word. So for these it is told of several devices that speak gloo, and that
  the device is a CPU (``ACCELERATE_TORCH_DEVICE``); and what wraps the model is asserted.

``accelerate launch --cpu`` runs one process in silence, so the world size is asserted as well.

Several jobs are trained one after the other in the same processes, since an import of the host
takes longer than a tiny run; what the host leaves behind is reset between them. A job is a JSON
object: ``config`` (a path), ``wrapper`` (``WRAPPERS``) and optionally ``fault`` (``FAULTS``) and
``repeats: count`` (a repeated row counts like any other), ``fails`` (it is to raise), ``remove``
(a file, before it starts) and ``memory`` (limits of the last rank's, see ``limited_memory``). Each
rank writes next to the config what it put into every transport problem (``.rank0.json``), the
carries of its micro-batches (``.rank0.carries``), how often each step ran out of memory
(``.rank0.retries``) and the trace of an error (``.rank0.txt``).
"""

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import saved_in_process
from limited_memory import Memory, limited

RANK = int(os.environ["RANK"])
WORLD_SIZE = int(os.environ["WORLD_SIZE"])

WRAPPERS = {"ddp": "DistributedDataParallel", "deepspeed": "DeepSpeedEngine", "fsdp2": "FSDP"}
"""What a job's ``wrapper`` makes of the model: the beginning of a class name."""


def die(head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """Ends this process as an out-of-memory kill does: without a word to anybody."""
    os._exit(1)


def not_finite(head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (args[0] * float("nan"),)


FAULTS: dict[str, Callable[..., Any]] = {"die": die, "not_finite": not_finite}
"""What befalls the last rank in the second step: a hook before the LM head."""


@contextlib.contextmanager
def observed(job: dict[str, Any]) -> Iterator[None]:
    """Asserts what wraps the model in every training step, and lets the job's fault happen."""
    from aot_plugin import trainer
    from aot_plugin.host import repeated_rows

    training_step = trainer.AOTTrainerMixin.training_step

    def faulty(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert type(self.model_wrapped).__name__.startswith(WRAPPERS[job["wrapper"]])
        assert self.accelerator.num_processes == torch.distributed.get_world_size() == WORLD_SIZE
        if "fault" in job and self.state.global_step == 1 and RANK == WORLD_SIZE - 1:
            head = self.model.get_output_embeddings()
            head.register_forward_pre_hook(FAULTS[job["fault"]])
        return training_step(self, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(trainer.AOTTrainerMixin, "training_step", faulty))
        if job.get("repeats") == "count":
            every_row = patch(repeated_rows, "distinct_rows", lambda _, size, ranks: [size] * ranks)
            stack.enter_context(every_row)
        if "memory" in job and RANK == WORLD_SIZE - 1:
            stack.enter_context(limited(Memory(**job["memory"])))
        yield


@contextlib.contextmanager
def cpu_ranks(wrapper: str) -> Iterator[None]:
    """The host and accelerate on CPU ranks, for one job."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(torch.cuda, "can_device_access_peer", lambda *_: True))
        stack.enter_context(patch(torch.cuda, "set_device", lambda *_: None))
        # The next job needs the process group.
        stack.enter_context(mock.patch("axolotl.train.cleanup_distributed"))
        env = {"ACCELERATE_USE_CPU": "true"}
        if wrapper != "ddp":
            env = {"ACCELERATE_TORCH_DEVICE": "cpu"}
            gloo = ("gloo", DistributedType.MULTI_GPU)
            stack.enter_context(patch(PartialState, "_prepare_backend", lambda *_: gloo))
        stack.enter_context(mock.patch.dict(os.environ, env))
        # On a GPU the host finds its ranks before it loads data; on a CPU it must be told.
        if wrapper == "ddp":
            assert PartialState(cpu=True).num_processes == WORLD_SIZE
        yield


def reset_host() -> None:
    """What a run leaves in the process besides its environment."""
    import axolotl.utils.distributed
    from accelerate.state import AcceleratorState, GradientState
    from axolotl.integrations.base import PluginManager
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    axolotl.utils.distributed.distributed_state = None
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PluginManager._instance = None
    gc.collect()


def train(job: dict[str, Any]) -> None:
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    from aot_plugin.step.record import watched_steps

    result = Path(job["config"]).with_suffix(f".rank{RANK}")
    if "remove" in job:
        Path(job["remove"]).unlink()
    steps = []
    try:
        with cpu_ranks(job["wrapper"]), observed(job), watched_steps() as steps:
            cfg = load_cfg(job["config"])
            cfg.device_map = {"": "cpu"}
            do_train(cfg, TrainerCliArgs())
    except Exception:
        result.with_suffix(result.suffix + ".txt").write_text(traceback.format_exc())
        if not {"fault", "fails"} & job.keys():
            raise
    problems = [
        [step.micro_batches, problem.positives, problem.sequences]
        for step in steps
        for problem in step.problems
    ]
    result.with_suffix(result.suffix + ".json").write_text(json.dumps(problems))
    carries = json.dumps([step.carries for step in steps])
    result.with_suffix(result.suffix + ".carries").write_text(carries)
    retries = json.dumps([step.retries for step in steps])
    result.with_suffix(result.suffix + ".retries").write_text(retries)
    reset_host()


def main(listing: str, world_size: int) -> None:
    """Trains the jobs that a file lists."""
    assert world_size == WORLD_SIZE
    faulthandler.register(signal.SIGTERM, chain=True)  # the log of a timeout says where it hung
    import axolotl.train  # noqa: F401  (all of the host, before the freeze)

    gc.freeze()
    with saved_in_process():
        for job in json.loads(Path(listing).read_text()):
            print(f"rank {RANK}: {job}", flush=True)
            train(job)
    print(f"rank {RANK}: done", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
