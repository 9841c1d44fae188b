"""How fast rows come: read, packed and cut for a ring, against what the quickstart consumes.

    .venv/bin/python benchmarks/loader.py

One process, one thread, the quickstart's own data and stages. Writes
benchmarks/results/loader-<date>.md. The quickstart's consumption is the fastest stage's in the
newest benchmarks/results/quickstart-*.md.
"""

from __future__ import annotations

import argparse
import re
import time
from datetime import date
from pathlib import Path

import torch

from ringworld_jobs.load import load_job
from ringworld_jobs.spec import StageSpec
from ringworld_jobs.units import format_tokens
from ringworld_model.batch import cut
from ringworld_model.ring import plan_rows
from ringworld_workers.data.loader import StageLoader
from ringworld_workers.data.prepare import build

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    """Measure every stage, best of three, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".ringworld/data"))
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    job = load_job(ROOT / "jobs" / "quickstart.yaml")
    assert job.data.recipe is not None
    prepared = build(Path(job.data.recipe), arguments.cache)
    places = job.data.places({name: str(path) for name, path in prepared.datasets.items()})
    consumed = consumption()
    lines = [
        "# Loader: rows read, packed and cut for a ring",
        "",
        "`python benchmarks/loader.py`, one thread, CPU time (the machine had other work), best of "
        f"three. The quickstart's fastest stage consumes {consumed:,.0f} tokens/s.",
        "",
        "| stage | context | packing | read and packed, tokens/s | times the quickstart "
        "| also planned and cut for a ring of 2, tokens/s | times the quickstart |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage in job.stages:
        for packing in ("best_fit", "sequential"):
            measured = stage.model_copy(update={"packing": packing})
            loader = StageLoader(places, measured, job.seed, data=job.data)
            loader.step_rows(0)
            packed = rate(loader, measured, arguments.seconds, ring_size=None)
            ready = rate(loader, measured, arguments.seconds, ring_size=2)
            lines.append(
                f"| {stage.name} | {format_tokens(stage.context_length)} | {packing} "
                f"| {packed:,.0f} | {packed / consumed:.0f} "
                f"| {ready:,.0f} | {ready / consumed:.0f} |"
            )
            print(lines[-1])
    target = RESULTS / f"loader-{date.today().isoformat()}.md"
    target.write_text("\n".join(lines) + "\n")
    print(f"written to {target.relative_to(ROOT)}")


def rate(loader: StageLoader, stage: StageSpec, seconds: float, ring_size: int | None) -> float:
    """Tokens a second of CPU time, best of three; steps are new each time."""
    best, step = 0.0, 1
    for _ in range(3):
        started, tokens = time.process_time(), 0
        while time.process_time() - started < seconds / 3:
            for batch in loader.step_rows(step):
                tokens += batch.tokens.numel()
                if ring_size is not None:
                    plans = plan_rows(batch.document_lengths, stage.context_length, ring_size)
                    cut(batch, plans, 0)
            step += 1
        best = max(best, tokens / (time.process_time() - started))
    return best


def consumption() -> float:
    """Tokens a second of the quickstart's fastest stage, as last measured."""
    newest = sorted(RESULTS.glob("quickstart-*.md"))[-1].read_text()
    header, *rows = [line for line in newest.splitlines() if line.startswith("|")]
    column = next(
        i for i, cell in enumerate(header.split("|")) if "tokens" in cell and "/s" in cell
    )
    found = [row.split("|")[column].replace(",", "") for row in rows]
    return max(float(cell) for cell in found if re.fullmatch(r"\s*[\d.]+\s*", cell))


if __name__ == "__main__":
    main()
