"""What the plugin's layouts and steps do on a GPU, without the host.

    benchmarks/gpu.sh                 # on a machine with one NVIDIA GPU
    python benchmarks/gpu.py --tiny   # every part of it that a CPU can run, at tiny sizes

Needs torch, transformers, peft and accelerate; `aot_plugin.ot`, `.scoring` and `.step` import
nothing else. Prints tables, and with `--json` appends them to a file, with the card's name:

1. *Kernels*: attention on shared prompts in bf16, forward and backward, against dense float32.
2. *Layouts*: log-probabilities and gradients of small models in bf16 (one with full attention, one
   with a sliding window), in the layouts that each attention backend can have and in padded rows,
   against float32 padded rows. A layout may be as wrong as padded rows are, by rounding; one
   changed token of the prompt shows what a fault looks like.
3. *Out of memory*: a step of a random model of 1B parameters under a limit that it can't keep.
4. *Steps*: time and memory of an optimizer step of that model, and of one of 7B parameters (bf16,
   LoRA, checkpointing, UltraFeedback's lengths) against a plain DPO step: padded rows, one forward
   pass of the reference, one of the policy with its backward pass.
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from _inputs import ultrafeedback_lengths
from _kernels import KERNELS, errors
from _passes import fewest_tokens
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig

from aot_plugin.ot.losses import LOSSES, LossOptions, PairedLogps
from aot_plugin.ot.penalties import PENALTIES
from aot_plugin.scoring.batching import Sequences
from aot_plugin.scoring.layout import Layout, Padded
from aot_plugin.scoring.logps import sequence_logps, weighted_logps_sum
from aot_plugin.scoring.model_input import Batch, padded_rows
from aot_plugin.scoring.scorer import Pass, Scorer, free_memory
from aot_plugin.scoring.settle import Settled, possible_layouts, settle_layout
from aot_plugin.step.budget import Budget, Permits, trainable
from aot_plugin.step.engine import MicroBatch, Objective, StepEngine
from aot_plugin.step.record import watched_steps

BACKENDS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
FUSED = BACKENDS[1:]
PARTS = ("kernels", "layouts", "out_of_memory", "steps")
BETA = 0.1
PAD = 0
OFF = "switched off"
ROUNDING = 0.1
"""Relative distance of two gradients in bf16 that rounding can make; what is left out or counted
twice makes more."""
CARRIES = {
    "second passes": Permits(OFF, OFF),
    "kept graphs": Permits(None, OFF),
    "held gradients": Permits(None, None),
}
"""What a step of ours may do in place of second passes; the last one takes single pairs."""


@dataclass(frozen=True)
class Sizes:
    """Of models and rows.

    Attributes:
        small: configs of the models whose exactness is measured.
        steps: of the models whose steps are measured, the first of which also runs out of memory.
        rank: of their adapters.
        scale, longest: of UltraFeedback's lengths.
        turns: steps of which the median is taken.
    """

    small: dict[str, PreTrainedConfig]
    steps: tuple["Steps", ...]
    rank: int
    scale: float
    longest: int
    turns: int


@dataclass(frozen=True)
class Steps:
    """Of a model: its name and config, attention, and pairs per micro-batch x micro-batches."""

    model: str
    config: PreTrainedConfig
    backends: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]


def llama(*sizes: int) -> Any:
    return LlamaConfig(**shape(*sizes))


def windowed(window: int, *sizes: int) -> Any:
    return MistralConfig(**shape(*sizes), sliding_window=window)


def shape(
    vocabulary: int, hidden: int, wide: int, layers: int, heads: int, key_heads: int
) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 4096,
    }


LLAMA_1B = llama(32000, 2048, 8192, 16, 32, 8)
SMALL = (32000, 512, 1408, 4, 8, 2)
FULL = Sizes(
    small={"full": llama(*SMALL), "window of 256": windowed(256, *SMALL)},
    steps=(
        Steps("1B", LLAMA_1B, FUSED[:-1], ((1, 16), (4, 4), (4, 16))),
        Steps("7B", llama(32000, 4096, 14336, 32, 32, 8), ("sdpa",), ((1, 8), (2, 4), (4, 2))),
        Steps("1B", LLAMA_1B, ("flex_attention",), ((4, 4),)),  # last: it compiles for long
    ),
    rank=16,
    scale=1.0,
    longest=2048,
    turns=3,
)
SMALLEST = (128, 32, 64, 2, 2, 1)
TINY = Sizes(
    small={"full": llama(*SMALLEST), "window of 16": windowed(16, *SMALLEST)},
    steps=(Steps("tiny", llama(*SMALLEST), FUSED, ((1, 2), (2, 2))),),
    rank=1,
    scale=0.1,
    longest=128,
    turns=1,
)


class Kit:
    """Runs the parts and keeps what they find, in ``found``: rows of a table per part. Each row is
    printed at once, since a lent machine may go before the table is complete."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.cuda = device.type == "cuda"
        self.found: dict[str, list[dict[str, Any]]] = {}

    def keep(self, part: str, **row: Any) -> None:
        self.found.setdefault(part, []).append(row)
        print(part, json.dumps(row), flush=True)

    def attempt(self, part: str, name: str, run: Callable[[], None]) -> None:
        """A backend that is missing here, or fails, leaves the others their turn."""
        try:
            run()
        except Exception as error:
            line = str(error).strip().splitlines()[:1]
            self.keep(part, name=name, skipped=f"{type(error).__name__}: {''.join(line)[:160]}")

    def kernels(self) -> None:
        documents = [[120, 75, 260], [1, 300, 40], [500, 129, 128, 1]]
        if not self.cuda:
            documents = [[12, 7, 26], [1, 30, 4]]
        for name, make in KERNELS.items():

            def run(name: str = name, make: Any = make) -> None:
                backward = self.cuda or name != "flex"  # it has none on a CPU
                for tensor, (error, rounding) in errors(
                    make(), documents, self.device, backward
                ).items():
                    ok = error <= 2 * rounding
                    self.keep(
                        "kernels", name=name, tensor=tensor, error=error, rounding=rounding, ok=ok
                    )

            self.attempt("kernels", name, run)

    def layouts(self) -> None:
        for backend in BACKENDS:
            for attention in self.sizes.small:
                name = f"{backend}, {attention}"
                self.attempt("layouts", name, partial(self.layouts_of, backend, attention))

    def layouts_of(self, backend: str, attention: str) -> None:
        """Each layout that a backend can have, without and with checkpointing."""
        self.refuse_on_a_cpu(backend)
        config = self.sizes.small[attention]
        model = random_model(config, backend, self.device, torch.bfloat16).train()
        exact = random_model(config, "eager", self.device, torch.float32)
        exact.load_state_dict(model.state_dict())
        for checkpointing in (False, True):
            if checkpointing:
                checkpoint(model)
            possible, _ = possible_layouts(model, self.sizes.longest, self.device, checkpointing)
            for layout in (Padded(), *possible):
                found = self.exactness(model, exact, layout)
                about = {"name": backend, "attention": attention, "checkpointing": checkpointing}
                self.keep("layouts", **about, **found)

    def exactness(self, model: Any, exact: Any, layout: Layout) -> dict[str, Any]:
        """Errors of a layout against the same weights in float32 on padded rows."""
        pairs = random_pairs(4, self.sizes)
        rows = collate(pairs, range(len(pairs)), self.device)
        weights = torch.linspace(-1, 1, len(pairs), device=self.device)
        tokens = rows["completion_mask"].sum(dim=1)
        scorer = make_scorer(model, lambda policy: Settled(layout, None, None))

        def padded(model: nn.Module, rows: Batch) -> tuple[Tensor, Tensor]:
            head = model.get_output_embeddings()
            with torch.no_grad():
                logps = sequence_logps(model, head, padded_rows(rows))
            total = weighted_logps_sum(model, head, padded_rows(rows), weights)
            return logps, gradient(total, model)

        def off(found: tuple[Tensor, Tensor]) -> dict[str, float]:
            logps = ((found[0] - reference[0]).abs() / tokens).max()
            return {"logps": logps.item(), "gradient": distance(found[1], reference[1])}

        reference = padded(exact, rows)
        rounding = off(padded(model, rows))
        found = off((scorer.logps(rows), gradient(scorer.weighted_sum(rows, weights), model)))
        passes = scorer.take_passes()
        changed = {**rows, "input_ids": rows["input_ids"].clone()}
        changed["input_ids"][:, 0] = changed["input_ids"][:, 0] % 7 + 1
        fault = off(padded(exact, changed))
        return {
            "layout": passes[-1].layout,
            "tokens_over_limit": sum(p.rows * p.width for p in passes)
            / (2 * fewest_tokens([rows])),
            **{f"{name}_error": value for name, value in found.items()},
            **{f"{name}_rounding": value for name, value in rounding.items()},
            **{f"{name}_fault": value for name, value in fault.items()},
            "ok": all(found[name] <= 2 * rounding[name] for name in found),
        }

    def refuse_on_a_cpu(self, backend: str) -> None:
        if not self.cuda and backend not in ("eager", "sdpa"):
            raise NotImplementedError("needs CUDA, at least in its backward pass")

    def steps(self) -> None:
        for steps in self.sizes.steps:
            for backend in steps.backends:
                name = f"{steps.model}, {backend}"
                self.attempt("steps", name, partial(self.steps_with, steps, backend))

    def steps_with(self, steps: Steps, backend: str) -> None:
        self.refuse_on_a_cpu(backend)
        model = self.adapted(steps.config, backend)
        for micro, accumulation in steps.shapes:
            self.compare(model, f"{steps.model}, {backend}", micro, accumulation)

    def compare(self, model: Any, name: str, micro: int, accumulation: int) -> None:
        """Steps of one shape: the plain one, and ours with and without kept graphs or gradients."""
        batches = self.batches(micro, accumulation)
        limit = 2 * fewest_tokens(batch.inputs for batch in batches)
        shape = {"name": name, "micro": micro, "accumulation": accumulation}
        plain, _ = self.measured(model, lambda: plain_step(model, batches))
        tokens = 2 * sum(batch.inputs["input_ids"].numel() for batch in batches)
        self.keep(
            "steps",
            **shape,
            step="plain DPO",
            **plain,
            tokens_over_limit=tokens / limit,
            passes=2 * len(batches),
        )
        first: Tensor | None = None
        for carries, permits in CARRIES.items():
            if carries == "held gradients" and micro > 1:
                continue
            engine = make_engine(model, self.sizes.longest, permits)
            with watched_steps() as records:
                ours, found = self.measured(model, partial(our_step, engine, model, batches))
            first = found if first is None else first
            differs = distance(found, first)
            passes = records[-1].passes
            self.keep(
                "steps",
                **shape,
                step=f"AOT, {carries}",
                **ours,
                time_ratio=ours["seconds"] / plain["seconds"],
                memory_ratio=ours["mb"] / plain["mb"] if self.cuda else None,
                layouts=sorted({taken.layout for taken in passes}),
                carries=sorted(set(records[-1].carries)),
                tokens_over_limit=tokens_of(passes) / limit,
                passes=len(passes),
                gradient_differs=differs,
                ok=differs < ROUNDING,
            )

    def batches(self, micro: int, accumulation: int) -> list[MicroBatch]:
        """Of the pairs of a step."""
        pairs = random_pairs(micro * accumulation, self.sizes)
        starts = range(0, len(pairs), 2 * micro)
        return [micro_batch(pairs, range(i, i + 2 * micro), self.device) for i in starts]

    def adapted(self, config: PreTrainedConfig, backend: str) -> Any:
        """A model with an adapter that does something, as after some steps."""
        free_memory()
        model = random_model(config, backend, self.device, torch.bfloat16)
        adapter = LoraConfig(r=self.sizes.rank, lora_alpha=32, target_modules="all-linear")
        model = get_peft_model(model, adapter).train()
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        checkpoint(model)
        return model

    def measured(self, model: nn.Module, step: Callable[[], None]) -> tuple[dict[str, Any], Tensor]:
        """Seconds and added memory in MB of a step (after one to warm up), and its gradient."""
        seconds, peaks = [], []
        for _ in range(1 + self.sizes.turns):
            model.zero_grad(set_to_none=True)
            before = 0
            if self.cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            step()
            if self.cuda:
                torch.cuda.synchronize()
                peaks.append(torch.cuda.max_memory_allocated() - before)
            seconds.append(time.perf_counter() - start)
        mb = max(peaks[1:]) / 2**20 if peaks else None
        figures = {"seconds": statistics.median(seconds[1:]), "mb": mb}
        return figures, collected_gradient(model)

    def out_of_memory(self) -> None:
        if not self.cuda:
            self.keep("out_of_memory", name="all", skipped="needs CUDA")
            return
        model = self.adapted(self.sizes.steps[0].config, "sdpa")
        batches = self.batches(4, 4)
        engine = make_engine(model, self.sizes.longest, CARRIES["kept graphs"])
        step = partial(our_step, engine, model, batches)
        figures, expected = self.measured(model, step)
        total = torch.cuda.get_device_properties(self.device).total_memory
        for share in (0.8, 0.5, 0.2):
            model.zero_grad(set_to_none=True)
            free_memory()
            before = torch.cuda.memory_allocated()
            limit = (torch.cuda.memory_reserved() + share * figures["mb"] * 2**20) / total
            torch.cuda.set_per_process_memory_fraction(min(limit, 1.0))
            row: dict[str, Any] = {"name": f"{share} of what the step needs"}
            try:
                with watched_steps() as records:
                    step()
                row |= {"outcome": "went on", "retries": records[-1].retries}
                row["gradient_differs"] = distance(collected_gradient(model), expected)
            except torch.OutOfMemoryError:
                row["outcome"] = "raised"
            torch.cuda.set_per_process_memory_fraction(1.0)
            model.zero_grad(set_to_none=True)
            free_memory()
            row["mb_not_given_back"] = (torch.cuda.memory_allocated() - before) / 2**20
            step()
            row["next_gradient_differs"] = distance(collected_gradient(model), expected)
            differs = (value for name, value in row.items() if name.endswith("gradient_differs"))
            row["ok"] = max(differs) < ROUNDING
            self.keep("out_of_memory", **row)


def random_model(
    config: PreTrainedConfig, backend: str, device: torch.device, dtype: torch.dtype
) -> Any:
    """Made on the device: drawing 7B weights on a CPU takes minutes."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=backend, dtype=dtype
        ).to(device)


def checkpoint(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def random_pairs(n: int, sizes: Sizes) -> Sequences:
    """2n sequences: of each pair the chosen and the rejected one after a prompt of their own."""
    generator = torch.Generator().manual_seed(0)
    ids: list[Tensor] = []
    completion: list[Tensor] = []
    for prompt, *responses in ultrafeedback_lengths(n, sizes.scale, sizes.longest):
        vocabulary = sizes.steps[0].config.vocab_size
        start = torch.randint(1, vocabulary, (prompt,), generator=generator)
        for length in responses:
            own = torch.randint(1, vocabulary, (length,), generator=generator)
            ids.append(torch.cat([start, own]))
            completion.append(torch.cat([torch.zeros_like(start), torch.ones_like(own)]))
    return Sequences(ids, completion)


def collate(pairs: Sequences, rows: Sequence[int], device: torch.device) -> Batch:
    return {name: values.to(device) for name, values in pairs.collate(rows, PAD).items()}


def micro_batch(pairs: Sequences, rows: Sequence[int], device: torch.device) -> MicroBatch:
    positive = torch.tensor([row % 2 == 0 for row in rows], device=device)
    inputs = collate(pairs, rows, device)
    return MicroBatch(
        inputs=inputs,
        label=positive,
        tokens=inputs["completion_mask"].sum(dim=1),
        mass=torch.ones(len(positive), dtype=torch.float64, device=device),
        ref_logps=None,
    )


def make_scorer(model: Any, settle: Callable[[nn.Module], Settled]) -> Scorer:
    """Of a bare model, or of one with an adapter, which the reference has switched off."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model

    @contextlib.contextmanager
    def reference(policy: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
        with model.disable_adapter():
            yield policy, base.get_output_embeddings()

    return Scorer(
        policy=lambda: model,
        wrapped=lambda: model,
        head=base.get_output_embeddings,
        reference=reference,
        settle=settle,
        with_gradient=contextlib.nullcontext,
        without_gradient=torch.no_grad,
    )


def make_engine(model: Any, longest: int, permits: Permits) -> StepEngine:
    base, device = model.get_base_model(), model.device

    def settle(policy: nn.Module) -> Settled:
        return settle_layout(policy, base, longest, device, checkpointing=True, regrouped=True)

    return StepEngine(
        make_scorer(model, settle),
        Objective(LOSSES["transport"], LossOptions(PENALTIES["logistic"], BETA), PairedLogps, True),
        model,
        Budget(device, ranks=1),
        gather=lambda rows: (rows, slice(0, len(rows))),
        ranks=1,
        permits=lambda: permits,
        collate=lambda sequences, rows: collate(sequences, rows, device),
        report=lambda step, predictions: None,
    )


def our_step(engine: StepEngine, model: nn.Module, batches: Sequence[MicroBatch]) -> None:
    """What the plugin's trainer makes of a step: the loop around the engine."""
    engine.begin(batches, 0, 1)
    for number in range(len(batches)):
        while True:
            try:
                (engine.surrogate(number) / len(batches)).backward()
                if engine.is_due(number):
                    continue
                engine.finish(number)
                break
            except torch.OutOfMemoryError:
                if not engine.can_retry:
                    engine.abandon()
                    raise
            model.zero_grad()
            engine.retry(number)


def plain_step(model: Any, batches: Sequence[MicroBatch]) -> None:
    """DPO's sigmoid loss of each micro-batch, of padded rows and of all their logits."""

    def margins(batch: MicroBatch) -> Tensor:
        ids, attention, completion = (
            batch.inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")
        )
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
        # Row by row, as TRL does for bf16: the softmax of all rows at once would take more memory.
        found = [
            -F.cross_entropy(of_row, targets, reduction="none")
            for of_row, targets in zip(logits, ids[:, 1:], strict=True)
        ]
        logps = (torch.stack(found) * completion[:, 1:]).sum(dim=1)
        return logps[batch.label] - logps[~batch.label]

    for batch in batches:
        with torch.no_grad(), model.disable_adapter():
            reference = margins(batch)
        loss = -F.logsigmoid(BETA * (margins(batch) - reference)).mean()
        (loss / len(batches)).backward()


def tokens_of(passes: Sequence[Pass]) -> int:
    return sum(taken.rows * taken.width for taken in passes)


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    """Of all trainable parameters, one after the other, float32."""
    parts = torch.autograd.grad(value, trainable(model))
    return torch.cat([part.flatten().float() for part in parts])


def collected_gradient(model: nn.Module) -> Tensor:
    """What backward passes have added up, in the same form."""
    parts = [parameter.grad for parameter in trainable(model)]
    return torch.cat([part.flatten().float() for part in parts if part is not None])


def distance(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|."""
    return ((found - exact).norm() / exact.norm()).item()


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, with the columns of all rows."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}"
        return ", ".join(value) if isinstance(value, list) else str(value)

    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="all by default")
    parser.add_argument("--json", type=Path, help="append what is found to this file")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny runs on a CPU")
    device = torch.device("cpu" if args.tiny else "cuda")
    # The float32 reference is to be one.
    torch.set_float32_matmul_precision("highest")
    kit = Kit(TINY if args.tiny else FULL, device)
    header = {
        "card": "none" if args.tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(header))
    for name in args.parts:
        kit.attempt(name, name, getattr(kit, name))
        print(f"\n## {name}\n\n{table(kit.found[name])}\n", flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps({**header, name: kit.found[name]}) + "\n")
    wrong = [row for rows in kit.found.values() for row in rows if row.get("ok") is False]
    if wrong:
        raise SystemExit(f"more wrong than rounding: {wrong}")


if __name__ == "__main__":
    main()
