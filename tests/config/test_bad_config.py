"""Malformed configs through the host's own validation: a valid config, or an error that names the
key."""

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.cli.config import load_cfg
from harness import config, write_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aot_plugin.config import AOTInputArgs
from aot_plugin.host.keys import REFUSED

KEYS = sorted(set(AOTInputArgs.model_fields) - {"aot_datasets"})

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        "paired unpaired pair hard soft step micro_batch logistic squared_hinge transport dpo "
        "0.1 1e-1 -1 .nan true yes off null ~ Paired HARD".split()
    ),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=2),
    st.dictionaries(st.text(max_size=3) | st.integers(), SCALARS, max_size=2),
)
MANY = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def validated(tiny_model: Path, tmp_path: Path) -> Any:
    """``validated(**keys)``: what the host makes of a config with these keys."""

    def run(**keys: Any) -> Any:
        cfg = config(tiny_model, Path("rows.jsonl"), tmp_path / "out", **keys)
        path = write_config(tmp_path / "config.yml", {k: v for k, v in cfg.items() if v != "DROP"})
        return load_cfg(str(path))

    return run


def effective(key: str, value: Any) -> Any:
    """What a value in the YAML is documented to mean; an exception for what it can't mean."""
    allowed: dict[str, tuple[Any, ...]] = {
        "aot_mode": ("paired", "unpaired"),
        "aot_sort": ("hard", "soft"),
        "aot_batch": ("step", "micro_batch"),
        "aot_draw": ("proportional", "balanced"),
        "aot_penalty": ("logistic", "squared_hinge", "least_squares"),
        "aot_loss": ("transport",),
        "aot_order": ("first", "second"),
        "aot_score": ("sum", "mean"),
    }
    if value is None:
        return None
    if key in allowed:
        assert isinstance(value, str) and value in allowed[key]
        return value
    if key == "aot_grades":
        assert isinstance(value, list) and value
        assert all(type(item) in (int, float) and abs(item) < float("inf") for item in value)
        assert value == sorted(set(value))
        return value
    if key == "aot_report":
        if isinstance(value, str):
            yes, no = ("true", "yes", "on", "1", "t", "y"), ("false", "no", "off", "0", "f", "n")
            assert value.lower() in yes + no
            return value.lower() in yes
        assert isinstance(value, int | float) and value in (0, 1)
        return bool(value)
    assert not isinstance(value, bool)
    number = float(value)
    if key == "aot_samples":
        assert number >= 0 and number.is_integer()
        return value if isinstance(value, int) else int(number)
    if key == "aot_sort_epsilon":
        assert 0 < number < float("inf")
    else:
        assert 0 <= number < (0.5 if key == "aot_label_smoothing" else float("inf"))
    return number


@pytest.mark.slow
@MANY
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_value_of_our_keys(key: str, value: Any, validated: Any) -> None:
    rated = {"path": "rows.jsonl", "ds_type": "json", "type": "chat_template.default"}
    needed = {
        "aot_sort_epsilon": {"aot_sort": "soft"},
        "aot_samples": {"val_set_size": 2, "eval_steps": 1},
        "aot_draw": {"aot_mode": "unpaired", "remove_unused_columns": None},
        "aot_grades": {"aot_mode": "unpaired", "datasets": [rated]},
    }
    keys = needed.get(key, {})
    value = yaml.safe_load(yaml.safe_dump(value))  # what the YAML holds
    try:
        expected = effective(key, value)
    except (AssertionError, KeyError, TypeError, ValueError):
        with pytest.raises(ValueError, match=f"`{key}"):
            validated(**keys, **{key: value})
    else:
        cfg = validated(**keys, **{key: value})
        assert expected is None or cfg[key] == expected


@pytest.mark.slow
@MANY
@given(key=st.sampled_from(KEYS), seed=st.integers(0, 10**6))
def test_a_misspelt_key_is_never_ignored(key: str, seed: int, validated: Any) -> None:
    rng = random.Random(seed)
    at = rng.randrange(len(key))
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz_-")
    misspelt = rng.choice(
        [
            key[:at] + key[at + 1 :],
            key[:at] + letter + key[at:],
            key[:at] + letter + key[at + 1 :],
            key[:at] + key[at : at + 2][::-1] + key[at + 2 :],
            key.replace("_", "-"),
            key.replace("_", ""),
            key.upper(),
            key.title(),
        ]
    )
    if misspelt in KEYS:
        return
    value = {"aot_mode": "unpaired", "aot_penalty": "least_squares"}.get(key, "soft")
    with pytest.raises(ValueError, match=f"`{misspelt}`.*aot_"):
        validated(**{misspelt: value})


@pytest.mark.slow
@MANY
@given(
    key=st.sampled_from(
        [
            *("rl_beta", "trl", "datasets", "test_datasets", "rl", "remove_unused_columns"),
            *("context_parallel_size", "tensor_parallel_size"),
            *REFUSED,
        ]
    ),
    value=VALUES,
    mode=st.sampled_from(["paired", "unpaired"]),
)
def test_any_value_of_the_hosts_keys_that_we_read(
    key: str, value: Any, mode: str, validated: Any
) -> None:
    """No exception but one that a user can act on."""
    try:
        validated(aot_mode=mode, **{key: value})
    except ValueError as error:  # pydantic's is one
        named = {"rl": ("rl", "aot_mode")}.get(key, (key, key.split("_")[0]))
        assert any(name in str(error) for name in named), error


CLASHES: list[tuple[dict[str, Any], str]] = [
    ({"rl": "dpo", "aot_penalty": "logistic"}, r"`aot_penalty` is an option of `rl: aot`"),
    ({"rl": "DROP", "aot_mode": "paired"}, r"`aot_mode` is an option of `rl: aot`"),
    ({"rl": "AOT"}, r"`rl: AOT`.*`rl: aot`"),
    ({"rl": "aot_unpaired"}, r"`rl: aot_unpaired`.*`rl: aot`.*`aot_mode: unpaired`"),
    ({"rl": "aot_pair"}, r"`rl: aot_pair`.*`rl: aot`.*`aot_mode: paired`"),
    ({"trl": {"beta": True}}, r"`trl\.beta: True`"),
    ({"trl": 3}, r"`trl: 3`"),
    ({"rl_beta": "much"}, r"`rl_beta: much`"),
    ({"rl_beta": [0.1]}, r"`rl_beta: \[0\.1\]`"),
    ({"aot_sort_epsilon": 0.1}, r"`aot_sort_epsilon` needs `aot_sort: soft`"),
    ({"aot_sort": "hard", "aot_sort_epsilon": 0.1}, r"`aot_sort_epsilon` needs `aot_sort: soft`"),
    ({"aot_mode": "unpaired", "datasets": "rows.jsonl"}, r"`datasets: rows"),
    ({"aot_mode": "unpaired", "datasets": ["rows.jsonl"]}, r"`datasets\[0\]`"),
    ({"aot_mode": "unpaired", "datasets": {"path": "rows.jsonl"}}, r"`datasets: .*list"),
    ({"aot_mode": "unpaired", "datasets": 7}, r"`datasets: 7`"),
    ({"aot_mode": "unpaired", "test_datasets": [None]}, r"`test_datasets\[0\]`"),
    (
        {"aot_mode": "unpaired", "datasets": [{"path": "r", "type": "chat_template.defualt"}]},
        r"`datasets\[0\]\.type: chat_template\.defualt`",
    ),
    (
        {"aot_mode": "unpaired", "datasets": [{"type": "chat_template.default"}]},
        r"`datasets\[0\]\.path`",
    ),
    ({"trainer_cls": "aot_plugin.trainer.AOTPairedTrainer"}, r"`trainer_cls`"),
    ({"rl": "dpo", "trainer_cls": "aot_plugin.trainer.AOTPairedTrainer"}, r"`trainer_cls.*rl: aot"),
    ({"datasets": [{"path": "r", 7: "x"}]}, r"`datasets\[0\]`"),
    ({"datasets": False}, r"`datasets: False`"),
    ({7: "x"}, r"`7`"),
    ({True: "x"}, r"`True`"),
]


@pytest.mark.parametrize(("keys", "said"), CLASHES, ids=lambda value: str(value)[:50])
def test_clashes(keys: dict[Any, Any], said: str, validated: Any, tmp_path: Path) -> None:
    cfg = config(Path("tiny"), Path("rows.jsonl"), tmp_path / "out") | keys
    path = write_config(tmp_path / "c.yml", {k: v for k, v in cfg.items() if v != "DROP"})
    with pytest.raises(ValueError, match=said):
        load_cfg(str(path))


def test_scientific_notation_is_a_number(validated: Any) -> None:
    """YAML 1.1 reads `1e-2` as a string; the host takes it for a number, and so do we."""
    assert validated(rl_beta="1e-2").rl_beta == 0.01


def test_no_key_of_the_host_looks_like_one_of_ours() -> None:
    from axolotl.utils.schemas.config import AxolotlInputConfig

    from aot_plugin.config import misspelt

    # A contradiction with advice of its own, which goes first.
    near = {key for key in AxolotlInputConfig.model_fields if misspelt(key)}
    assert near <= set(REFUSED)
