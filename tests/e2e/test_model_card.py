"""The model card names the datasets of the Hub, and a model can be pushed with it."""

from pathlib import Path
from typing import Any

import pytest
from harness import config, paired_rows, train, unpaired_rows, write_rows
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.repocard import metadata_load

from aot_plugin.host import model_card
from aot_plugin.host.model_card import hub_datasets

pytestmark = pytest.mark.slow

HUB = ["owner/pairs", "other/rows_v1.1"]


def test_datasets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("local").mkdir()
    Path("local/rows").write_text("{}\n")
    elsewhere = ["local", "local/rows", "rows.jsonl", "json", "s3://bucket/rows"]
    elsewhere += ["https://example.org/rows.jsonl", "/data/rows", "~/rows", "a/b/c"]
    paths = [HUB[0], *elsewhere, HUB[1], HUB[0]]
    assert hub_datasets([{"path": path} for path in paths]) == HUB


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_a_model_is_pushed_with_its_card(
    mode: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the two requests to the Hub is real."""
    pushed: list[Any] = []

    def upload_folder(self: HfApi, *, folder_path: str, **_: Any) -> None:
        pushed.append(metadata_load(Path(folder_path) / "README.md"))

    url = RepoUrl("https://huggingface.co/owner/model")
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: url)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(model_card, "hub_datasets", lambda _: HUB)
    data = write_rows(
        tmp_path / "rows.jsonl", (paired_rows if mode == "paired" else unpaired_rows)(8)
    )
    keys = {"max_steps": 1, "hub_model_id": "owner/model", "hub_strategy": "end"}
    run = train(config(tiny_model, data, tmp_path / "out", aot_mode=mode, **keys))
    assert pushed
    for card in (*pushed, metadata_load(run.checkpoint.parent / "README.md")):
        assert card["datasets"] == HUB
        assert {"trl", "aot"} <= set(card["tags"])
        assert mode == "unpaired" or "axolotl" in card["tags"]
        assert card["model_name"] == "model" and card["library_name"] == "transformers"
