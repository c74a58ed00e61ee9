"""Every file in example_configs/: accepted by the host as a GPU machine would, no key without
effect, and run here on a tiny model of the same architecture."""

import copy
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.cli.utils.train import generate_config_files
from axolotl.integrations.config import merge_input_args
from axolotl.prompt_strategies.dpo import load as load_dpo
from axolotl.prompt_strategies.kto import load as load_kto
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from example_rows import DATASETS, write_dataset
from harness import Run, train
from tiny_models import FAMILIES, make_tiny

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "example_configs"
SWEEP = EXAMPLES / "aot_sweep.yml"
SWEPT = EXAMPLES / "aot_merlinite.yml"
CONFIGS = sorted(path for path in EXAMPLES.glob("*.yml") if path != SWEEP)
SEVEN_B = [path for path in CONFIGS if path.name.startswith("aot_")]
each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)

SEVERAL_GPUS = ("deepspeed", "fsdp_config")
RENAMED = {"model_type": "type_of_model"}
"""Keys that the host's validation stores under another name."""


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def n_gpu(written: Mapping[str, Any]) -> int:
    return 8 if any(key in written for key in SEVERAL_GPUS) else 1


def validated(written: Mapping[str, Any], compute_capability: str = "sm_90") -> DictDefault:
    """What the host's ``load_cfg`` makes of a config, on a machine with GPUs."""
    cfg = DictDefault(copy.deepcopy(dict(written)))
    prepare_plugins(cfg)
    return validate_config(
        cfg,
        capabilities={
            "bf16": True,
            "fp8": compute_capability == "sm_90",
            "tf32": True,
            "n_gpu": n_gpu(written),
            "compute_capability": compute_capability,
        },
        env_capabilities={"torch_version": "2.14.1"},
    )


def lost_keys(written: Any, kept: Any, at: str = "") -> Iterator[str]:
    """Where the host dropped or changed what the YAML says."""
    if isinstance(written, Mapping):
        for key, value in written.items():
            if value is not None:
                name = RENAMED.get(key, key) if not at else key
                yield from lost_keys(value, (kept or {}).get(name), f"{at}.{key}".lstrip("."))
    elif isinstance(written, Sequence) and not isinstance(written, str):
        for index, value in enumerate(written):
            yield from lost_keys(value, kept[index] if kept else None, f"{at}[{index}]")
    elif written != kept and not (written == "auto" and kept is not None):
        yield at


def dead_keys(written: Mapping[str, Any]) -> set[str]:
    """Keys of a config without effect. (A `datasets:` entry of ours is rewritten, and refused if it
    has an unknown key: only those of the host's types are looked at.)"""
    kept = validated(written)
    schema, _ = merge_input_args()
    fields = schema.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    plain = {k: v for k, v in written.items() if k not in ("rl", "datasets", "test_datasets")}
    dead = {key for key in written if key not in known} | set(lost_keys(plain, kept))
    for where in ("datasets", "test_datasets"):
        for index, entry in enumerate(written.get(where) or []):
            if not str(kept[where][index]["type"]).startswith("aot_plugin."):
                dead |= set(lost_keys(entry, kept[where][index], f"{where}[{index}]"))
    return dead


def strategies(cfg: DictDefault) -> Iterator[Any]:
    """The host's loader applied to every entry: None for a type that it can't resolve."""
    loader: Callable[..., Any] = load_kto if cfg.rl == "kto" else load_dpo
    for where in ("datasets", "test_datasets"):
        for index, entry in enumerate(cfg[where] or []):
            yield loader(entry["type"], cfg, dataset_idx=index)


@pytest.fixture(autouse=True)
def in_repository_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs name other files relative to it."""
    monkeypatch.chdir(ROOT)


@each_config
@pytest.mark.parametrize("compute_capability", ["sm_80", "sm_90"])
def test_the_host_accepts_it(path: Path, compute_capability: str) -> None:
    written = load(path)
    cfg = validated(written, compute_capability)
    assert written["rl"] == "aot"
    assert cfg.rl == ("kto" if written["aot_mode"] == "unpaired" else "dpo")
    assert cfg.trainer_cls.startswith("aot_plugin.trainer.AOT")


@each_config
def test_no_key_is_dead(path: Path) -> None:
    assert dead_keys(load(path)) == set()


def test_dead_keys_are_found() -> None:
    written = load(EXAMPLES / "aot_merlinite_fsdp2.yml")
    written["fsdp_config"]["shard"] = True
    assert dead_keys(written) == {"fsdp_config.shard"}
    with pytest.raises(ValueError, match=r"`lora_rank` .*write `lora_r`"):
        validated({**written, "lora_rank": 8})
    written["datasets"][0]["field_prmpt"] = "prompt"
    with pytest.raises(ValueError, match=r"`datasets\[0\].field_prmpt` is not an option"):
        validated(written)


@each_config
def test_the_host_resolves_the_strategies(path: Path) -> None:
    resolved = list(strategies(validated(load(path))))
    assert resolved
    assert None not in resolved


def test_unknown_strategies_are_refused() -> None:
    written = load(SWEPT)
    written["datasets"][0]["type"] = "chat_template.argila_chat"
    with pytest.raises(ValueError, match="argila_chat` is not a strategy for paired"):
        validated(written)


@each_config
def test_the_effective_batch_in_the_comments_is_true(path: Path) -> None:
    written = load(path)
    claims = re.findall(
        r"(\d+) x (\d+)(?: x (\d+) GPUs)? = (\d+) (pairs|responses)", path.read_text()
    )
    assert claims
    micro, accumulation, gpus, product, unit = claims[0]
    assert (int(micro), int(accumulation), int(gpus or 1)) == (
        written["micro_batch_size"],
        written["gradient_accumulation_steps"],
        n_gpu(written),
    )
    assert int(micro) * int(accumulation) * int(gpus or 1) == int(product)
    assert unit == ("responses" if written["aot_mode"] == "unpaired" else "pairs")


def test_every_combination_of_the_sweep() -> None:
    seen = set()
    for name, is_group in generate_config_files(str(SWEPT), str(SWEEP)):
        written = load(Path(name))
        os.unlink(name)
        assert is_group
        assert dead_keys(written) == set()
        seen.add((written["aot_penalty"], written["rl_beta"], written["learning_rate"]))
        assert Path(written["output_dir"]).parent == Path(load(SWEPT)["output_dir"])
    sweep = load(SWEEP)
    expected = {
        (pair["aot_penalty"], pair["rl_beta"], rate)
        for pair in sweep["_"]
        for rate in sweep["learning_rate"]
    }
    assert seen == expected


def test_the_readme_lists_every_file() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    listed = {name for line in readme.splitlines() for name in re.findall(r"`(\w+\.yml)`", line)}
    assert listed == {path.name for path in EXAMPLES.glob("*.yml")}


def test_the_first_config_of_the_main_readme() -> None:
    block = re.search(r"```yaml\n(base_model.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    written = yaml.safe_load(block[1])
    validated(written)
    assert dead_keys(written) == set()
    # Whatever it says of the model is tried there.
    tried = load(SWEPT)
    sizes = {"micro_batch_size", "gradient_accumulation_steps"}
    assert {k: v for k, v in written.items() if k not in sizes} == {
        k: tried[k] for k in written if k not in sizes
    }
    assert set(tried) - set(written) >= {"bf16", "output_dir", "lora_dropout"}


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_json(stage: int) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = load(EXAMPLES / f"aot_merlinite_zero{stage}.yml")
    written = json.loads(Path(config["deepspeed"]).read_text())
    # The trainer fills in the values that say `auto`.
    explicit = {k: v for k, v in written["zero_optimization"].items() if v != "auto"}
    zero = DeepSpeedZeroConfig(**explicit)  # refuses unknown keys
    assert zero.stage == stage
    assert set(written["zero_optimization"]) <= set(DeepSpeedZeroConfig.model_fields) | {
        field.alias for field in DeepSpeedZeroConfig.model_fields.values()
    }


# The configs in small.


def shrunk(written: Mapping[str, Any], model: Path, data: Path, out: Path) -> dict[str, Any]:
    """The same config for one process without a GPU; every key that is not named here stays."""
    cfg = {k: v for k, v in copy.deepcopy(dict(written)).items() if k not in SEVERAL_GPUS}
    for where in ("datasets", "test_datasets"):
        for entry in cfg[where]:
            entry["path"] = str(data / entry["path"])
    return {
        **cfg,
        "base_model": str(model),
        "max_steps": 2,
        "learning_rate": 0.001,
        "warmup_ratio": 0.0,
        "output_dir": str(out / "run"),
        "dataset_prepared_path": str(out / "prepared"),
        "attn_implementation": "sdpa",
        "bf16": False,
        "fp16": False,
        "tf32": None,
        "dataset_num_proc": 0,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


@pytest.fixture(scope="session")
def local_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    for name in DATASETS:
        write_dataset(folder / name, name)
    return folder


@pytest.fixture(scope="session")
def local_models(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        make_tiny(name, smollm2, folder / name)
    return folder


@pytest.fixture
def differentiable_4bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes on a CPU with AVX512-BF16 repacks the 4-bit weights in the first forward pass of
    an evaluation, for a kernel without a backward pass, and never unpacks them for training."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes two folders of one name and layout for one data set, whatever is in them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.slow
@pytest.mark.usefixtures("differentiable_4bit", "own_datasets_cache")
@pytest.mark.parametrize("path", SEVEN_B, ids=lambda path: path.stem)
def test_it_runs_in_small(path: Path, local_data: Path, local_models: Path, tmp_path: Path) -> None:
    written = load(path)
    run = train(shrunk(written, local_models / written["base_model"], local_data, tmp_path))
    rows = written["micro_batch_size"] * written["gradient_accumulation_steps"]
    for key in ("loss", "grad_norm", "eval_loss", "eval_aot/violation_fraction"):
        values = run.logged(key)
        assert values, key
        assert all(math.isfinite(value) for value in values), key
    assert len(run.logged("loss")) == 2
    assert min(run.logged("grad_norm")) > 0
    u, v = run.logged("aot/sorted_u")[0], run.logged("aot/sorted_v")[0]
    if written["aot_mode"] == "paired":
        assert u == v == rows
    else:
        assert u + v == rows
        assert min(u, v) > 0
    assert_trained(run, written)


def assert_trained(run: Run, written: Mapping[str, Any]) -> None:
    names = set(run.parameters)
    if "adapter" not in written:
        assert "model.embed_tokens.weight" in names
        return
    moved = {name: p.abs().max().item() for name, p in run.parameters.items() if "lora_B" in name}
    assert len(moved) == 14  # seven linear layers in each of two blocks
    assert min(moved.values()) > 0
    rank = next(p.shape[0] for name, p in run.parameters.items() if "lora_A" in name)
    assert rank == written["lora_r"]
