"""Two nodes that share no folder: each has its own rows, prepared data, cached reference and
checkpoints. What can't go on that way ends on both, and says why.

The nodes are of one rank each, with working folders of their own and relative paths in the configs.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from harness import Run, config, paired_rows, train, write_config, write_rows
from ranks_helpers import assert_same, log, two_nodes

from aot_plugin.report import load_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROUNDING = 1e-5
ROWS, EVAL_ROWS = paired_rows(21), paired_rows(7, seed=1)
KEYS = {"max_steps": 6, "save_steps": 3, "num_epochs": 2, "learning_rate": 0.0003}
KEYS |= {"eval_steps": 3, "dataset_num_proc": 0, "gradient_accumulation_steps": 1}


def with_evaluation(cfg: dict[str, Any], rows: Path) -> dict[str, Any]:
    return cfg | {"test_datasets": [{**cfg["datasets"][0], "path": str(rows)}]}


class Node:
    def __init__(self, folder: Path, number: int, model: Path) -> None:
        self.folder, self.number, self.model = folder, number, model
        self.jobs: list[dict[str, str]] = []
        folder.mkdir()
        for name, rows in (("rows", ROWS), ("eval", EVAL_ROWS), ("other", ROWS[number:])):
            write_rows(folder / f"{name}.jsonl", rows)

    def job(self, name: str, rows: str = "rows", out: str = "", **keys: Any) -> None:
        special = {k: keys.pop(k) for k in ("fault", "fails", "remove") if k in keys}
        output_dir = Path("runs") / (out or name)
        cfg = config(self.model, Path(f"{rows}.jsonl"), output_dir, **{**KEYS, **keys})
        cfg = with_evaluation(cfg | {"micro_batch_size": 4}, Path("eval.jsonl"))
        path = write_config(self.folder / "runs" / f"{name}.yml", cfg)
        self.jobs.append({"config": str(path), "wrapper": "ddp", **special})

    def output(self, name: str) -> Path:
        return self.folder / "runs" / name

    def left(self, name: str) -> str:
        """What the node's rank has written about a job: its problems, or the trace of its error."""
        return self.output(f"{name}.rank{self.number}.txt").read_text()


@pytest.fixture(scope="module")
def nodes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Node]:
    folder = tmp_path_factory.mktemp("nodes")
    nodes = [Node(folder / f"node{number}", number, tiny_model) for number in range(2)]
    for node in nodes:
        of_the_second = {"remove": "runs/first/checkpoint-6/trainer_state.json"}
        node.job("first", precompute_ref_log_probs=True)
        node.job("again", precompute_ref_log_probs=True)
        node.job(
            "resumed",
            out="first",
            auto_resume_from_checkpoints=True,
            precompute_ref_log_probs=True,
            **(of_the_second if node.number == 1 else {}),
        )
        node.job("unlike", rows="other", fails="yes")
        of_the_second["remove"] = "runs/again/checkpoint-3/trainer_state.json"
        node.job(
            "half",
            fails="yes",
            resume_from_checkpoint="runs/again/checkpoint-3",
            **(of_the_second if node.number == 1 else {}),
        )
        node.job("dies", fault="die")
    folders = [node.folder for node in nodes]
    codes = two_nodes([node.jobs for node in nodes], folders, timeout=600)
    # The last job ends with the death of a rank, and with it the other node.
    logs = "\n".join(log(folder)[-6000:] for folder in folders)
    assert all(codes), logs
    assert all(node.output("half.rank0.json").exists() for node in nodes[:1]), logs
    return nodes


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("one")
    data, held_out = write_rows(folder / "r.jsonl", ROWS), write_rows(folder / "e.jsonl", EVAL_ROWS)
    cfg = config(tiny_model, data, folder / "out", **KEYS)
    return train(with_evaluation(cfg | {"micro_batch_size": 8}, held_out))


def test_two_nodes_train_as_one_process(nodes: list[Node], whole: Run) -> None:
    for node in nodes:  # each has saved a checkpoint that it can read
        assert_same(Run.last(node.output("again")), whole, tolerance=ROUNDING)
        problems = json.loads(node.output(f"again.rank{node.number}.json").read_text())
        assert [rows for _, _, rows in problems] == 2 * [8, 8, (8, 2)[node.number]]


def test_each_node_has_its_own_cached_reference(nodes: list[Node]) -> None:
    folders = [node.output("prepared") / "aot_reference" for node in nodes]
    names = [{file.name for file in folder.glob("?" * 64 + "-*.arrow")} for folder in folders]
    assert names[0] == names[1]
    assert len(names[0]) == 2  # training and evaluation rows, of the first run
    for node in nodes:
        assert log(node.folder).count("dataset's reference log-probabilities are read") > 0
        assert log(node.folder).count("Computing reference log probs for train dataset: 100%") > 0


def test_both_resume_from_what_both_have(nodes: list[Node], whole: Run) -> None:
    for node in nodes:
        problems = json.loads(node.output(f"resumed.rank{node.number}.json").read_text())
        assert len(problems) == 3
        assert node.output("first/incomplete-checkpoint-6").exists()
    assert_same(Run.last(nodes[0].output("first")), whole, tolerance=ROUNDING)


def test_the_report_reads_what_the_first_node_wrote(nodes: list[Node]) -> None:
    assert len(load_run(nodes[0].output("again"))) >= 2
    assert not list((nodes[1].output("again") / "aot").glob("scores*"))


def test_other_rows_are_refused_on_both(nodes: list[Node]) -> None:
    for node in nodes:
        assert "ValueError: the rows of node 1 are not those of node 0" in node.left("unlike")


def test_a_checkpoint_that_one_node_lacks_is_refused_on_both(nodes: list[Node]) -> None:
    for node in nodes:
        assert "is whole on node 0, half written on node 1; name" in node.left("half")


def test_no_node_waits_for_one_that_died(nodes: list[Node]) -> None:
    assert "Connection" in nodes[0].left("dies")
