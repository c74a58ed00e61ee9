"""What the installed plugin costs a run that does not use it: processor time and memory.

`axolotl train --help`, and the validation of an SFT config (the point at which the host imports its
plugins), each with the plugin and with its entry point hidden, in turns.

    python benchmarks/guest_cost.py --turns 5
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WORK = """
import resource, sys, time
hidden, config = sys.argv[1] == "hidden", sys.argv[2]
if hidden:
    import importlib.metadata as metadata
    real = metadata.entry_points
    metadata.entry_points = lambda **keys: type(real(**keys))(
        point for point in real(**keys) if not point.value.startswith("aot_plugin")
    )
if config == "help":
    sys.argv = ["axolotl", "train", "--help"]
    from axolotl.cli.main import main
    try:
        main()
    except SystemExit:
        pass
else:
    from axolotl.cli.config import load_cfg
    sys.argv = ["axolotl"]
    load_cfg(config)
usage = resource.getrusage(resource.RUSAGE_SELF)
print("USAGE", usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, "aot_plugin" in sys.modules)
"""

SFT = """
base_model: {model}
datasets: [{{path: {rows}, ds_type: json, type: completion}}]
sequence_len: 256
micro_batch_size: 1
gradient_accumulation_steps: 1
num_epochs: 1
learning_rate: 0.001
"""


def usage(plugin: str, work: str) -> tuple[float, float, bool]:
    """(processor seconds, MB at most, whether the plugin was imported) of one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", WORK, plugin, work],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        env={**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"},
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("USAGE "))
    _, seconds, size, imported = line.split()
    return float(seconds), float(size), imported == "True"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--model", type=Path, default=Path(__file__).parents[1] / "outputs/smollm2-135m-instruct"
    )
    parser.add_argument("--json", type=Path, help="append the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = Path(name) / "rows.jsonl"
        rows.write_text('{"text": "one row"}\n')
        config = Path(name) / "sft.yml"
        config.write_text(SFT.format(model=args.model, rows=rows))
        for title, work in (("axolotl train --help", "help"), ("SFT config", str(config))):
            found: dict[str, list[tuple[float, float, bool]]] = {"hidden": [], "installed": []}
            for _ in range(args.turns):
                for plugin in found:
                    found[plugin].append(usage(plugin, work))
            result = {"work": title, "turns": args.turns}
            for plugin, values in found.items():
                seconds, sizes, imported = zip(*values, strict=True)
                result[plugin] = {
                    "cpu_seconds": [round(value, 2) for value in sorted(seconds)],
                    "median_cpu_seconds": round(statistics.median(seconds), 2),
                    "median_mb": round(statistics.median(sizes), 1),
                    "imported": all(imported),
                }
            print(json.dumps(result, indent=1))
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
