"""Rows with images through the host's loading: kept as turns, and what is refused or dropped."""

import base64
import io
import os
from pathlib import Path

import datasets
import pytest
import vision
from data_helpers import write_rows
from PIL import Image

from aot_plugin.data.loading import load_datasets

IMAGE = {"type": "image", "text": None}
USER = {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?"}]}
RED = {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}
BLUE = {"role": "assistant", "content": [{"type": "text", "text": "Blue."}]}
TEXT = {"role": "human", "content": [{"type": "text", "text": "Hi."}]}


def turns(*expected):
    """Turns of one part of text each, or of the parts of an image and a text."""
    return [
        {"role": role, "content": [{"type": "text", "text": t} if t else IMAGE for t in texts]}
        for role, *texts in expected
    ]


PROMPT = turns(("user", None, "What is it?"))


@pytest.fixture
def picture(tmp_path):
    return lambda seed=0: vision.save_image(tmp_path / f"{seed}.png", seed)


@pytest.fixture
def load(config, tmp_path):
    """``load(rows, mode, **keys)``: the training rows as the collator gets them."""

    def run(
        rows, mode="paired", kind="chat_template.default", held_out=None, template=None, **keys
    ):
        entry = {"type": kind} if kind else {}
        entry |= {"chat_template": template} if template else {}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        if isinstance(rows, list):
            entry["path"] = write_rows(folder / "rows.jsonl", rows)
        else:
            rows.to_parquet(folder / "rows.parquet")
            entry["path"] = str(folder / "rows.parquet")
        cfg = {"aot_mode": mode} | keys
        if held_out:
            path = write_rows(folder / "held_out.jsonl", held_out)
            cfg["test_datasets"] = [{"path": path, "type": kind, "split": "train"}]
        return load_datasets(config([entry], **cfg)).train_dataset

    return run


@pytest.mark.parametrize("kind", ["chat_template.default", "chat_template.argilla_chat"])
def test_pairs_keep_turns_and_images(kind, load, picture):
    pair = {"chosen": [RED], "rejected": [BLUE], "images": [picture()], "messages": [USER]}
    longer = pair | {"messages": [TEXT, RED, USER], "images": [picture(0), picture(1)]}
    found = load([pair, longer], kind=kind).to_list()
    answers = {"chosen": turns(("assistant", "Red.")), "rejected": turns(("assistant", "Blue."))}
    assert found == [
        {"prompt": PROMPT, **answers, "images": [picture()]},
        {
            "prompt": [*turns(("user", "Hi."), ("assistant", "Red.")), *PROMPT],
            **answers,
            "images": [picture(0), picture(1)],
        },
    ]


def test_embedded_images_stay_as_they_are(load, picture):
    rows = [{"messages": [USER], "chosen": [RED], "rejected": [BLUE], "image": picture(1)}]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    (found,) = load(table)
    assert found["prompt"] == PROMPT
    assert found["image"].tobytes() == Image.open(picture(1)).tobytes()


def test_every_type_of_unpaired_rows_reads_images(load, picture):
    row = {"prompt": [USER], "images": [picture()]}
    one = [row | {"completion": [a], "label": b} for a, b in ((RED, "good"), (BLUE, "bad"))]
    both = row | {"chosen": [RED], "rejected": [BLUE]}
    expected = [
        {
            "prompt": PROMPT,
            "completion": turns(("assistant", text)),
            "label": label,
            "images": [picture()],
        }
        for text, label in (("Red.", True), ("Blue.", False))
    ]
    assert load(one, "unpaired").to_list() == expected
    assert load([both], "unpaired", "chat_template.paired").to_list() == expected
    as_they_are = [row | {"completion": [a], "label": a is RED} for a in (RED, BLUE)]
    assert load(as_they_are, "unpaired", None).num_rows == 2


def test_faulty_rows_are_counted(load, picture, caplog):
    pair = {"messages": [USER], "chosen": [RED], "rejected": [BLUE], "images": [picture()]}
    rows = [pair, pair | {"rejected": [RED]}, pair | {"messages": []}]
    assert load(rows).num_rows == 1
    assert "1 dropped as identical (row 1)" in caplog.text
    assert "1 dropped as empty (row 2)" in caplog.text


def test_identical_responses_of_the_hosts_types(load, picture, caplog):
    pair = {"prompt": [USER], "chosen": [RED], "rejected": [BLUE], "images": [picture()]}
    assert load([pair, pair | {"rejected": [RED]}], kind=None).num_rows == 1
    assert "1 pairs of the train datasets" in caplog.text


TURNS = {"messages": [USER], "chosen": [RED], "rejected": [BLUE]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "row 1: there is no image, but other rows have some"),
        ({"images": None}, "row 1: there is no image, but other rows have some"),
        ({"images": ["no/such.png"]}, "row 1: an image can't be read: .*no/such.png"),
        ({"images": ["TEXT"]}, "row 1: an image can't be read: cannot identify image file"),
        (
            {"messages": [USER | {"content": [IMAGE, *USER["content"]]}]},
            "row 1: its prompt has places for 2 images, but the row has 1",
        ),
        ({"chosen": [RED | {"content": USER["content"]}]}, "row 1: only turns of the user can"),
        ({"tools": [{"name": "look"}]}, "row 1: tools can't be trained with images"),
        (
            {"messages": [USER | {"content": [{"type": "image", "text": None, "url": "a.png"}]}]},
            "row 1: a turn holds an image itself; move it to the column `images`",
        ),
        (
            {"messages": [USER], "chosen": [RED | {"reasoning_content": "Hm."}]},
            "row 1: `reasoning_content` of a turn can't be trained with images",
        ),
    ],
)
def test_what_can_t_be_trained_is_named(change, message, load, picture, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    row = TURNS | {"images": [picture()]}
    bad = row | change
    if bad["images"] == ["TEXT"]:
        bad["images"] = [str(tmp_path / "text.png")]
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {message}"):
        load([row, bad])


def test_images_that_are_not_files(load):
    # Coded, noise is longer than any path may be.
    for pixels in (Image.new("RGB", (4, 4)), Image.effect_noise((64, 64), 50).convert("RGB")):
        buffer = io.BytesIO()
        pixels.save(buffer, "PNG")
        coded = base64.b64encode(buffer.getvalue()).decode()
        rows = [TURNS | {"images": [begin + coded]} for begin in ("", "data:image/png;base64,")]
        assert load(rows).num_rows == 2
    assert len(coded) > os.pathconf("/", "PC_PATH_MAX")
    # Not opened before it is needed: that may be a large download.
    assert load([TURNS | {"images": ["https://localhost/a.png"]}]).num_rows == 1


def test_a_type_that_reads_no_images(load, picture):
    row = {"message_id": "a", "parent_id": None, "text": "Hi", "role": "user", "rank": None}
    with pytest.raises(ValueError, match=r"column of images, which `type: chat_template\.threads`"):
        load([row | {"image": picture()}], "unpaired", "chat_template.threads")


def test_a_column_without_any_image_is_text(load):
    text = TURNS | {"messages": [TEXT]}
    (found,) = load([text | {"images": []}, text | {"images": None}][:1])
    assert found["chosen"] == "Red.<|im_end|>"


def test_text_beside_images_is_refused(load, picture):
    row = TURNS | {"images": [picture()]}
    text = TURNS | {"messages": [TEXT]}
    with pytest.raises(ValueError, match="the rows of `datasets` have images and those of `test_"):
        load([row], held_out=[text])
    with pytest.raises(ValueError, match="the rows of `test_datasets` have images and those of `d"):
        load([text], held_out=[row])


@pytest.mark.parametrize(
    "keys",
    [
        {"precompute_ref_log_probs": True},
        {"aot_samples": 2, "val_set_size": 1, "eval_steps": 1},
        {"excess_length_strategy": "raise"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_keys_that_can_t_act_on_images(keys, load, picture):
    with pytest.raises(ValueError, match=f"tokenized in each step; remove `{next(iter(keys))}"):
        load([TURNS | {"images": [picture(n)]} for n in range(2)], **keys)


def test_a_template_of_the_entry(load, picture):
    with pytest.raises(ValueError, match="a `chat_template` at the top level of the config; move"):
        load([TURNS | {"images": [picture()]}], template="chatml")


def test_chosen_rows_of_a_mix(load, picture, config, tmp_path):
    rows = [TURNS | {"images": [picture(n)]} for n in range(4)]
    path = write_rows(Path(tmp_path) / "mix.jsonl", rows)
    entry = {"path": path, "type": "chat_template.default", "weight": 1.5}
    found = load_datasets(config([entry], aot_mode="paired")).train_dataset
    assert len(found) == 6
    assert {image for (image,) in found["images"]} == {picture(n) for n in range(4)}


def test_a_host_that_trains_text_only(load, picture, monkeypatch):
    """As Axolotl 0.19 and 0.20 do."""
    monkeypatch.delattr("axolotl.utils.data.utils.is_vision_dataset")
    with pytest.raises(ValueError, match=r"rows\.jsonl: there is a column of images, and the inst"):
        load([TURNS | {"images": [picture()]}])
