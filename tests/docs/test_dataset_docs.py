"""Every YAML entry of docs/datasets.md, on rows of ours that have the dataset's columns.

The rows run through the host's own loading; of an entry only `path` is changed and
`weight` left out.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.common.datasets import load_preference_datasets
from axolotl.loaders import load_tokenizer
from axolotl.utils.dict import DictDefault
from data_helpers import write_rows

from aot_plugin.data import levels, resolve_unpaired_datasets
from aot_plugin.data.labels import WORDS
from aot_plugin.data.loading import load_datasets, row_counts
from aot_plugin.data.options import LOADER_KEYS
from aot_plugin.data.strategy import strategies

DOCS = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", DOCS, re.S)]


def is_graded(block: dict[str, Any]) -> bool:
    return "aot_grades" in block or any("grades" in entry for entry in block["datasets"])


def entries(mode: str, graded: bool = False) -> list[dict[str, Any]]:
    assert all(block["rl"] == "aot" for block in BLOCKS)
    blocks = [b for b in BLOCKS if b["aot_mode"] == mode and is_graded(b) == graded]
    return [entry for block in blocks for entry in block["datasets"]]


def user(text="How tall is it?"):
    return {"content": text, "role": "user"}


def assistant(text):
    return {"content": text, "role": "assistant"}


GOOD, BAD = "Three metres.", "No idea."
PAIR = {"chosen": [user(), assistant(GOOD)], "rejected": [user(), assistant(BAD)]}
LONG = [user("Is it old?"), assistant("Yes."), user()]
LONG_PAIR = {"chosen": [*LONG, assistant(GOOD)], "rejected": [*LONG, assistant(BAD)]}
TEXT = {"chosen": GOOD, "rejected": BAD}
ASPECT = {"Rating": "5", "Rationale": "Fine."}
HELPSTEER = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 2}


def message(name: str, parent: str | None, text: str, rank: int | None) -> dict[str, Any]:
    return {
        "message_id": name,
        "parent_id": parent,
        "user_id": "u",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": text,
        "role": "assistant" if parent else "prompter",
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "detoxify": {"toxicity": 0.0004, "insult": 0.0002},
        "message_tree_id": "p",
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [3]},
        "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
    }


ROWS: dict[str, list[dict[str, Any]]] = {
    "feedback.jsonl": [
        {"messages": [user(), assistant(GOOD)], "feedback": "thumbs_up"},
        {"messages": [user(), assistant(BAD)], "feedback": "thumbs_down"},
        {"messages": [user(), assistant("Well.")], "feedback": None},
    ],
    "pairs.jsonl": [{"prompt": user()["content"], **TEXT}],
    "labelled.jsonl": [
        {"prompt": user()["content"], "completion": text, "label": label}
        for text, label in ((GOOD, True), (BAD, False))
    ],
    "verified.jsonl": [
        {"prompt": user()["content"], "completion": text, "label": label, "trust": trust}
        for text, label, trust in ((GOOD, True, 2.5), (BAD, False, 1), ("Hm.", True, 0))
    ],
    "ratings.jsonl": [
        {"prompt": user()["content"], "completion": text, "stars": stars}
        for text, stars in ((GOOD, 5), ("Hm.", 3), (BAD, 1))
    ],
    "percent.jsonl": [
        {"prompt": user()["content"], "completion": text, "score": score}
        for text, score in ((GOOD, 70), ("Hm.", 30), (BAD, 29.5))
    ],
    "best_of_n.jsonl": [
        {
            "prompt": user()["content"],
            "answers": [
                {"text": text, "reward": reward}
                for text, reward in ((GOOD, 2.25), ("Hm.", 0.0), (BAD, -0.5))
            ],
        }
    ],
    "sharegpt.jsonl": [
        {
            "conversations": [
                {"from": "human", "value": user()["content"]},
                {"from": "gpt", "value": text},
            ],
            "ok": ok,
        }
        for text, ok in ((GOOD, True), (BAD, False))
    ],
    "preferences.jsonl": [
        {"messages": [user()], "chosen": assistant(GOOD), "rejected": assistant(BAD)}
    ],
    "HuggingFaceH4/ultrafeedback_binarized": [
        {
            "prompt": user()["content"],
            "prompt_id": "0a1b",
            **PAIR,
            "messages": PAIR["chosen"],
            "score_chosen": 8.5,
            "score_rejected": 4.0,
        }
    ],
    "trl-lib/ultrafeedback_binarized": [PAIR | {"score_chosen": 8.5, "score_rejected": 4.0}],
    "argilla/ultrafeedback-binarized-preferences-cleaned": [
        {
            "source": "flan",
            "prompt": user()["content"],
            **PAIR,
            "chosen-rating": 5.0,
            "chosen-model": "a",
            "rejected-rating": 2.5,
            "rejected-model": "b",
        }
    ],
    "argilla/ultrafeedback-binarized-preferences-cleaned-kto": [
        {
            "prompt": user()["content"],
            "completion": text,
            "label": label,
            "model": "a",
            "average_rating": 4.5,
            "annotations": {"helpfulness": ASPECT, "honesty": ASPECT},
            "source": "flan",
        }
        for text, label in ((GOOD, True), (BAD, False))
    ],
    "openbmb/UltraFeedback": [
        {
            "source": "flan",
            "instruction": user()["content"],
            "models": ["a", "b", "c"],
            "completions": [
                {
                    "annotations": {"helpfulness": ASPECT, "honesty": ASPECT},
                    "custom_system_prompt": "Be helpful.",
                    "model": "a",
                    "principle": "helpfulness",
                    "response": text,
                    "critique": "...",
                    "overall_score": score,
                    "fine-grained_score": score / 2,
                }
                for text, score in ((BAD, 3.0), ("Hm.", 6.5), (GOOD, 8.0))
            ],
            "correct_answers": ["None"],
            "incorrect_answers": ["None"],
        }
    ],
    "trl-lib/kto-mix-14k": [
        {"prompt": [user()], "completion": [assistant(text)], "label": label}
        for text, label in ((GOOD, True), (BAD, False))
    ],
    "argilla/kto-mix-15k": [
        {
            "prompt": user()["content"],
            "completion": [*LONG, assistant(text)],
            "label": label,
            "rating": 5.0,
            "dataset": "capybara",
        }
        for text, label in ((GOOD, True), (BAD, False))
    ],
    "PKU-Alignment/BeaverTails": [
        {
            "prompt": user()["content"],
            "response": text,
            "category": {
                "animal_abuse": not safe,
                "violence": False,
            },
            "is_safe": safe,
        }
        for text, safe in ((GOOD, True), (BAD, False))
    ],
    "PKU-Alignment/PKU-SafeRLHF": [
        {
            "prompt": user()["content"],
            "response_0": BAD,
            "response_1": GOOD,
            "prompt_source": "s",
            "response_0_source": "a",
            "response_1_source": "b",
            "is_response_0_safe": False,
            "is_response_1_safe": True,
            "response_0_severity_level": 2,
            "response_1_severity_level": 0,
            "better_response_id": 1,
            "safer_response_id": 1,
        }
    ],
    "nvidia/HelpSteer": [
        {"prompt": user()["content"], "response": text, "helpfulness": score} | HELPSTEER
        for text, score in ((GOOD, 4), ("Hm.", 3), (BAD, 0))
    ],
    "nvidia/HelpSteer2": [
        {
            "prompt": f"Is it old?\n<extra_id_1>Assistant\nYes.\n<extra_id_1>User\n"
            f"{user()['content']}",
            "response": text,
            "helpfulness": score,
        }
        | HELPSTEER
        for text, score in ((GOOD, 4), ("Hm.", 3), (BAD, 2))
    ],
    "nvidia/HelpSteer3": [
        {
            "domain": "general",
            "language": "english",
            "context": LONG,
            "response1": first,
            "response2": second,
            "overall_preference": preference,
            "individual_preference": [
                {"score": preference, "reasoning": "...", "feedback1": "...", "feedback2": "..."}
            ],
        }
        for first, second, preference in ((GOOD, BAD, -2), ("Hm.", "Hm!", 0))
    ],
    "Anthropic/hh-rlhf": [
        {
            name: "\n\nHuman: Is it old?\n\nAssistant: Yes.\n\nHuman: How tall is it?"
            f"\n\nAssistant: {text}"
            for name, text in TEXT.items()
        }
    ],
    "Intel/orca_dpo_pairs": [{"system": "Be brief.", "question": user()["content"]} | TEXT],
    "argilla/distilabel-intel-orca-dpo-pairs": [
        {
            "system": "Be brief.",
            "input": user()["content"],
            **TEXT,
            "generations": [GOOD, BAD],
            "order": ["chosen", "rejected"],
            "labelling_model": "m",
            "labelling_prompt": [{"content": "Rate.", "role": "system"}],
            "raw_labelling_response": "9 3",
            "rating": [9.0, 3.0],
            "rationale": "...",
            "status": "unchanged",
            "original_chosen": GOOD,
            "original_rejected": BAD,
            "chosen_score": 9.0,
            "in_gsm8k_train": False,
        }
    ],
    "argilla/distilabel-intel-orca-kto": [
        {
            "system": "Be brief.",
            "prompt": user()["content"],
            "completion": text,
            "label": label,
            "rating": 9.0,
            "status": "unchanged",
            "in_gsm8k_train": False,
        }
        for text, label in ((GOOD, True), (BAD, False))
    ],
    "argilla/distilabel-capybara-dpo-7k-binarized": [
        {
            "source": "Airoboros",
            "conversation": [{"input": "Is it old?", "output": "Yes."}],
            "original_response": "Yes.",
            "generation_prompt": ["..."],
            "raw_generation_responses": ["..."],
            "new_generations": [BAD],
            "prompt": "Is it old?",
            **LONG_PAIR,
            "rating_chosen": 5,
            "rating_rejected": 2,
            "chosen_model": "a",
            "rejected_model": "b",
        }
    ],
    "argilla/distilabel-capybara-kto-15k-binarized": [
        {
            "prompt": "Is it old?",
            "completion": [*LONG, assistant(text)],
            "label": label,
            "rating": 5,
            "model": "a",
            "source": "Airoboros",
        }
        for text, label in ((GOOD, True), (BAD, False))
    ],
    "argilla/distilabel-math-preference-dpo": [
        {
            "metadata": "...",
            "instruction": user()["content"],
            "chosen_response": GOOD,
            "chosen_rating": 9.0,
            "rejected_response": BAD,
            "rejected_rating": 7.0,
        }
    ],
    "OpenAssistant/oasst1": [
        message("p", None, user()["content"], None),
        *(message(text, "p", text, rank) for rank, text in enumerate((GOOD, "Hm.", BAD))),
    ],
}
"""Rows by the path of the entry. Where the answers are, the good one is positive, the bad one
negative, and a third one, if any, is dropped."""

DROPPED = {
    "feedback.jsonl": {"unlabeled": 1},
    "verified.jsonl": {"weight 0": 1},
    "ratings.jsonl": {"between thresholds": 1},
    "openbmb/UltraFeedback": {"between thresholds": 1},
    "nvidia/HelpSteer": {"between thresholds": 1},
    "nvidia/HelpSteer2": {"between thresholds": 1},
    "nvidia/HelpSteer3": {"between thresholds": 2},
    "OpenAssistant/oasst1": {"between thresholds": 1},
}


def localized(
    mode: str, folder: Path, written: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """The entries of the docs, or those ``written``, with `path` pointing at our rows, each read
    once."""
    local = []
    for number, entry in enumerate(entries(mode) if written is None else written):
        entry = {key: value for key, value in entry.items() if key != "weight"}
        path = write_rows(folder / f"{mode}{number}.jsonl", ROWS[entry["path"]])
        local.append(entry | {"path": path, "split": "train"})
    return local


@pytest.mark.slow
def test_unpaired_entries(config, tmp_path):
    names = [entry["path"] for entry in entries("unpaired")]
    cfg = config(localized("unpaired", tmp_path), skip_prepare_dataset=True)
    dataset = load_datasets(cfg).train_dataset
    (counts,) = row_counts(cfg, load_tokenizer(cfg)).values()
    assert [(c.positive, c.negative) for c in counts] == [(1, 1)] * len(names)
    assert [c.dropped for c in counts] == [DROPPED.get(name, {}) for name in names]
    assert len(dataset) == 2 * len(names)
    for number, name in enumerate(names):
        for row in dataset.select((2 * number, 2 * number + 1)):
            asked, answered = row["prompt"], row["completion"]
            assert answered == f"{GOOD if row['label'] else BAD}<|im_end|>", name
            assert asked.endswith(
                "<|im_start|>user\nHow tall is it?<|im_end|>\n<|im_start|>assistant\n"
            ), name
            assert ("Be brief." in asked) == ("orca" in name), name
            multi_turn = name in (
                "argilla/kto-mix-15k",
                "argilla/distilabel-capybara-dpo-7k-binarized",
                "argilla/distilabel-capybara-kto-15k-binarized",
                "nvidia/HelpSteer2",
                "nvidia/HelpSteer3",
                "Anthropic/hh-rlhf",
            )
            assert ("Is it old?<|im_end|>\n<|im_start|>assistant\nYes." in asked) == multi_turn


@pytest.mark.slow
def test_graded_entries(config, tmp_path):
    """The rows' levels, in the order of the docs."""
    found = []
    for number, block in enumerate(filter(is_graded, BLOCKS)):
        (folder := tmp_path / str(number)).mkdir()
        local = localized("unpaired", folder, block["datasets"])
        keys = {key: block[key] for key in block if key not in ("rl", "aot_mode", "datasets")}
        dataset = load_datasets(config(local, skip_prepare_dataset=True, **keys)).train_dataset
        found.append(levels(dataset).tolist())
    ratings, percent, preferences = [1.0, 0.5, 0.0], [1.0, 0.5, 0.0], [1.0, 0.0]
    helpsteer, ultrafeedback, best_of_n = [1.0, 0.75, 0.5], [0.0, 0.5, 0.75], [1.0, 0.5, 0.25]
    mixed = ratings + percent + preferences
    assert found == [mixed, helpsteer + ultrafeedback + best_of_n]


@pytest.mark.slow
def test_paired_entries(config, tmp_path):
    local = localized("paired", tmp_path)
    cfg = config(local, aot_mode="paired", skip_prepare_dataset=True)
    assert cfg.rl == "dpo"
    for number, entry in enumerate(entries("paired")):
        alone = DictDefault(dict(cfg) | {"datasets": [cfg.datasets[number]]})
        (row,) = load_preference_datasets(cfg=alone).train_dataset
        assert "How tall is it?" in row["prompt"], entry
        assert row["chosen"].startswith(GOOD), entry
        assert row["rejected"].startswith(BAD), entry


@pytest.mark.parametrize("name", strategies())
def test_every_option_is_in_the_table(name):
    table = DOCS[DOCS.index("### Options") : DOCS.index("### Labels")]
    listed = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.M))))
    for option in (*LOADER_KEYS, *strategies()[name].options.model_fields):
        assert option in listed
    assert f"| `{name}` |" in DOCS


def test_the_table_lists_no_other_option():
    table = DOCS[DOCS.index("### Options") : DOCS.index("### Labels")]
    listed = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.M))))
    known = {option for s in strategies().values() for option in s.options.model_fields}
    assert listed == known | set(LOADER_KEYS)


def test_every_label_word_is_listed():
    labels = DOCS[DOCS.index("### Labels") : DOCS.index("### What is dropped")]
    assert set(WORDS) == set(re.findall(r"`([a-z_01]+)`", labels))


def test_the_docs_entries_as_written_are_accepted():
    resolve_unpaired_datasets(entries("unpaired"))
