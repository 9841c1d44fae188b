"""Run jobs/quickstart.yaml from nothing and write down how long it takes and what is learned.

    .venv/bin/python benchmarks/quickstart.py

Writes benchmarks/results/quickstart-<date>.md. The held-out loss is compared, in the same run,
with the entropy of the held-out tokens: what a model blind to context could reach at best.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    """Run the job in a folder of its own, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep the run's folder, and print it")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ringworld-quickstart-"))
    command = [str(Path(sys.executable).with_name("ringworld")), "run"]
    job = ROOT / "jobs" / "quickstart.yaml"
    started = time.monotonic()
    subprocess.run([*command, str(job)], cwd=folder, check=True)
    wall_seconds = time.monotonic() - started
    log = (folder / "runs" / "quickstart-1" / "metrics.jsonl").read_text().splitlines()
    table = render([json.loads(line) for line in log], wall_seconds)
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"quickstart-{date.today().isoformat()}.md"
    target.write_text(table)
    print(table)
    print(f"written to {target.relative_to(ROOT)}")
    if arguments.keep:
        print(f"the run is in {folder}")
    else:
        shutil.rmtree(folder)


def render(records: list[dict[str, Any]], wall_seconds: float) -> str:
    """A markdown page with a row per stage."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    lines = [
        "# Quickstart, from an empty cache",
        "",
        f"`python benchmarks/quickstart.py` at {commit or 'an unknown commit'}, "
        f"{date.today().isoformat()}, {os.cpu_count()} CPU cores, Python "
        f"{platform.python_version()}. Wall time {wall_seconds:.0f} s, data preparation and Ray's "
        "start included.",
        "",
        "Losses in nats per token on held-out rows; in brackets the entropy of those very tokens,",
        "which no model that ignores context can beat.",
        "",
        "| stage | context | ring | steps | text | vision | tokens/s (median) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for start in (record for record in records if record["kind"] == "stage_start"):
        mine = [record for record in records if record["stage"] == start["stage"]]
        score = next(record for record in mine if record["kind"] == "validation")
        rates = sorted(r["tokens_per_second"] for r in mine if r["kind"] == "step")
        cells = [
            start["stage"],
            f"{start['context_length']:,}",
            f"{start['ring_size']} x {start['data_parallel_size']}",
            str(start["num_steps"]),
            *(
                f"{score[f'loss_{m}']:.2f} ({score[f'unigram_entropy_{m}']:.2f})"
                for m in ("text", "vision")
            ),
            f"{rates[len(rates) // 2]:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
