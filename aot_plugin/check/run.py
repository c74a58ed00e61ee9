"""Facts of an optimizer step and of what a run records."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PretrainedConfig

from ..config import AOTOptions, evaluates
from ..data.rendering import FILE as RENDERING
from ..data.sampler import variance_ratio
from ..ot.losses import PairedLogps, StepLogps, UnpairedLogps
from ..report.scores import DIRECTORY
from ..scoring.cost import Cost
from ..step.metrics import prediction_metrics, step_metrics
from .facts import Entry, Logged, Memory, Step

LOGGERS = {
    "use_wandb": "wandb",
    "use_mlflow": "mlflow",
    "use_tensorboard": "tensorboard",
    "use_comet": "comet_ml",
    "use_trackio": "trackio",
}
"""Axolotl's keys for the loggers of ``report_to``."""


def settings(cfg: Any) -> dict[str, object]:
    """The keys of the loss that differ from their defaults, after the mode and beta."""
    defaults = vars(AOTOptions())
    changed = {key: cfg[key] for key in defaults if cfg[key] != defaults[key]}
    beta = cfg.rl_beta if cfg.rl_beta is not None else (cfg.trl or {}).get("beta")
    return {"aot_mode": cfg["aot_mode"], "rl_beta": beta} | changed


def step_facts(cfg: Any, ranks: int, train: Sequence[Entry]) -> Step:
    """What a step of a run consists of; labels by the rows of its entries and ``aot_draw``."""
    step = Step(
        micro_batch=int(cfg.micro_batch_size),
        accumulation=int(cfg.gradient_accumulation_steps),
        ranks=ranks,
        whole=cfg["aot_batch"] == "step",
        paired=cfg["aot_mode"] == "paired",
        labels={},
    )
    if step.paired:
        return step
    rows: Counter[str] = Counter()
    graded = any(entry.levels for entry in train)
    names = ("level 1", "level 0") if graded else ("positive", "negative")
    for entry in train:
        counts = entry.counts
        by_level = {f"level {level:.2g}": n for level, n in entry.levels.items()}
        by_label = dict(zip(names, (counts.positive, counts.negative), strict=True))
        rows.update(by_level or by_label)
    if not (total := sum(rows.values())):
        return step
    shares = {label: n / total for label, n in rows.items()}
    present = [label for label, share in shares.items() if share]
    ratio = variance_ratio([shares[label] for label in present])
    balanced = cfg["aot_draw"] == "balanced"
    if balanced:
        shares = {label: (label in present) / len(present) for label in shares}
    labels = {label: step.together * share for label, share in shares.items()}
    return replace(step, labels=labels, balanced=balanced, variance=ratio)


def memory_facts(
    cfg: Any, model: PretrainedConfig | Exception, entries: Sequence[Entry]
) -> tuple[Memory | None, str | None]:
    """What a micro-batch of the training takes; or None, and why it is not known."""
    if isinstance(model, Exception):
        return None, f"the config of `{cfg.base_model}` can't be loaded here"
    lengths = [entry.lengths for entry in entries if entry.is_train]
    measured = [found for found in lengths if found is not None]
    if not measured:
        return None, "no row of the training set has known lengths"
    text, limit = model.get_text_config(), int(cfg.sequence_len)
    itemsize, checkpointing = cfg.torch_dtype.itemsize, bool(cfg.gradient_checkpointing)
    try:
        cost = Cost.of(text, itemsize, checkpointing)
        sizes = int(text.vocab_size), int(text.num_hidden_layers), int(text.hidden_size)
    except Exception:
        # A config of another kind, which has other names for its sizes, or none.
        return None, f"the config of `{cfg.base_model}` does not have the usual sizes"
    vocabulary, layers, width = sizes
    memory = Memory(
        model=str(model.model_type),
        vocabulary=vocabulary,
        layers=layers,
        width=width,
        itemsize=itemsize,
        checkpointing=checkpointing,
        sequences=int(cfg.micro_batch_size) * (2 if cfg["aot_mode"] == "paired" else 1),
        longest=min(limit, max(found.longest for found in measured)),
        limit=limit,
        per_token=itemsize * layers * width if checkpointing else cost.token,
    )
    return memory, None


def logged_facts(cfg: Any, graded: bool) -> Logged:
    """The metrics, files and loggers of a run, whose rows are ``graded`` or not."""
    ours = logged_keys(cfg)
    train = ["loss", "grad_norm", "learning_rate", *ours, "aot/tokens_per_second"]
    train += ["aot/sorted_u", "aot/sorted_v", "aot/one_sided_steps", *["aot/levels"] * graded]
    evaluation: list[str] = []
    files = ["the model or adapter and checkpoints, as Axolotl saves them"]
    files += [str(RENDERING)] * bool(cfg["aot_datasets"])
    if evaluates(cfg):
        evaluation = ["loss", *ours]
        if cfg["aot_report"]:
            # Of graded rows means over the levels are logged, whose intervals are not known.
            amounts = () if graded else ("violation_fraction", "violation_amount")
            evaluation += [f"aot/{name}_{end}" for name in amounts for end in ("low", "high")]
            files += _report_files(cfg)
    return Logged(train, evaluation, files, [name for key, name in LOGGERS.items() if cfg.get(key)])


def _report_files(cfg: Any) -> list[str]:
    files = ["scores-eval-step….parquet", "dominance-eval-step….json"]
    if find_spec("matplotlib") is not None:
        files.append("quantiles-eval-step….png")
    if cfg["aot_samples"]:
        files.append("samples-eval-step….jsonl")
    return [f"{DIRECTORY}/{name}" for name in files]


def logged_keys(cfg: Any) -> list[str]:
    """The keys of training and evaluation alike: those of two rows of each label."""
    label = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    tokens, logps = torch.ones_like(label), torch.tensor([-4.0, -3.0, -2.0, -1.0]).double()
    kind: type[PairedLogps] | type[UnpairedLogps] = (
        PairedLogps if cfg["aot_mode"] == "paired" else UnpairedLogps
    )
    step: StepLogps = kind.from_sequences(logps, logps - 1, label, tokens)
    found = step_metrics(step, 1.0, cfg["aot_score"], cfg["aot_order"])
    if cfg.dpo_ld_alpha not in (None, 1):
        del found["aot/nll"]  # some tokens count less
    watched = torch.ones(4, 2, dtype=torch.float64)
    return [*found, *prediction_metrics(watched, label == 1, tokens, tokens), "num_tokens"]
