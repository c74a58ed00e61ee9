"""The YAML interface: options, checks, and the translation into the host's own keys.

This module is light, since the host imports it in every run to merge ``AOTInputArgs`` into its
schema and ``AOTTrainingArgs`` into its training arguments.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .host.adapter_keys import adapter_updates, start_adapter

PAIRED_TRAINER = "aot_plugin.trainer.AOTPairedTrainer"
UNPAIRED_TRAINER = "aot_plugin.trainer.AOTUnpairedTrainer"
DEFAULT_BETA = 0.01
"""``rl_beta`` if the YAML has none: the value of the paper's experiments."""


class AOTInputArgs(BaseModel):
    """The ``aot_*`` keys of the YAML.

    The host merges this class into its config schema. Every default is None, so that a run with
    another ``rl`` validates to the same config as without the plugin; ``desugar`` sets the
    effective values.
    """

    aot_mode: Literal["paired", "unpaired"] | None = Field(
        default=None,
        json_schema_extra={
            "description": "`paired`: rows of (prompt, chosen, rejected). `unpaired`: rows of "
            "(prompt, completion, label). Default `paired`."
        },
    )
    aot_penalty: str | None = Field(
        default=None,
        json_schema_extra={
            "description": "Penalty h of the quantile gap: `logistic`, `squared_hinge`, "
            "`least_squares`, or one that an installed package registers. Default `logistic`."
        },
    )
    aot_loss: str | None = Field(
        default=None,
        json_schema_extra={
            "description": "Loss on the step's log-probabilities: `transport` (AOT), or one that "
            "an installed package registers. Default `transport`."
        },
    )
    aot_sort: Literal["hard", "soft"] | None = Field(
        default=None,
        json_schema_extra={
            "description": "`hard`: exact sort. `soft`: projection onto the permutahedron with "
            "strength `aot_sort_epsilon`. Default `hard`."
        },
    )
    aot_sort_epsilon: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        json_schema_extra={
            "description": "Strength of the soft sort; neighbours closer than 1/epsilon nats stay "
            "sorted exactly. Only with `aot_sort: soft`. Default 0.1."
        },
    )
    aot_label_smoothing: float | None = Field(
        default=None,
        ge=0,
        lt=0.5,
        json_schema_extra={
            "description": "Assumed share s of flipped labels: (1-s) h(z) + s h(-z). Default 0."
        },
    )
    aot_order: Literal["first", "second"] | None = Field(
        default=None,
        json_schema_extra={
            "description": "Order of dominance. `first`: the penalty applies to the gaps between "
            "quantiles; `second`: to their integrals from 0 to t, which puts the weight on the "
            "worst responses. Default `first`."
        },
    )
    aot_score: Literal["sum", "mean"] | None = Field(
        default=None,
        json_schema_extra={
            "description": "What stands for a response: `sum`, its log-probability, or `mean`, its "
            "log-probability per token, so that lengths do not decide the order. Default `sum`."
        },
    )
    aot_sft_weight: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        json_schema_extra={
            "description": "Weight of an added loss of supervised fine-tuning: the mean negative "
            "log-likelihood per token of the chosen or positive responses. Default 0."
        },
    )
    aot_grades: list[Annotated[float, Field(strict=True)]] | None = Field(
        default=None,
        min_length=1,
        json_schema_extra={
            "description": "The label is a rating, and these are the thresholds between its levels "
            "(`[2, 4]`: below 2, 2 to below 4, 4 and above); each level should dominate the next "
            "lower one. For entries that say nothing else. Only with `aot_mode: unpaired`. "
            "Default: none."
        },
    )
    aot_batch: Literal["step", "micro_batch"] | None = Field(
        default=None,
        json_schema_extra={
            "description": "What is sorted together: `step`, the whole effective batch over "
            "accumulation and ranks, or `micro_batch`, each micro-batch of each rank alone (what "
            "TRL's `aot` does). Default `step`."
        },
    )
    aot_draw: Literal["proportional", "balanced"] | None = Field(
        default=None,
        json_schema_extra={
            "description": "How labelled rows are drawn into a step: `proportional` to the data, "
            "or `balanced`, all labels or levels in equal numbers; an epoch then repeats the rows "
            "of rare ones. Only with `aot_mode: unpaired`. Default `proportional`."
        },
    )
    aot_report: bool | None = Field(
        default=None,
        json_schema_extra={
            "description": "Write each evaluation (data, numbers, quantile plot) to "
            "`<output_dir>/aot` and send the plot to loggers that take images. Default `true`."
        },
    )
    aot_samples: int | None = Field(
        default=None,
        ge=0,
        json_schema_extra={
            "description": "Held-out prompts that the policy answers at each evaluation (greedy, "
            "at most 64 tokens), for the report and loggers that take tables. Default 0."
        },
    )
    aot_kept_memory: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        json_schema_extra={
            "description": "GiB that each rank may use for keeping the graphs of scoring passes, "
            "which saves second forward passes. Default: on a GPU what is free after the first "
            "step, on a CPU an eighth of its memory. 0: one micro-batch's graph only."
        },
    )
    aot_datasets: dict[str, dict[str, Any]] | None = Field(
        default=None,
        json_schema_extra={
            "description": "Written by the plugin: the options of the `datasets:` entries that "
            "use its prompt strategies. Not for YAML."
        },
    )


@dataclass
class AOTOptions:
    """The options that the trainer reads, and their defaults."""

    aot_penalty: str = "logistic"
    aot_loss: str = "transport"
    aot_sort: str = "hard"
    aot_sort_epsilon: float = 0.1
    aot_label_smoothing: float = 0.0
    aot_order: str = "first"
    aot_score: str = "sum"
    aot_sft_weight: float = 0.0
    aot_batch: str = "step"
    aot_draw: str = "proportional"
    aot_report: bool = True
    aot_samples: int = 0


@dataclass
class AOTTrainingArgs(AOTOptions):
    """The options as training arguments, which the host merges into its own classes.

    Attributes:
        aot_reference_folder: folder of cached reference log-probabilities.
        aot_start_adapter: the adapter from which training starts (``lora_model_dir``); "" if none.
        aot_start_digest: SHA-256 of that adapter's weights; "" if not known.
    """

    aot_kept_memory: float | None = None
    aot_reference_folder: str = ""
    aot_start_adapter: str = ""
    aot_start_digest: str = ""


class _StrictInputArgs(AOTInputArgs):
    model_config = ConfigDict(extra="forbid", strict=False)


_PARALLEL = ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size")


def is_desugared(cfg: Mapping[str, Any]) -> bool:
    """Whether ``desugar`` has already been applied to this config."""
    return cfg.get("trainer_cls") in (PAIRED_TRAINER, UNPAIRED_TRAINER)


def desugar(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a raw config with ``rl: aot`` and translates it into the host's own keys.

    ``aot_mode: paired`` becomes ``rl: dpo``, ``unpaired`` becomes ``rl: kto``, both with our
    ``trainer_cls``. So data, adapters, reference model and validation are the host's own.

    Returns:
        The keys to set. Empty for a config with another ``rl``; for a config that is desugared
        already, keys of the adapter, and the entries in the form that the host's validation keeps.

    Raises:
        ValueError: naming the key, what is wrong with it, and what to write instead.
    """
    rl = cfg.get("rl")
    if is_desugared(cfg) and rl != "aot":
        from .data import kept_entries

        _check_desugared(cfg)
        # A worker of Ray gets the validated config as a dictionary, and validates it again.
        newer = {k: v for k, v in vars(AOTOptions()).items() if cfg.get(k) is None}
        return newer | adapter_updates(cfg) | kept_entries(cfg)
    written = {
        k: v
        for k, v in cfg.items()
        if isinstance(k, str) and k.startswith("aot_") and v is not None
    }
    if rl != "aot":
        if isinstance(rl, str) and rl.lower().startswith("aot"):
            mode = "unpaired" if "unpaired" in rl.lower() else "paired"
            raise ValueError(f"`rl: {rl}` is not known; write `rl: aot` and `aot_mode: {mode}`")
        # The host's inference command removes `rl` from the training config that it is given.
        if written and not cfg.get("inference"):
            raise ValueError(
                f"`{next(iter(written))}` is an option of `rl: aot`, but the config says "
                f"`rl: {rl}`; write `rl: aot` or remove the key"
            )
        return {}

    from .host.keys import check_known, refusals

    _check_keys(cfg)
    _check_entries(cfg)
    args = _validated(written)
    if refused := refusals(cfg):
        raise ValueError("; ".join(refused))
    check_known(cfg)
    _check_evaluation(cfg)
    for key in _PARALLEL:
        if (cfg.get(key) or 1) != 1:
            raise ValueError(
                f"`{key}: {cfg[key]}` can't be used with `rl: aot`: a sequence must be whole on "
                "one rank; use data parallelism (DDP, DeepSpeed ZeRO, FSDP)"
            )
    if args.aot_sort_epsilon is not None and args.aot_sort != "soft":
        raise ValueError("`aot_sort_epsilon` needs `aot_sort: soft`")
    _check_draw(cfg, args)
    _check_adapter(cfg)
    _check_row_weights(cfg, args)
    if args.aot_grades is not None:
        _check_grades(args)

    _check_lengths(cfg, args)
    defaults = AOTOptions()
    mode = args.aot_mode or "paired"
    updates: dict[str, Any] = {
        "rl": "dpo" if mode == "paired" else "kto",
        "trainer_cls": PAIRED_TRAINER if mode == "paired" else UNPAIRED_TRAINER,
        "aot_mode": mode,
    }
    for key, default in vars(defaults).items():
        value = getattr(args, key)
        updates[key] = default if value is None else value
    updates |= _beta(cfg) | _order(cfg) | adapter_updates(cfg)
    return updates | _data_keys(cfg, mode)


def training_args(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for the host's training-arguments class, from a validated config."""
    from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH

    from .host.keys import FORWARDED
    from .report.saved_arguments import weights_digest

    kwargs = {key: cfg[key] for key in vars(AOTOptions())}
    kwargs["aot_kept_memory"] = cfg.get("aot_kept_memory")
    kwargs |= {key: cfg[key] for key in FORWARDED if cfg.get(key) is not None}
    if cfg.get("early_stopping_patience"):
        kwargs.setdefault("metric_for_best_model", "loss")
    if _is_minimized(str(kwargs.get("metric_for_best_model"))):
        kwargs.setdefault("greater_is_better", False)
    if cfg.get("curriculum_sampling"):
        kwargs["train_sampling_strategy"] = "sequential"
    prepared = cfg.get("dataset_prepared_path") or DEFAULT_DATASET_PREPARED_PATH
    kwargs["aot_reference_folder"] = str(Path(prepared) / "aot_reference")
    # In paired mode the host has a collator of its own for it, which does not fit TRL's rows.
    kwargs["pad_to_multiple_of"] = cfg.get("pad_to_multiple_of")
    if start := start_adapter(cfg):
        kwargs |= {"aot_start_adapter": start, "aot_start_digest": weights_digest(Path(start))}
    if cfg["aot_mode"] == "unpaired":
        # With a TRL loss type without KL term, the KTO trainer skips a forward pass whose result
        # our loss does not use.
        kwargs["loss_type"] = "apo_zero_unpaired"
        # TRL's KTO takes rows in order, for its KL term. Here they stay in order only if the host's
        # key says so; otherwise the trainer's sampler gives both labels to what is sorted together.
        kwargs.setdefault("train_sampling_strategy", "random")
        # The host sets these two for DPO only. TRL's own default would cut rows at 1024 tokens.
        kwargs["max_length"] = cfg.get("sequence_len")
        kwargs["precompute_ref_log_probs"] = bool(cfg.get("precompute_ref_log_probs"))
    return kwargs


def _is_minimized(metric: str) -> bool:
    """Whether less of a metric of ours is better. Transformers takes more of it for better, unless
    its name ends in ``loss``."""
    kind, _, name = metric.removeprefix("eval_").partition("/")
    return kind == "aot" and (name == "nll" or "violation_" in name)


def misspelt(key: str) -> str | None:
    """Our option that a key without the prefix ``aot_`` is probably meant to be, if any."""
    if key.startswith("aot_"):
        return None  # refused as an unknown option, with a list of the known ones
    names = [name for name in AOTInputArgs.model_fields if name != "aot_datasets"]
    # This cutoff allows one wrong letter in a short key, two or three in a long one.
    close = difflib.get_close_matches(key.lower().replace("-", "_"), names, n=1, cutoff=0.8)
    return close[0] if close else None


def _check_keys(cfg: Mapping[str, Any]) -> None:
    from .host.keys import REFUSED

    if not isinstance(cfg.get("trl"), Mapping | None):
        raise ValueError(f"`trl: {cfg['trl']}` is wrong: it must be a mapping of keys")
    # The host silently drops keys that it doesn't know.
    for key in cfg:
        if not isinstance(key, str):
            raise ValueError(f"`{key}` is not a key: the keys of a config are strings")
        if cfg[key] is not None and key not in REFUSED and (name := misspelt(key)):
            raise ValueError(f"`{key}` is not a key of Axolotl; write `{name}`")


def _check_entries(cfg: Mapping[str, Any]) -> None:
    for where in ("datasets", "test_datasets"):
        entries = cfg.get(where)
        if not isinstance(entries, list | None):
            raise ValueError(f"`{where}: {entries}` is wrong: write a list of datasets")
        for index, entry in enumerate(entries or []):
            if not isinstance(entry, Mapping) or not all(isinstance(key, str) for key in entry):
                raise ValueError(
                    f"`{where}[{index}]` must be a mapping with `path` and `type`, not {entry!r}"
                )


def _check_adapter(cfg: Mapping[str, Any]) -> None:
    """Refuses an adapter of no layer, which PEFT would refuse once the model is loaded."""
    layers = ("linear", "modules", "parameters")
    # A saved adapter has its own layers; `axolotl merge-lora` sets `merge_lora`.
    if cfg.get("adapter") not in ("lora", "qlora") or cfg.get("lora_model_dir"):
        return
    if cfg.get("merge_lora"):
        return
    if not any(cfg.get(f"lora_target_{name}") for name in layers):
        raise ValueError(
            f"`adapter: {cfg['adapter']}` adapts no layer: write `lora_target_linear: true` for "
            "all linear ones, or name them in `lora_target_modules`"
        )


def _check_draw(cfg: Mapping[str, Any], args: AOTInputArgs) -> None:
    if args.aot_draw != "balanced":
        return
    if args.aot_mode != "unpaired":
        raise ValueError(
            "`aot_draw: balanced` draws labels in equal numbers, and pairs have none; write "
            "`aot_mode: unpaired`, or remove it"
        )
    if cfg.get("curriculum_sampling"):
        raise ValueError(
            "`curriculum_sampling: true` takes rows in their order, and `aot_draw: balanced` in an "
            "order of its own: keep one of them"
        )


def _check_row_weights(cfg: Mapping[str, Any], args: AOTInputArgs) -> None:
    alone = args.aot_batch == "micro_batch" and _number(cfg.get("micro_batch_size", 1)) == 1
    reasons = {
        "with `aot_sort: soft`, which mixes neighbouring rows as if they counted alike; write "
        "`aot_sort: hard`": args.aot_sort == "soft",
        "with `aot_batch: micro_batch` and `micro_batch_size: 1`: only ratios of weights within a "
        "micro-batch matter; remove `aot_batch`, or write a larger `micro_batch_size`": alone,
    }
    for where in ("datasets", "test_datasets"):
        for index, entry in enumerate(cfg.get(where) or []):
            for reason, holds in reasons.items():
                if holds and entry.get("field_weight") is not None:
                    raise ValueError(f"`{where}[{index}].field_weight` can't be used {reason}")


def _check_grades(args: AOTInputArgs) -> None:
    from .data.labels import are_rising

    grades = args.aot_grades or []
    if args.aot_mode != "unpaired":
        raise ValueError(
            "`aot_grades` divides the ratings of single responses into levels; write `aot_mode: "
            "unpaired`, or remove it"
        )
    if not all(math.isfinite(grade) for grade in grades) or not are_rising(grades):
        raise ValueError(f"`aot_grades: {grades}` is wrong: write thresholds in rising order")


def _check_desugared(cfg: Mapping[str, Any]) -> None:
    # The config that the host saves with a checkpoint is desugared and has all options of its
    # release. They are missing if a user has written `trainer_cls`.
    if cfg.get("aot_mode") is None or cfg.get("aot_loss") is None:
        raise ValueError(
            f"`trainer_cls: {cfg['trainer_cls']}` is what `rl: aot` stands for; write `rl: aot` "
            "and remove `trainer_cls`"
        )


def _validated(written: dict[str, Any]) -> AOTInputArgs:
    from .registry import lookup

    if "aot_datasets" in written:
        raise ValueError(
            "`aot_datasets` is written by the plugin; set options per `datasets:` entry"
        )
    numbers = ("aot_sort_epsilon", "aot_label_smoothing", "aot_sft_weight", "aot_samples")
    for key in (*numbers, "aot_kept_memory"):
        if isinstance(written.get(key), bool):  # pydantic would read `true` as 1
            raise ValueError(f"`{key}: {written[key]}` is wrong: write a number")
    try:
        args = _StrictInputArgs(**written)
    except ValidationError as error:
        raise ValueError(_readable(error)) from None
    if args.aot_penalty is not None:
        lookup("aot_penalties", "aot_penalty", args.aot_penalty)
    if args.aot_loss is not None:
        lookup("aot_losses", "aot_loss", args.aot_loss)
    return args


def _readable(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            names = [name for name in AOTInputArgs.model_fields if name != "aot_datasets"]
            close = difflib.get_close_matches(key, names, n=1, cutoff=0.8)
            meant = f"did you mean `{close[0]}`? Known are" if close else "known are"
            lines.append(f"`{key}` is not an option of aot-plugin; {meant} {', '.join(names)}")
        else:
            lines.append(f"`{key}: {problem['input']}` is wrong: {problem['msg']}")
    return "; ".join(lines)


def _beta(cfg: Mapping[str, Any]) -> dict[str, Any]:
    own, trl_beta = cfg.get("rl_beta"), (cfg.get("trl") or {}).get("beta")
    for key, beta in (("rl_beta", own), ("trl.beta", trl_beta)):
        if beta is not None and not _is_positive(beta):
            raise ValueError(f"`{key}: {beta}` is wrong: write a positive number (the paper: 0.01)")
    if own is None and trl_beta is None:
        return {"rl_beta": DEFAULT_BETA}
    if own is not None and trl_beta is not None and float(own) != float(trl_beta):
        raise ValueError(
            f"`rl_beta: {own}` and `trl.beta: {trl_beta}` are the same setting, and "
            "Axolotl reads the latter: keep one of them"
        )
    return {}


def _check_lengths(cfg: Mapping[str, Any], args: AOTInputArgs) -> None:
    """Checks the host's ``dpo_ld_alpha`` (see ``scoring.excess``)."""
    alpha = cfg.get("dpo_ld_alpha")
    if alpha is None:
        return
    number = _number(alpha)
    if number is None or not 0 <= number <= 1:
        raise ValueError(f"`dpo_ld_alpha: {alpha}` is wrong: write a number from 0 to 1")
    reasons = {
        "it compares the lengths of the two responses of a pair, and `aot_mode: unpaired` has "
        "none; write `aot_score: mean`, or remove it": args.aot_mode == "unpaired",
        "`aot_score: mean` corrects for lengths as well: keep one of the two": (
            args.aot_score == "mean"
        ),
        "it weighs tokens, and `aot_sft_weight` needs their plain sum: keep one of the two": (
            bool(args.aot_sft_weight)
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"`dpo_ld_alpha` can't be used here: {reason}")


def _check_evaluation(cfg: Mapping[str, Any]) -> None:
    size = cfg.get("val_set_size")
    if size is not None and size is not False:
        number = _number(size)
        if number is None or number < 0 or (number > 1 and number != int(number)):
            raise ValueError(
                f"`val_set_size: {size}` is wrong: write a number of rows (8), or a share of them "
                "below 1 (0.05)"
            )
    for key in ("early_stopping_patience", "aot_samples"):
        if cfg.get(key) and not has_evaluation_rows(cfg):
            raise ValueError(f"`{key}` needs evaluations: set `val_set_size` or `test_datasets`")
        if cfg.get(key) and not evaluates(cfg):
            raise ValueError(
                f"`{key}` needs evaluations while it trains: set `evals_per_epoch`, `eval_steps` "
                "or `eval_strategy: epoch`"
            )


def has_evaluation_rows(cfg: Mapping[str, Any]) -> bool:
    return bool(_number(cfg.get("val_set_size")) or cfg.get("test_datasets"))


def evaluates(cfg: Mapping[str, Any]) -> bool:
    """Whether the host evaluates while it trains; rows to evaluate are not enough."""
    asked = any(cfg.get(key) for key in ("eval_strategy", "eval_steps", "evals_per_epoch"))
    return has_evaluation_rows(cfg) and asked and cfg.get("eval_strategy") != "no"


def _order(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps rows in their order if the host's key says so, and entries one after the other."""
    if not cfg.get("curriculum_sampling"):
        return {}
    shuffle = cfg.get("shuffle_merged_datasets")
    if shuffle and len(cfg.get("datasets") or []) > 1:
        raise ValueError(
            "`shuffle_merged_datasets: true` undoes `curriculum_sampling: true`: keep one of them"
        )
    return {"shuffle_merged_datasets": False} if shuffle is None else {}


def _is_positive(value: Any) -> bool:
    number = _number(value)
    return number is not None and number > 0


def _number(value: Any) -> float | None:
    """The finite number that the host reads, or None. YAML 1.1 reads `1e-2` as a string."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _data_keys(cfg: Mapping[str, Any], mode: str) -> dict[str, Any]:
    from .data import resolve_datasets

    if mode == "paired":
        return resolve_datasets(cfg, mode)
    if cfg.get("remove_unused_columns"):
        raise ValueError("`remove_unused_columns: true` drops the labels; remove it")
    return {"remove_unused_columns": False} | resolve_datasets(cfg, mode)
