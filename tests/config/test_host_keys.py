"""No key of a config is dropped in silence: each has an effect, is refused, or is named."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import axolotl
import pytest
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.schemas.config import AxolotlConfigWCapabilities
from axolotl.utils.schemas.deprecated import DeprecatedParameters
from axolotl.utils.schemas.trl import TRLConfig
from harness import config, train, write_config, write_rows

from aot_plugin.config import _PARALLEL, training_args
from aot_plugin.host.keys import (
    FOREIGN,
    FORWARDED,
    REFUSED,
    REFUSED_IF_ON,
    REFUSED_OF_TRL,
    UPDATES_IN_BACKWARD,
    WITHOUT_EFFECT,
    known_keys,
    refusals,
)

# Where the host reads keys that a run with `rl: dpo` or `rl: kto` never comes to.
ELSEWHERE = re.compile(
    "|".join(
        [
            "utils/schemas/|utils/data/(sft|streaming|wrappers)|core/builders/causal|core/trainers/",
            "integrations/|prompt_strategies/|prompt_tokenizers|processing_strategies|telemetry/",
            "core/chat|utils/collators/|utils/samplers/|utils/generation/|callbacks/(generation|lisa)",
            "monkeypatch/(models|relora|gradient_checkpointing)|model_support/",
            "cli/(inference|evaluate|merge|chat|export|quantize|vllm|utils/diffusion|config_options)",
            "evaluate\\.py|kernels/|^datasets\\.py",
        ]
    )
)
READ_THERE_ALL_THE_SAME = re.compile(
    r"core/trainers/(dpo/|mixins/(optimizer|scheduler|distributed|rng))|utils/data/utils"
)
BY_PREFIX = ("wandb_", "mlflow_", "comet_", "trackio_", "ray_", "gradio_", "mixlora_", "otel_")
"""Read by the beginning of their names; of another command; or refused by the host under `rl`."""

OTHER_COMMANDS = {"merge_method", "export", "vllm", "inference"}

HONOURED_BY_US = {
    *FORWARDED,
    *("early_stopping_patience", "loss_watchdog_threshold", "loss_watchdog_patience"),
    *("precompute_ref_log_probs", "chat_template_kwargs"),
}

SAID_BY_THE_HOST = {
    *DeprecatedParameters.model_fields,
    *("dataset_processes", "xformers_attention", "sdp_attention", "flash_attention"),
    *("flex_attention", "sage_attention", "eager_attention", "sample_packing", "fsdp_version"),
    *("deepcompile",),
}
"""Renamed, refused or warned of by its validation."""


def read_by_the_host() -> set[str]:
    """Keys whose names stand in a module that an RL run may come to."""
    root = Path(axolotl.__file__).parent
    words: set[str] = set()
    for path in root.rglob("*.py"):
        name = str(path.relative_to(root))
        if not ELSEWHERE.search(name) or READ_THERE_ALL_THE_SAME.search(name):
            words |= set(re.findall(r"[.\"'](\w+)", path.read_text()))
    return words


def test_every_key_of_the_host_is_accounted_for() -> None:
    accounted = {*REFUSED, *REFUSED_IF_ON, *WITHOUT_EFFECT, *_PARALLEL, "save_safetensors"}
    accounted |= HONOURED_BY_US | SAID_BY_THE_HOST | OTHER_COMMANDS | read_by_the_host()
    left = [key for key in AxolotlConfigWCapabilities.model_fields if key not in accounted]
    assert [key for key in left if not key.startswith(BY_PREFIX)] == []


def test_what_is_refused_as_foreign_is_foreign() -> None:
    assert known_keys() & FOREIGN.keys() == set()
    assert TRLConfig.model_fields.keys() >= REFUSED_OF_TRL.keys()


@pytest.fixture
def loaded(tiny_model: Path, tmp_path: Path) -> Any:
    """``loaded(**keys)``: what the host makes of a config with these keys."""

    def run(overrides: dict[str, Any] | None = None, **keys: Any) -> Any:
        cfg = config(tiny_model, Path("rows.jsonl"), tmp_path / "out", **keys)
        return load_cfg(str(write_config(tmp_path / "config.yml", cfg)), **(overrides or {}))

    return run


UNKNOWN = [
    ({"rl_betta": 0.5}, "`rl_betta` is no key .*write `rl_beta`"),
    ({"sequence_length": 512}, "`sequence_length` .*write `sequence_len`"),
    ({"micro-batch-size": 2}, "`micro-batch-size` .*write `micro_batch_size`"),
    ({"frobnicate": 1}, "`frobnicate` is no key of Axolotl or of a plugin in use: remove it"),
    ({"liger_rope": True}, "`liger_rope`: keys of Axolotl's plugin axolotl.integrations.liger"),
    ({"trl": {"betta": 0.5}}, "`trl.betta` .*write `trl.beta`"),
    ({"rl_betta": 0.5, "max_length": 9}, "(?=.*`rl_betta`)(?=.*`max_length`)"),
    ({"val_set_size": -1}, "`val_set_size: -1` is wrong: write a number of rows"),
    ({"val_set_size": 1.5}, "`val_set_size: 1.5` is wrong"),
    ({"val_set_size": "many"}, "`val_set_size: many` is wrong"),
    ({"early_stopping_patience": 2}, "`early_stopping_patience` needs evaluations"),
    ({"aot_samples": 2}, "`aot_samples` needs evaluations: set `val_set_size`"),
    (
        {"aot_samples": 2, "val_set_size": 4, "eval_strategy": "no"},
        "`aot_samples` needs evaluations while it trains: set `evals_per_epoch`",
    ),
    ({"aot_samples": 2, "val_set_size": 4}, "`aot_samples` needs evaluations while it trains"),
    ({"aot_samples": -1, "val_set_size": 4}, "`aot_samples: -1` is wrong"),
    ({"aot_samples": True, "val_set_size": 4}, "`aot_samples: True` is wrong: write a number"),
    ({"aot_samples": 1.5, "val_set_size": 4}, "`aot_samples: 1.5` is wrong"),
    (
        {"curriculum_sampling": True, "shuffle_merged_datasets": True, "datasets": [{}, {}]},
        "`shuffle_merged_datasets: true` undoes `curriculum_sampling: true`",
    ),
]


@pytest.mark.parametrize(("keys", "said"), UNKNOWN, ids=lambda value: str(value)[:40])
def test_a_key_that_nobody_knows(keys: dict[str, Any], said: str, loaded: Any) -> None:
    if len(keys.get("datasets", [])) == 2:
        keys = {**keys, "datasets": [{"path": "r", "type": "chat_template.default"}] * 2}
    with pytest.raises(ValueError, match=said):
        loaded(**keys)


@pytest.mark.parametrize("key", FOREIGN)
def test_a_key_of_trl_gets_the_hosts_spelling(key: str, loaded: Any) -> None:
    said = r"write `aot_label_smoothing`" if key == "label_smoothing" else re.escape(FOREIGN[key])
    with pytest.raises(ValueError, match=f"`{key}` .*{said}"):
        loaded(**{key: 1})
    for spelling in re.findall(r"write `(\w+)", FOREIGN[key]):
        assert spelling in known_keys()


@pytest.mark.parametrize(
    ("keys", "instead"),
    [
        ({"dpo_loss_type": ["aot", "sft"]}, "aot_sft_weight: 1`"),
        ({"dpo_loss_type": ["aot", "sft"], "dpo_loss_weights": [1.0, 0.5]}, "aot_sft_weight: 0.5`"),
        ({"dpo_loss_type": ["sft", "aot"], "dpo_loss_weights": [0.2, 2]}, "aot_sft_weight: 0.1`"),
        ({"dpo_loss_type": ["aot"]}, "choose it with `aot_penalty`"),
        ({"dpo_loss_type": ["aot", "sft"], "dpo_loss_weights": [1]}, "`aot_penalty`"),
        ({"dpo_loss_type": "aot"}, "`aot_penalty`"),
    ],
)
def test_an_sft_loss_of_trl_is_named_as_ours(keys: dict[str, Any], instead: str) -> None:
    assert any(instead in line for line in refusals(keys))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"dpo_ld_alpha": 1.5}, "`dpo_ld_alpha: 1.5` is wrong: write a number from 0 to 1"),
        ({"dpo_ld_alpha": True}, "`dpo_ld_alpha: True` is wrong"),
        ({"dpo_ld_alpha": 0.5, "aot_mode": "unpaired"}, "write `aot_score: mean`, or remove it"),
        ({"dpo_ld_alpha": 0.5, "aot_score": "mean"}, "keep one of the two"),
        ({"dpo_ld_alpha": 0.5, "aot_sft_weight": 1}, "keep one of the two"),
        ({"aot_score": "average"}, "`aot_score: average` is wrong"),
    ],
)
def test_settings_of_lengths_that_contradict_each_other(
    keys: dict[str, Any], said: str, loaded: Any
) -> None:
    with pytest.raises(ValueError, match=said):
        loaded(**keys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"aot_mode": "paired"}, "pairs have none; write `aot_mode: unpaired`, or remove it"),
        ({"aot_mode": "unpaired", "curriculum_sampling": True}, "keep one of them"),
    ],
)
def test_balanced_labels_need_labels_and_an_order_of_their_own(
    keys: dict[str, Any], said: str, loaded: Any
) -> None:
    with pytest.raises(ValueError, match=f"`aot_draw: balanced` .*{said}"):
        loaded(aot_draw="balanced", **keys)


def test_two_values_of_beta_are_refused(loaded: Any) -> None:
    """Axolotl would take `trl.beta` and drop the other."""
    with pytest.raises(ValueError, match=r"`rl_beta: 0\.1` and `trl\.beta: 0\.5` are the same"):
        loaded(trl={"beta": 0.5})
    assert loaded(rl_beta="1e-1", trl={"beta": 0.1}).trl.beta == 0.1


MINIMIZED = {
    "eval_aot/violation_amount": False,
    "aot/second_order_violation_fraction": False,
    "eval_aot/nll": False,
    "eval_aot/dominance_amount": None,
    "eval_loss": None,
    None: None,
}


@pytest.mark.parametrize("metric", MINIMIZED)
def test_the_best_checkpoint_is_not_the_worst(metric: str | None, loaded: Any) -> None:
    """Transformers maximizes any metric whose name does not end in `loss`."""
    cfg = loaded(metric_for_best_model=metric, val_set_size=4)
    assert training_args(cfg).get("greater_is_better") is MINIMIZED[metric]
    cfg = loaded(metric_for_best_model=metric, val_set_size=4, greater_is_better=True)
    assert training_args(cfg)["greater_is_better"] is True


@pytest.mark.parametrize("optimizer", UPDATES_IN_BACKWARD)
def test_an_optimizer_without_a_step_is_refused(optimizer: str, loaded: Any) -> None:
    with pytest.raises(ValueError, match=f"`optimizer: {optimizer}` can't be used"):
        loaded(optimizer=optimizer)


@pytest.mark.parametrize("key", [*REFUSED_IF_ON, *(f"trl.{key}" for key in REFUSED_OF_TRL)])
def test_a_key_that_would_change_what_is_trained(key: str, loaded: Any) -> None:
    name, _, sub = key.partition(".")
    with pytest.raises(ValueError, match=f"`{key}` can't be used with `rl: aot`"):
        loaded(**{name: {sub: True} if sub else True})
    if key not in ("neftune_noise_alpha", "pretraining_dataset", "trl.ref_model_mixup_alpha"):
        loaded(**{name: {sub: False} if sub else False})  # (the host itself refuses those three)


def test_what_may_stand_in_a_config(loaded: Any) -> None:
    """Both names of renamed keys, what only holds anchors, flags of commands, empty keys."""
    keys = {"model_config": {"rope_theta": 1e4}, "x-common": {"a": 1}, "_entry": 2, ".base": 3}
    cfg = loaded({"debug": True, "shard": False}, **keys, hub_model_id=None, whatever=None)
    assert cfg.overrides_of_model_config == {"rope_theta": 1e4}
    assert loaded(overrides_of_model_config={"rope_theta": 1e4}).rl == "dpo"


def test_a_plugin_brings_its_keys(loaded: Any) -> None:
    plugins = ["axolotl.integrations.liger.LigerPlugin"]
    cfg = loaded(plugins=plugins, liger_rope=False)
    assert cfg.liger_rope is False
    assert loaded(use_scattermoe=False).rl == "dpo"  # off, of a plugin that is not in use


def test_another_rl_is_left_alone(loaded: Any) -> None:
    assert loaded(rl="dpo", rl_betta=0.5, beta=0.1, neftune_noise_alpha=5).rl_betta is None


def test_the_validated_config_validates_again(loaded: Any, tmp_path: Path) -> None:
    """What the host writes down of a run holds keys that are in no schema."""
    cfg = loaded(rl_beta=0.3)
    written = json.loads(json.dumps(cfg.to_dict(), default=str))
    assert written.keys() - known_keys()
    del written["batch_size"]  # the host takes it or the accumulation
    path = write_config(tmp_path / "again.yml", written)
    assert load_cfg(str(path)).rl_beta == 0.3


def test_keys_without_effect_are_named_in_one_line(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: told.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("axolotl.aot_plugin.config"), "handlers", [handler])
    loaded(train_on_inputs=False, lora_dropout=0.0, group_by_length=False, trl={"beta": 0.1})
    assert told == []
    loaded(train_on_inputs=True, lora_dropout=0.1, trl={"num_generations": 4}, max_prompt_len=9)
    (line,) = told
    for key in ("train_on_inputs", "lora_dropout", "trl.num_generations", "max_prompt_len"):
        assert f"`{key}`" in line
    loaded(rl="dpo", train_on_inputs=True)
    assert len(told) == 1
    # A plugin of one config stays for those of later tests otherwise.
    manager = PluginManager.get_instance()
    monkeypatch.setattr(manager, "plugins", manager.plugins.copy())
    plugins = ["axolotl.integrations.swanlab.SwanLabPlugin"]
    loaded(plugins=plugins, swanlab_log_completions=True, use_swanlab=False)
    assert "`swanlab_log_completions` (no trainer logs the completions" in told[1]
    assert "`aot_samples`" in told[1]


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
@pytest.mark.slow
def test_rows_arrive_in_their_order(
    mode: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files, one after the other, each line once; and not without the key."""
    from aot_plugin.step.record import watched_steps

    def lengths(step: Any) -> list[int]:
        """Of the prompts' rows: the responses are of one length, chosen ones come first."""
        per_batch = len(step.sequences) // step.micro_batches
        rows = per_batch // (2 if mode == "paired" else 1)
        starts = range(0, len(step.sequences), per_batch)
        return [len(ids) for start in starts for ids in step.sequences[start : start + rows]]

    lines = [row_of_length(n, mode) for n in range(16)]
    files = [write_rows(tmp_path / f"{i}.jsonl", lines[8 * i : 8 * i + 8]) for i in range(2)]
    kind = "chat_template.default" if mode == "paired" else "chatml.ultra"
    entry = {"ds_type": "json", "split": "train", "type": kind}
    keys: dict[str, Any] = {"aot_mode": mode, "max_steps": 2, "dataset_num_proc": 0}
    keys |= {"datasets": [{**entry, "path": str(file)} for file in files]}
    for in_order in (True, False):
        with watched_steps() as steps:
            out = tmp_path / "out"
            train(config(tiny_model, files[0], out, **keys, curriculum_sampling=in_order))
        order = [length for step in steps for length in lengths(step)]
        assert len(order) == 16
        assert (order == sorted(order)) == in_order


def row_of_length(n: int, mode: str) -> dict[str, Any]:
    prompt = " ".join(["apple"] * (n + 1))
    if mode == "unpaired":
        return {"prompt": prompt, "completion": "river", "label": n % 2 == 0}
    return {
        "messages": [{"role": "user", "content": prompt}],
        "chosen": {"role": "assistant", "content": "river"},
        "rejected": {"role": "assistant", "content": "stone"},
    }


@pytest.mark.slow
def test_a_number_of_rows_held_out_and_early_stopping(tiny_model: Path, tmp_path: Path) -> None:
    """The best checkpoint by a metric of ours; a run that can't improve stops early."""
    from harness import paired_rows

    data = write_rows(tmp_path / "rows.jsonl", paired_rows(40))
    keys: dict[str, Any] = {"val_set_size": 8, "eval_steps": 1, "max_steps": 8, "save_steps": 1}
    keys |= {"early_stopping_patience": 2, "learning_rate": 1e-12, "dataset_num_proc": 0}
    keys |= {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True}
    run = train(config(tiny_model, data, tmp_path / "out", **keys))
    assert len(run.logged("loss")) < 8
    with pytest.raises(ValueError, match="`val_set_size: 40` leaves none of 40 rows"):
        train(config(tiny_model, data, tmp_path / "out", **{**keys, "val_set_size": 40}))
