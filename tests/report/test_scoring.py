"""A real run: a 2-layer random Llama with SmolLM2's tokenizer and a LoRA adapter saved by PEFT."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from aot_plugin.data.options import ConversationOptions
from aot_plugin.data.render import Renderer
from aot_plugin.report.rows import sequences_of
from aot_plugin.report.saved_arguments import start_adapter
from aot_plugin.report.scoring import (
    batches_by_length,
    find_model,
    read_beta,
    read_step,
    score_run,
)

FIELDS = ("chosen", "rejected")


def naive_logps(model, tokenizer, row, field):
    """One sequence at a time, full logits, no padding."""
    messages = [{"role": "user", "content": row["prompt"]}]
    before = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    messages.append({"role": "assistant", "content": row[field]})
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    assert tokenizer.decode(whole[-2:]) == "<|im_end|>\n"
    whole = whole[:-1]
    assert whole[: len(before)] == before
    with torch.no_grad():
        logps = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    positions = range(len(before), len(whole))
    return sum(logps[i - 1, whole[i]].item() for i in positions), len(positions)


def test_lora_against_a_naive_loop(lora_run, tiny_model, pairs, pair_rows):
    scores = score_run(lora_run, pairs, batch_tokens=120)
    assert (scores.mode, scores.beta, scores.step) == ("paired", 0.25, 12)
    assert scores.eval_set == "held out"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for field in FIELDS:
        expected = [naive_logps(base, tokenizer, row, field) for row in pair_rows]
        found = scores.columns[f"ref_{field}_logps"]
        np.testing.assert_allclose(found, [logp for logp, _ in expected], rtol=1e-5)
        assert scores.columns[f"{field}_tokens"].tolist() == [n for _, n in expected]
    policy = PeftModel.from_pretrained(base, str(lora_run)).eval()
    for field in FIELDS:
        expected = [naive_logps(policy, tokenizer, row, field)[0] for row in pair_rows]
        np.testing.assert_allclose(scores.columns[f"{field}_logps"], expected, rtol=1e-5)
    assert np.abs(scores.chosen_logratios).min() > 1e-3  # the adapter does something


def test_unpaired_rows_are_the_same_sequences(lora_run, pairs, tmp_path, pair_rows):
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}]}
        | {"completion": row[field], "label": field == "chosen"}
        for row in pair_rows
        for field in FIELDS
    ]
    path = tmp_path / "single.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    single, paired = score_run(lora_run, path, beta=1.0), score_run(lora_run, pairs, beta=1.0)
    assert single.mode == "unpaired"
    np.testing.assert_allclose(single.u, paired.chosen_logratios, atol=1e-4)
    np.testing.assert_allclose(single.v, paired.rejected_logratios, atol=1e-4)


def test_full_model_with_a_reference(lora_run, tiny_model, pairs, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    PeftModel.from_pretrained(base, str(lora_run)).merge_and_unload().save_pretrained(tmp_path)
    full = score_run(tmp_path, pairs, reference=str(tiny_model), beta=0.25)
    lora = score_run(lora_run, pairs)
    np.testing.assert_allclose(full.u, lora.u, rtol=1e-3)
    np.testing.assert_allclose(full.v, lora.v, rtol=1e-5)
    with pytest.raises(ValueError, match="a full model; give the model it was trained from"):
        score_run(tmp_path, pairs, beta=0.25)


def test_base_model_overrides_what_the_adapter_says(lora_run, tiny_model, pairs, tmp_path):
    moved = tmp_path / "run"
    moved.mkdir()
    for file in lora_run.iterdir():
        if file.is_file():
            (moved / file.name).write_bytes(file.read_bytes())
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "./gone"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        FileNotFoundError, match=r"(?s)no model at './gone' \(named by .*--base-model"
    ):
        score_run(moved, pairs, beta=1.0)
    found = score_run(moved, pairs, base_model=str(tiny_model), beta=1.0)
    np.testing.assert_array_equal(found.u, score_run(lora_run, pairs).u)


def test_long_rows_are_left_out_as_pairs(lora_run, pairs, pair_rows, tiny_model, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    render = Renderer({}, ConversationOptions(), tokenizer)
    longest = [
        max(sum(map(len, sequence)) for sequence in sequences_of(row, "paired", render, tokenizer))
        for row in pair_rows
    ]
    limit = max(longest) - 1
    kept = np.array(longest) <= limit
    with caplog.at_level(logging.WARNING, logger="aot_plugin"):
        cut = score_run(lora_run, pairs, max_tokens=limit)
    np.testing.assert_allclose(cut.u, score_run(lora_run, pairs).u[kept], rtol=1e-5)
    assert f"{(~kept).sum()} of 5 rows are longer than {limit} tokens" in caplog.text
    with pytest.raises(ValueError, match="no row within 3 tokens"):
        score_run(lora_run, pairs, max_tokens=3)


def test_a_bad_row_is_named(lora_run, tmp_path, pair_rows):
    path = tmp_path / "rows.jsonl"
    row = pair_rows[0] | {"prompt": [{"role": "user", "content": "x"}]}
    path.write_text("\n".join(map(json.dumps, [pair_rows[0], row])))
    with pytest.raises(ValueError, match=r"rows.jsonl, row 2: plain rows need strings"):
        score_run(lora_run, path, plain=True)


def test_the_latest_checkpoint_is_used_when_the_run_was_cut_off(lora_run, tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(
            json.dumps({"global_step": step})
        )
    (tmp_path / "checkpoint-best").mkdir()
    assert find_model(tmp_path) == tmp_path / "checkpoint-10"
    assert read_step(find_model(tmp_path)) == 10
    assert read_step(lora_run) == 12
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    assert read_step(tmp_path / "checkpoint-10") is None


def test_no_model_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json \(LoRA\) and config.json"):
        find_model(tmp_path)


@pytest.mark.parametrize("beta", [0.3, 1, 0.0, 300])
def test_beta_from_the_training_arguments(beta, tmp_path, save_arguments):
    save_arguments(tmp_path, beta=beta)
    assert read_beta(tmp_path) == beta


def test_no_beta_is_said(tmp_path, save_arguments):
    with pytest.raises(FileNotFoundError, match=r"training_args.bin. Give --beta"):
        read_beta(tmp_path)
    save_arguments(tmp_path)
    with pytest.raises(ValueError, match=r"holds no beta\. Give --beta"):
        read_beta(tmp_path)


def test_the_adapter_that_training_began_with(tmp_path):
    path = "".join(["somebody", "/sft"])  # one object, so that the pickle refers back to it
    for value, found in ((path, path), ("", None), (None, None)):
        earlier = {"output_dir": value, "aot_start_adapter": value, "beta": 0.5, "next": "key"}
        torch.save(earlier, tmp_path / "training_args.bin")
        assert start_adapter(tmp_path) == found
        assert read_beta(tmp_path) == 0.5
    assert start_adapter(tmp_path / "gone") is None


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


def test_the_pickle_is_not_executed(tmp_path):
    torch.save({"beta": 0.5, "bomb": Bomb()}, tmp_path / "training_args.bin")
    assert read_beta(tmp_path) == 0.5
    with pytest.raises(pytest.fail.Exception):  # it is a real bomb
        pickle.loads(pickle.dumps(Bomb()))


def test_batches():
    lengths = [3, 10, 1, 7, 7, 30, 2]
    batches = batches_by_length(lengths, 20)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches[0] == [5]  # longer than a batch: alone, and first
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= 20
    assert [[lengths[i] for i in batch] for batch in batches] == [[30], [10, 7], [7, 3], [2, 1]]
