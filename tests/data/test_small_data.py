"""Little data and little batches: a correct run, or a clear error."""

from pathlib import Path

import pytest
from harness import Run, config, paired_rows, train, unpaired_rows, write_rows

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", ["paired", "unpaired"])
def test_an_effective_batch_larger_than_the_data(
    mode: str, tiny_model: Path, tmp_path: Path
) -> None:
    """16 rows per step, of which there are 5: a step holds all of them, once."""
    rows = paired_rows(5) if mode == "paired" else unpaired_rows(5)
    data = write_rows(tmp_path / "rows.jsonl", rows)

    def run(micro: int, accumulation: int) -> Run:
        keys = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        keys |= {"max_steps": 3, "dataset_num_proc": 0}
        name = tmp_path / f"{micro}x{accumulation}"
        return train(config(tiny_model, data, name, aot_mode=mode, num_epochs=3, **keys))

    large, exact = run(2, 8), run(5, 1)
    sizes = zip(large.logged("aot/sorted_u"), large.logged("aot/sorted_v"), strict=True)
    assert list(sizes) == [(5, 5) if mode == "paired" else (2, 3)] * 3
    assert large.logged("loss") == pytest.approx(exact.logged("loss"), rel=1e-4)
    assert len(set(large.logged("loss"))) == 3


def test_one_pair_per_step_is_dpo(tiny_model: Path, tmp_path: Path) -> None:
    """Nothing is sorted there: -log sigmoid of beta times the margin over the reference's."""
    data = write_rows(tmp_path / "rows.jsonl", paired_rows(8))
    keys = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "dataset_num_proc": 0}
    ours = train(config(tiny_model, data, tmp_path / "aot", **keys))
    theirs = train(config(tiny_model, data, tmp_path / "dpo", rl="dpo", **keys))
    assert ours.logged("loss") == pytest.approx(theirs.logged("loss"), rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_one_labelled_row_has_nothing_to_be_compared_with(
    accumulation: int, tiny_model: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", unpaired_rows(8))
    keys = {"micro_batch_size": 1, "gradient_accumulation_steps": accumulation}
    batch = "step" if accumulation == 1 else "micro_batch"
    cfg = config(tiny_model, data, tmp_path / "out", aot_mode="unpaired", aot_batch=batch, **keys)
    with pytest.raises(ValueError, match=r"of one row .* raise `micro_batch_size`"):
        train(cfg | {"dataset_num_proc": 0})


def test_a_run_ends_with_its_last_epoch(tiny_model: Path, tmp_path: Path) -> None:
    """20 pairs in steps of 8, the third one shorter; and as many equal ones, which are dropped."""
    rows = [
        {"system": "", "question": f"apple {n}", "chosen": "river", "rejected": rejected}
        for n in range(20)
        for rejected in ("river", "stone")
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    cfg = config(tiny_model, data, tmp_path / "out", num_epochs=3, save_strategy="epoch")
    cfg["datasets"][0]["type"] = "chatml.intel"
    del cfg["max_steps"], cfg["save_steps"]
    run = train(cfg)
    assert run.logged("aot/sorted_u") == 3 * [8, 8, 4]
    assert run.history[-1]["epoch"] == 3
