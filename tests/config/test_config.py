"""The YAML surface: what it becomes, what is refused, and that the host takes it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from axolotl.cli.config import load_cfg, prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from harness import config, write_config

from aot_plugin.config import (
    PAIRED_TRAINER,
    UNPAIRED_TRAINER,
    AOTInputArgs,
    AOTOptions,
    desugar,
    training_args,
)
from aot_plugin.host.keys import REFUSED

UNTOUCHED = [{"path": "rows.jsonl", "type": "chatml.ultra"}]


def aot(**keys: Any) -> dict[str, Any]:
    return {"rl": "aot", "datasets": UNTOUCHED, **keys}


def test_paired_is_the_default_and_becomes_dpo() -> None:
    updates = desugar(aot())
    assert updates["rl"] == "dpo"
    assert updates["trainer_cls"] == PAIRED_TRAINER
    assert updates["rl_beta"] == 0.01
    assert updates["aot_penalty"] == "logistic"
    assert updates["aot_batch"] == "step"


def test_unpaired_becomes_kto() -> None:
    updates = desugar(aot(aot_mode="unpaired"))
    assert updates["rl"] == "kto"
    assert updates["trainer_cls"] == UNPAIRED_TRAINER
    assert updates["remove_unused_columns"] is False
    (entry,) = updates["datasets"]
    assert {key: getattr(entry, key) for key in UNTOUCHED[0]} == UNTOUCHED[0]


def test_desugaring_twice_changes_nothing() -> None:
    cfg = aot(aot_penalty="least_squares")
    once = cfg | desugar(cfg)
    assert desugar(once) == {}


def test_a_config_saved_by_an_earlier_release_gets_the_options_that_it_lacks() -> None:
    cfg = aot(aot_mode="unpaired")
    once = cfg | desugar(cfg)
    del once["aot_draw"]
    assert desugar(once) == {"aot_draw": "proportional"}


@pytest.mark.parametrize("rl", ["dpo", "kto", "orpo", None])
def test_another_rl_is_left_alone(rl: str | None) -> None:
    assert desugar({"rl": rl, "rl_beta": 0.3, "datasets": UNTOUCHED}) == {}


def test_a_given_beta_is_kept() -> None:
    assert "rl_beta" not in desugar(aot(rl_beta=0.3))
    assert "rl_beta" not in desugar(aot(trl={"beta": 0.3}))


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"aot_mode": "both"}, ["aot_mode", "'paired'", "'unpaired'"]),
    ({"aot_penalty": "hinge"}, ["aot_penalty", "hinge", "squared_hinge", "least_squares"]),
    ({"aot_penalty": 3}, ["aot_penalty", "3"]),
    ({"aot_loss": "dpo"}, ["aot_loss", "transport"]),
    ({"aot_sort": "medium"}, ["aot_sort", "'hard'", "'soft'"]),
    ({"aot_sort": "soft", "aot_sort_epsilon": -1}, ["aot_sort_epsilon", "greater than 0"]),
    ({"aot_sort": "soft", "aot_sort_epsilon": float("inf")}, ["aot_sort_epsilon"]),
    ({"aot_sort_epsilon": 0.1}, ["aot_sort_epsilon", "aot_sort: soft"]),
    ({"aot_label_smoothing": 0.5}, ["aot_label_smoothing", "less than 0.5"]),
    ({"aot_label_smoothing": "much"}, ["aot_label_smoothing", "number"]),
    ({"aot_batch": "epoch"}, ["aot_batch", "'step'", "'micro_batch'"]),
    ({"aot_report": "perhaps"}, ["aot_report", "boolean"]),
    ({"aot_penalti": "logistic"}, ["aot_penalti", "not an option", "aot_penalty"]),
    ({"aot_datasets": {}}, ["aot_datasets"]),
    ({"rl_beta": -0.1}, ["rl_beta", "positive"]),
    ({"rl_beta": 0}, ["rl_beta", "positive"]),
    ({"rl_beta": "much"}, ["rl_beta", "positive number"]),
    ({"rl_beta": True}, ["rl_beta", "positive number"]),
    ({"rl_beta": float("nan")}, ["rl_beta", "positive number"]),
    ({"trl": {"beta": -1}}, ["trl.beta", "positive"]),
    ({"context_parallel_size": 2}, ["context_parallel_size", "data parallelism"]),
    ({"tensor_parallel_size": 2}, ["tensor_parallel_size", "data parallelism"]),
    ({"aot_mode": "unpaired", "remove_unused_columns": True}, ["remove_unused_columns", "labels"]),
    ({"adapter": "qlora"}, ["adapter: qlora", "no layer", "lora_target_linear: true"]),
]


@pytest.mark.parametrize(("keys", "said"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_value_is_refused_by_name(keys: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        desugar(aot(**keys))
    for words in said:
        assert words in str(error.value)


@pytest.mark.parametrize("key", REFUSED)
def test_a_host_key_that_contradicts_is_refused_with_advice(key: str) -> None:
    with pytest.raises(ValueError, match=f"`{key}`.*{REFUSED[key][:10]}"):
        desugar(aot(**{key: 1}))


@pytest.mark.parametrize("key", [k for k in AOTInputArgs.model_fields if k != "aot_datasets"])
def test_an_aot_key_needs_rl_aot(key: str) -> None:
    with pytest.raises(ValueError, match=f"`{key}` is an option of `rl: aot`"):
        desugar({"rl": "dpo", key: "x"})


def test_inference_ignores_the_options() -> None:
    """`axolotl inference` calls the training config with `rl` set to None."""
    assert desugar({"rl": None, "inference": True, "aot_mode": "unpaired"}) == {}


def test_every_option_is_an_input_with_the_documented_default() -> None:
    for key, default in vars(AOTOptions()).items():
        description = AOTInputArgs.model_fields[key].json_schema_extra["description"]
        shown = (
            "true" if default is True else f"{default:g}" if isinstance(default, float) else default
        )
        assert f"Default `{shown}`" in description or f"Default {shown}." in description


@pytest.fixture
def yaml_path(tmp_path: Path) -> Path:
    return tmp_path / "config.yml"


def load(path: Path, **keys: Any) -> Any:
    cfg = config(Path("tiny"), Path("rows.jsonl"), path.parent / "out", **keys)
    return load_cfg(str(write_config(path, cfg)))


@pytest.mark.parametrize(
    "plugins",
    [None, ["aot_plugin.AOTPlugin"], ["aot_plugin.plugin.AOTPlugin"], ["aot_plugin:AOTPlugin"]],
)
def test_the_host_validates_it_however_the_plugin_is_named(
    plugins: list[str] | None, yaml_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    keys = {} if plugins is None else {"plugins": plugins}
    cfg = load(yaml_path, base_model=str(tiny_model), aot_mode="unpaired", **keys)
    assert (cfg.rl, cfg.trainer_cls, cfg.aot_mode) == ("kto", UNPAIRED_TRAINER, "unpaired")
    args = training_args(cfg)
    assert args["loss_type"] == "apo_zero_unpaired"
    assert args["max_length"] == 256
    assert args["train_sampling_strategy"] == "random"
    assert training_args({**cfg, "curriculum_sampling": True})["train_sampling_strategy"] == (
        "sequential"
    )


def test_an_error_leaves_the_users_keys(yaml_path: Path, tiny_model: Path) -> None:
    from aot_plugin.plugin import AOTPlugin

    cfg = aot(aot_penalty="squared_hinge")
    before = dict(cfg)
    plugin = AOTPlugin()
    plugin.register(cfg)
    assert cfg["rl"] == "dpo"
    plugin.on_config_validation_error(cfg)
    assert cfg == before


@pytest.mark.parametrize("kind", ["chatml.default", "chat_template.default"])
def test_a_worker_of_ray_validates_again(
    kind: str, yaml_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the validated config as a dictionary; no key of an entry must get lost there."""
    monkeypatch.chdir(tiny_model.parent)
    entry = {"path": "rows.jsonl", "ds_type": "json", "type": kind}
    entry |= {"field_weight": "trust", "weight": 2.5, "shards": 2}
    driver = load(yaml_path, datasets=[entry])
    worker = DictDefault(driver.to_dict() | {"batch_size": None})
    prepare_plugins(worker)
    worker = validate_config(worker)
    assert [dict(e) for e in worker.datasets] == [dict(e) for e in driver.datasets]
    assert (worker.datasets[0].weight, worker.datasets[0].ds_type) == (2.5, "json")


def test_a_flag_that_the_hosts_command_swallows_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from aot_plugin.plugin import AOTPlugin

    monkeypatch.setattr(sys, "argv", ["/bin/axolotl", "train", "x.yml", "--aot-mode", "unpaired"])
    with pytest.raises(ValueError, match=r"--aot-mode.*python -m axolotl.cli.train"):
        AOTPlugin().register(aot())
    argv = ["/bin/axolotl", "train", "x.yml", "--rl_beta=0.5"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(ValueError, match=r"does not pass `--rl_beta` .*: write `--rl-beta`"):
        AOTPlugin().register(aot())
    for fine in ("--rl-beta=0.5", "--num_processes=2"):
        monkeypatch.setattr(sys, "argv", [*argv[:3], fine, "--", "--rl_beta=0.5"])
        AOTPlugin().register(aot())


def test_an_adapter_to_merge_has_its_own_layers() -> None:
    """The host's command says where it is only once the config is validated."""
    lora = aot(adapter="lora", lora_r=8)
    assert desugar(lora | {"merge_lora": True})["rl"] == "dpo"
    with pytest.raises(ValueError, match="adapts no layer"):
        desugar(lora)


@pytest.mark.slow
def test_importing_the_plugin_brings_in_nothing_new() -> None:
    """Beyond what the host has imported when it looks for plugins, only our own light modules."""
    code = (
        "import sys, axolotl.utils.config, axolotl.integrations.base\n"
        "before = set(sys.modules)\n"
        "import aot_plugin; aot_plugin.AOTPlugin().register({'rl': 'dpo'})\n"
        "import aot_plugin.config\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    new = out.stdout.strip().splitlines()[-1]
    light = (
        "config",
        "digests",
        "entry_type",
        "host",
        "host.adapter_keys",
        "host.compat",
        "plugin",
    )
    ours = ["aot_plugin", *(f"aot_plugin.{name}" for name in light)]
    assert new == str(ours)


def test_a_host_that_was_never_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    from aot_plugin.host import compat

    compat.refuse_untested_releases()
    monkeypatch.setattr(
        compat, "version", lambda package: {"axolotl": "0.22.0", "trl": "1.9"}[package]
    )
    with pytest.raises(
        RuntimeError, match=r"axolotl>=0.19,<0.22, and 0.22.0 is installed.*=1 to try"
    ):
        compat.refuse_untested_releases()
    monkeypatch.setenv(compat.ANYWAY, "1")
    compat.refuse_untested_releases()
