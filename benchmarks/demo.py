"""Writes the demo's figures into README.md: what `make demo` measured, and the tags of docs/demo.ogg.

    make results      # make demo, then python benchmarks/demo.py

They stand between `<!-- demo -->` and `<!-- /demo -->` (metrics, from workspace/runs/demo/scores), and `<!-- tags -->`
and `<!-- /tags -->` (from `main.py predict`). A processor of another instruction set rounds otherwise, and sixteen
epochs turn that into other figures: the block names the instruction set.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RUN = Path("workspace/runs/demo")
SHOWN = ("intersection F1", "collar F1", "PSDS1")  # of test_detection.json; the first criterion of each


def interval_of(metric: dict[str, Any]) -> str:
    interval = metric["interval"]
    return f" ({interval['low']:.3f} to {interval['high']:.3f})" if interval else ""


def metrics_table() -> str:
    """The rows of README's table of the demo, from the score files of `make demo`."""
    tagging = json.loads((ROOT / RUN / "scores/test.json").read_text())["metrics"][0]
    detection = json.loads((ROOT / RUN / "scores/test_detection.json").read_text())["metrics"]
    first = {metric["name"]: metric for metric in reversed(detection)}
    rows = [(f"{tagging['name']}, {tagging['clips']} test clips", f"{tagging['value']:.3f}{interval_of(tagging)}")]
    rows += [(name, f"{first[name]['macro']:.3f}") for name in SHOWN]
    head = f"| `make demo` (clip labels only, calibrated; {torch.backends.cpu.get_cpu_capability()}) | |"
    return "\n".join([head, "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def tags() -> str:
    """The command of README's section "Tag a file" and what it prints."""
    words = ["main.py", "predict", "--resume_checkpoint", str(RUN / "checkpoints/best.ckpt"), "docs/demo.ogg"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, text=True)
    lines = [f"$ python {' '.join(words)}", *done.stdout.rstrip().splitlines()]
    return "\n" + "\n".join(f"    {line}".rstrip() for line in lines) + "\n"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for mark, block in (("demo", metrics_table()), ("tags", tags())):
        found = re.search(rf"(?<=<!-- {mark} -->\n).*?(?=\n<!-- /{mark} -->)", text, flags=re.DOTALL)
        if found is None:
            sys.exit(f"README.md lacks <!-- {mark} --> or <!-- /{mark} -->")
        text = text[: found.start()] + block + text[found.end() :]
        print(block)
    readme.write_text(text)


if __name__ == "__main__":
    main()
