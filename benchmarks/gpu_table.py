"""The figures that benchmarks/gpu.sh left in a folder, as Markdown.

python benchmarks/gpu_table.py FOLDER
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPERATIONS = 15  # of the profile
TARGETS = {  # of an H100
    "trainer": "4,000",
    "ratio_to_plain": "7",
    "overhead": "at most 3 %",
    "inference": "12,000",
    "waiting": "under 2 %",
}


def read(path: Path) -> dict[str, Any]:
    """{} for what a step did not leave."""
    return json.loads(path.read_text()) if path.is_file() else {}


def lines(folder: Path) -> Iterator[str]:
    trainer, triton, whole = (read(folder / f"{name}.json") for name in ("trainer", "triton", "benchmark"))
    device = trainer.get("machine", {}).get("device") or whole.get("device", "unknown device")
    yield f"## {device}, torch {trainer.get('machine', {}).get('torch') or whole.get('torch', '?')}\n"
    yield "| what | figure | target |"
    yield "|---|--:|--:|"
    for name, found in (("SDPA", trainer), ("Triton attention", triton)):
        figures = found.get("results")
        if not figures:
            yield f"| training, {name} | no figure | {TARGETS['trainer']} |"
            continue
        how = f"{figures['precision']}, compile {figures['compile']}, batch {figures['batch_size']}, {name}"
        yield f"| training through the Trainer, clips/s ({how}) | {figures['trainer']:,.0f} | {TARGETS['trainer']} |"
        yield f"| the same in a bare loop, clips/s | {figures['bare_loop']:,.0f} | |"
        yield f"| longer through the Trainer | {figures['overhead']:+.1%} | {TARGETS['overhead']} |"
        yield f"| memory, GiB | {figures['memory'] / 2**30:.1f} | |"
        if "plain" in figures:
            yield f"| plain, float32, batch {figures['plain_batch_size']}, clips/s | {figures['plain']:,.0f} | |"
            yield f"| Trainer against plain | {figures['ratio_to_plain']:.2f} | {TARGETS['ratio_to_plain']} |"
    for row in whole.get("rows", []):
        what = f"benchmark: {row['work']} from {row['data']}, {row['precision']}, compile {row['compile']}"
        if row["clips_per_second"] is None:
            yield f"| {what} | out of memory | |"
            continue
        target = TARGETS["inference"] if row["work"] == "inference" else TARGETS["trainer"]
        yield f"| {what}, clips/s | {row['clips_per_second']:,.0f} | {target} |"
        if row["data"] == "store":
            yield f"| waiting for data, {row['work']} | {row['waiting']:.1%} | {TARGETS['waiting']} |"
    if whole.get("operations"):
        yield "\n| operation of training steps | calls | ms | share |"
        yield "|---|--:|--:|--:|"
        for each in whole["operations"][:OPERATIONS]:
            name = each["name"].replace("|", "/")[:80]
            yield f"| `{name}` | {each['calls']} | {each['milliseconds']:.1f} | {each['share']:.1%} |"
    yield "\n| step | exit status (124: too long) | seconds |"
    yield "|---|--:|--:|"
    for step in (folder / "steps.tsv").read_text().splitlines():
        yield f"| {' | '.join(step.split(chr(9)))} |"


if __name__ == "__main__":
    print("\n".join(lines(Path(sys.argv[1]))))
