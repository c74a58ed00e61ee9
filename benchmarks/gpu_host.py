"""`axolotl train` with `rl: aot` on a GPU, in the set-ups that people have.

    python benchmarks/gpu_host.py --json benchmarks/results/gpu_host.jsonl

Needs Axolotl and the quickstart's model. Each set-up is a few keys of YAML on top of `BASE`; it is
trained by the host's command, with all checks before the first step, several at a time. The same
keys in float32 are the reference: a row of the table tells how far the loss of each step and the
norm of its gradient are from the reference's, and which layout of the rows was used. What ends with
an error is listed with the error's last line, and the log stays in the folder of outputs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = ROOT / "example_configs" / "quickstart" / "data"
CHECKPOINTING: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}
QLORA: dict[str, Any] = {
    "adapter": "qlora",
    "load_in_4bit": True,
    "optimizer": "paged_adamw_32bit",
    **CHECKPOINTING,
}
UNPAIRED: dict[str, Any] = {
    "aot_mode": "unpaired",
    "micro_batch_size": 8,
    "datasets": [{"path": str(DATA / "unpaired_train.jsonl"), "type": "chat_template.default"}],
}
FULL: dict[str, Any] = {"adapter": None, "learning_rate": 1e-5}
FLOAT32: dict[str, Any] = {"bf16": False, "tf32": False}
LIGER: dict[str, Any] = {
    "plugins": ["axolotl.integrations.liger.LigerPlugin"],
    "liger_rope": True,
    "liger_rms_norm": True,
    "liger_glu_activation": True,
}
BASE: dict[str, Any] = {
    "rl": "aot",
    "aot_mode": "paired",
    "rl_beta": 0.1,
    "chat_template": "tokenizer_default",
    "datasets": [{"path": str(DATA / "paired_train.jsonl"), "type": "chat_template.default"}],
    "dataset_num_proc": 0,
    "sequence_len": 256,
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_linear": True,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "max_steps": 4,
    "optimizer": "adamw_torch_fused",
    "lr_scheduler": "constant",
    "learning_rate": 5e-4,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "bf16": True,
    "logging_steps": 1,
    "save_steps": 4,
    "save_only_model": True,  # what the figures are read from is the trainer's state
    "seed": 1,
}

SETUPS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "lora, float32": (None, FLOAT32),
    "unpaired, float32": (None, {**UNPAIRED, **FLOAT32}),
    "full, float32": (None, {**FULL, **FLOAT32}),
    "lora": ("lora, float32", {}),
    "lora, tf32": ("lora, float32", {"bf16": False, "tf32": True}),
    "lora, fp16": ("lora, float32", {"bf16": False, "fp16": True}),
    "eager": ("lora, float32", {"attn_implementation": "eager"}),
    "flex": ("lora, float32", {"attn_implementation": "flex_attention"}),
    "micro-batches of one": (
        "lora, float32",
        {"micro_batch_size": 1, "gradient_accumulation_steps": 16},
    ),
    "checkpointing": ("lora, float32", CHECKPOINTING),
    "checkpointing, the host's default": ("lora, float32", {"gradient_checkpointing": True}),
    "checkpointing, offload": ("lora, float32", {"gradient_checkpointing": "offload"}),
    "activation offloading": ("lora, float32", {"activation_offloading": True, **CHECKPOINTING}),
    "compiled": ("lora, float32", {"torch_compile": True}),
    "lora kernels": (
        "lora, float32",
        {f"lora_{part}_kernel": True for part in ("mlp", "qkv", "o")},
    ),
    "liger": ("lora, float32", LIGER),
    "cached reference": ("lora, float32", {"precompute_ref_log_probs": True}),
    "qlora": ("lora, float32", QLORA),
    "8-bit base": ("lora, float32", {"load_in_8bit": True}),
    "rslora, dora": ("lora, float32", {"peft_use_dora": True, "peft_use_rslora": True}),
    "unpaired": ("unpaired, float32", UNPAIRED),
    "unpaired, qlora": ("unpaired, float32", {**UNPAIRED, **QLORA}),
    "full": ("full, float32", FULL),
    "full, 8-bit optimizer": (
        "full, float32",
        {**FULL, "optimizer": "adamw_bnb_8bit", **CHECKPOINTING},
    ),
    "full, unpaired, cached reference": (
        None,
        {**FULL, **UNPAIRED, "precompute_ref_log_probs": True},
    ),
}
"""Name -> (the set-up that it is compared with, keys on top of ``BASE``)."""


def train(name: str, keys: dict[str, Any], model: Path, out: Path) -> dict[str, Any]:
    """One run of the host's command."""
    import yaml

    folder = out / re.sub(r"\W+", "-", name)
    folder.mkdir(parents=True, exist_ok=True)
    cfg = {**BASE, "base_model": str(model), "output_dir": str(folder / "out"), **keys}
    cfg["dataset_prepared_path"] = str(folder / "prepared")
    cfg = {key: value for key, value in cfg.items() if value is not None}
    (folder / "config.yml").write_text(yaml.safe_dump(cfg))
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(folder / "config.yml")]
    env = {
        **os.environ,
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    start = time.monotonic()
    log = folder / "log"
    with log.open("w") as file:
        code = subprocess.run(
            [*command, "--launcher", "python"], env=env, cwd=ROOT, stdout=file, stderr=file
        ).returncode
    found = {"name": name, "seconds": round(time.monotonic() - start, 1), **said(log)}
    states = sorted((folder / "out").glob("checkpoint-*/trainer_state.json"))
    if code == 0 and states:
        history = json.loads(states[-1].read_text())["log_history"]
        steps = [entry for entry in history if "grad_norm" in entry]
        found["losses"] = [entry["loss"] for entry in steps]
        found["gradient_norms"] = [entry["grad_norm"] for entry in steps]
    else:
        found["failed"] = last_error(log)
    print(json.dumps(found), flush=True)
    return found


def said(log: Path) -> dict[str, Any]:
    """What the plugin wrote about the layout, and its warnings."""
    lines = log.read_text(errors="replace").splitlines()
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    speed = [line.split("speed:", 1)[1].strip() for line in plain if "speed:" in line]
    warnings = [line[:400] for line in plain if "WARNING" in line and "aot_plugin" in line]
    return {"speed": speed[:4], "warnings": warnings[:6]}


def last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"\S*(Error|Exception|error)\b.*:", line)]
    return (errors or lines or ["no output"])[-1][:600]


def compared(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table."""
    rows = []
    for name, (reference, _) in SETUPS.items():
        if name not in found:
            continue
        run, row = found[name], {"name": name}
        exact = found.get(reference or "", {})
        if "failed" in run:
            row["failed"] = run["failed"]
        elif exact.get("losses") and len(exact["losses"]) == len(run["losses"]):
            row["loss_off"] = max(
                abs(a - b) for a, b in zip(run["losses"], exact["losses"], strict=True)
            )
            row["gradient_off"] = [
                round(a / b - 1, 4)
                for a, b in zip(run["gradient_norms"], exact["gradient_norms"], strict=True)
            ]
        else:
            row["losses"] = run["losses"]
        rows.append({**row, "speed": run["speed"][:1]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "outputs" / "smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu_host")
    parser.add_argument("--only", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--workers", type=int, default=8, help="runs at a time (%(default)s)")
    parser.add_argument("--json", type=Path, help="append what is found to this file")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.workers) as pool:
        one = partial(train, model=args.model.resolve(), out=args.out.resolve())
        runs = pool.map(lambda name: one(name, SETUPS[name][1]), args.only)
        found = dict(zip(args.only, runs, strict=True))
    for row in compared(found):
        print(json.dumps(row))
    if args.json:
        import torch

        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        with args.json.open("a") as file:
            for run in found.values():
                file.write(json.dumps({"card": card, "torch": torch.__version__, **run}) + "\n")
    failed = [name for name, run in found.items() if "failed" in run]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
