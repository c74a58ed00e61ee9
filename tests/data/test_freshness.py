"""Prepared rows whose sources have changed are prepared anew, and only those."""

import importlib
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from harness import config, paired_rows, unpaired_rows, write_config, write_rows
from transformers import AutoTokenizer

from aot_plugin.data.freshness import _module, load_fresh, local_files, sources_file
from aot_plugin.data.loading import COUNTS_FILE, load_datasets
from aot_plugin.data.options import ConversationOptions
from aot_plugin.data.rows import PromptStrategy

TOLD = "prepared anew"

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A tokenizer of this test's own, to be edited; the weights are not read."""
    path = tmp_path / "model"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    (path / "config.json").write_text((tiny_model / "config.json").read_text())
    return path


@pytest.fixture
def prepared(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``prepared(**keys)``: the rows that the host's command would train on."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    told: list[str] = []
    monkeypatch.setattr(
        "aot_plugin.data.freshness.LOG.warning", lambda text, *args: told.append(text % args)
    )

    def run(preprocess: bool = False, **keys: Any) -> list[dict[str, Any]]:
        cfg = config(model, tmp_path / "rows.jsonl", tmp_path / "out", dataset_num_proc=0, **keys)
        cfg = load_cfg(str(write_config(tmp_path / "config.yml", cfg)), is_preprocess=preprocess)
        run.cfg = cfg
        return PluginManager.get_instance().load_datasets(cfg, preprocess).train_dataset.to_list()

    run.told = told
    return run


def folder(prepared: Any) -> Path:
    (path,) = (p.parent for p in Path(prepared.cfg.dataset_prepared_path).glob("*/state.json"))
    return path


def edit(path: Path, *change: str) -> None:
    """In place, like an editor; so small files that the clock may not have moved."""
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))


def rows_file(tmp_path: Path, mode: str = "paired", seed: int = 0) -> Path:
    rows = unpaired_rows(12, seed) if mode == "unpaired" else paired_rows(12, seed)
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_an_edited_data_file(mode: str, prepared: Any, tmp_path: Path) -> None:
    rows_file(tmp_path, mode)
    before = prepared(aot_mode=mode)
    made = folder(prepared).stat().st_ino
    os.utime(tmp_path / "rows.jsonl")  # touched, and what it was
    assert prepared(aot_mode=mode) == before
    assert folder(prepared).stat().st_ino == made and prepared.told == []  # reused
    data = rows_file(tmp_path, mode, seed=1)
    after = prepared(aot_mode=mode)
    assert after != before
    assert len(prepared.told) == 1
    assert f"{data} has changed" in prepared.told[0] and TOLD in prepared.told[0]
    assert prepared(aot_mode=mode) == after and len(prepared.told) == 1
    assert (folder(prepared) / COUNTS_FILE).exists()


def test_an_edited_chat_template(prepared: Any, model: Path, tmp_path: Path) -> None:
    rows_file(tmp_path)
    before = prepared()
    edit(model / "chat_template.jinja", "<|im_start|>", "<|im_start|>the ")
    after = prepared()
    assert "the user" in after[0]["prompt"] and "the user" not in before[0]["prompt"]
    assert "chat_template.jinja has changed" in prepared.told[0]


def test_a_template_that_a_key_names(prepared: Any, model: Path, tmp_path: Path) -> None:
    rows_file(tmp_path, "unpaired")
    jinja = tmp_path / "own.jinja"
    jinja.write_text((model / "chat_template.jinja").read_text())
    entry = {
        "path": str(tmp_path / "rows.jsonl"),
        "type": "chat_template.default",
        "chat_template_jinja": str(jinja),
    }
    keys = {"aot_mode": "unpaired", "datasets": [entry]}
    before = prepared(**keys)
    edit(jinja, "<|im_start|>", "<|im_start|>the ")
    assert prepared(**keys) != before
    assert "own.jinja has changed" in prepared.told[0]


def test_files_in_a_folder(prepared: Any, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    write_rows(parts / "a.jsonl", paired_rows(6))
    entry = {"path": str(parts), "split": "train", "type": "chat_template.default"}
    assert len(prepared(datasets=[entry])) == 6
    write_rows(parts / "b.jsonl", paired_rows(4, seed=1))
    assert len(prepared(datasets=[entry])) == 10
    assert f"{parts / 'b.jsonl'} is new" in prepared.told[-1]
    (parts / "b.jsonl").unlink()
    assert len(prepared(datasets=[entry])) == 6
    assert "b.jsonl is gone" in prepared.told[-1]


def test_the_files_of_an_entry(tmp_path: Path) -> None:
    """A pattern, a folder that `datasets` has saved (and has put its own cache into), a hub."""
    for name in ("part-0.jsonl", "part-1.jsonl", "other.jsonl", "cache-0a.arrow", ".hidden"):
        (tmp_path / name).write_text("{}")
    parts = [tmp_path / f"part-{i}.jsonl" for i in range(2)]
    pattern = str(tmp_path / "part-*.jsonl")
    for given in (pattern, [pattern], {"train": [pattern]}):
        for path in (str(tmp_path), "someone/dataset"):
            assert sorted(local_files({"path": path, "data_files": given})) == parts
    assert sorted(local_files({"path": str(tmp_path)})) == [tmp_path / "other.jsonl", *parts]
    assert list(local_files({"path": str(parts[0])})) == parts[:1]
    assert list(local_files({"path": "someone/dataset"})) == []


STRATEGY = """
import datasets

def render(row):
    return {"prompt": row["messages"][0]["content"], "chosen": SUFFIX, "rejected": "no"}

def load(cfg, **kwargs):
    assert not datasets.is_caching_enabled()
    return lambda row: render(row)

SUFFIX = "yes"
"""


def test_a_strategy_of_the_users_own(
    prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` finds its cached rows by the name of a function, whatever the function does."""
    module = tmp_path / "aot_test_strategy.py"
    module.write_text(STRATEGY)
    monkeypatch.syspath_prepend(tmp_path)
    data = rows_file(tmp_path)
    entry = {"path": str(data), "type": "aot_test_strategy.load"}
    assert prepared(datasets=[entry])[0]["chosen"] == "yes"
    assert datasets.is_caching_enabled()
    edit(module, '"yes"', '"oui!"')
    sys.modules.pop("aot_test_strategy")  # the next run is another process
    importlib.invalidate_caches()
    assert prepared(datasets=[entry])[0]["chosen"] == "oui!"
    assert "aot_test_strategy.py has changed" in prepared.told[0]
    # So is what it imports; and where nothing is prepared, nothing is taken from before either.
    helper = tmp_path / "aot_test_helper.py"
    helper.write_text('SUFFIX = "si"')
    edit(module, 'SUFFIX = "oui!"', "from aot_test_helper import SUFFIX")
    for keys in ({}, {"skip_prepare_dataset": True}):
        for word in ("si", "da", "ja"):
            helper.write_text(f'SUFFIX = "{word}"')
            for name in ("aot_test_strategy", "aot_test_helper"):
                sys.modules.pop(name, None)
            importlib.invalidate_caches()
            shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
            assert prepared(datasets=[entry], **keys)[0]["chosen"] == word


def test_the_code_of_a_registered_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options may be a class of ours."""
    (tmp_path / "aot_test_votes.py").write_text("def votes(row, options):\n    return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    votes = importlib.import_module("aot_test_votes").votes
    found = {"votes": PromptStrategy(ConversationOptions, votes)}
    monkeypatch.setattr("aot_plugin.data.strategy.strategies", lambda: found)
    assert list(_module("votes")) == [tmp_path / "aot_test_votes.py"]


def test_keys_that_the_hosts_name_leaves_out(prepared: Any, tmp_path: Path) -> None:
    rows_file(tmp_path)
    shuffled = prepared()
    in_order = prepared(curriculum_sampling=True)
    assert shuffled != in_order
    assert "`curriculum_sampling` was None and is True" in prepared.told[0]


def test_a_token_that_is_added(prepared: Any, tmp_path: Path) -> None:
    """`tokens` is no file, and not in the host's name for the rows, which hold ids."""
    rows = [row | {"chosen": "<tool_a> apple"} for row in paired_rows(12)]
    write_rows(tmp_path / "rows.jsonl", rows)
    keys = {"lora_modules_to_save": ["embed_tokens", "lm_head"]}
    before = prepared(**keys)
    after = prepared(tokens=["<tool_a>"], **keys)
    lengths = [{len(row["template_chosen_ids"]) for row in rows} for rows in (before, after)]
    assert max(lengths[1]) < min(lengths[0])
    assert "the tokenizer as it is loaded (`tokens`" in prepared.told[0]


def test_entries_in_another_order(prepared: Any, tmp_path: Path) -> None:
    paths = [write_rows(tmp_path / f"{n}.jsonl", paired_rows(4, seed=n)) for n in range(2)]
    entries = [{"path": str(path), "type": "chat_template.default"} for path in paths]
    one, other = (
        prepared(datasets=some, curriculum_sampling=True) for some in (entries, entries[::-1])
    )
    assert one[:4] == other[4:] and one[4:] == other[:4]
    assert "the list of `datasets` and `test_datasets` has changed" in prepared.told[0]


def test_a_seed_that_decides_about_rows(prepared: Any, tmp_path: Path) -> None:
    rows_file(tmp_path)
    assert prepared(seed=1) == prepared(seed=2)
    held_out = [prepared(seed=seed, val_set_size=4) for seed in (1, 2, 1)]
    assert held_out[0] == held_out[2] != held_out[1]


def test_the_same_type_in_another_mode(prepared: Any, tmp_path: Path) -> None:
    """Axolotl's own types have one name for both, and the host one folder."""
    row = {"system": "", "question": "q", "completion": "c", "label": True}
    rows = [row | {"chosen": f"y{n}", "rejected": "n", "label": n % 2 == 0} for n in range(4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    datasets = [{"path": str(path), "ds_type": "json", "split": "train", "type": "chatml.intel"}]
    assert "chosen" in prepared(datasets=datasets)[0]
    unpaired = prepared(datasets=datasets, aot_mode="unpaired")
    assert unpaired[0]["completion"] == "c<|im_end|>"


def test_rows_that_were_prepared_without_us(prepared: Any, tmp_path: Path) -> None:
    rows_file(tmp_path)
    before = prepared()
    sources_file(folder(prepared)).unlink()
    assert prepared() == before
    assert "nothing says what they were made of" in prepared.told[0]


def test_another_run_in_between(prepared: Any, tmp_path: Path) -> None:
    """The other run comes after this one has looked at the folder, and before it loads."""
    rows_file(tmp_path)
    in_order = prepared(curriculum_sampling=True)
    ours = prepared.cfg
    shuffled = prepared()
    calls = []

    def load() -> list[dict[str, Any]]:
        calls.append(1)
        if len(calls) == 1:
            assert prepared() == shuffled
        return load_datasets(ours).train_dataset.to_list()

    assert load_fresh(ours, load) == in_order
    assert len(calls) == 2

    with pytest.raises(ValueError, match="give each run a folder of its own"):
        load_fresh(ours, lambda: prepared())


def test_preprocess_and_then_train(prepared: Any, tmp_path: Path) -> None:
    rows_file(tmp_path)
    before = prepared(preprocess=True)
    sources = json.loads(sources_file(folder(prepared)).read_text())
    assert str(tmp_path / "rows.jsonl") in sources["files"]
    assert prepared() == before and prepared.told == []
    rows_file(tmp_path, seed=1)
    assert prepared() != before and len(prepared.told) == 1


def test_two_processes_at_once(prepared: Any, tmp_path: Path) -> None:
    """Whichever comes first, both read the new rows, and the stamp is there."""
    rows_file(tmp_path)
    before = prepared()
    data = rows_file(tmp_path, seed=1)
    context = multiprocessing.get_context("fork")
    start, found = context.Barrier(2), context.Queue()

    def rank() -> None:
        # A fork would name its temporary files as this process names those of later tests.
        datasets.fingerprint.fingerprint_rng.seed()
        start.wait()
        cfg = prepared.cfg
        rows = PluginManager.get_instance().load_datasets(cfg).train_dataset.to_list()
        found.put(rows)

    ranks = [context.Process(target=rank) for _ in range(2)]
    for process in ranks:
        process.start()
    first, second = (found.get(timeout=300) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert first == second != before
    assert str(data) in json.loads(sources_file(folder(prepared)).read_text())["files"]
