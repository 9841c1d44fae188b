"""docs/ring_attention.md: its picture and table are what the code says, and its snippet runs."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ringworld_model.ring import plan_ring
from ringworld_model.ring.layout import BLOCK_CYCLIC_TOKENS, LAYOUTS

PAGE = (Path(__file__).parents[3] / "docs/ring_attention.md").read_text()
TOTAL = 65536
SHORT = sorted(random.Random(1).sample(range(1, TOTAL), 71))
DOCUMENTS = {
    "1": [TOTAL],
    "11, long tail": [30000, 12000, 8000, 5000, 3500, 2500, 1800, 1200, 800, 500, 236],
    "72, short": [b - a for a, b in zip([0, *SHORT], [*SHORT, TOTAL], strict=True)],
}


def marked(name: str) -> list[str]:
    """Lines of the table or the code block behind a mark."""
    found = re.search(rf"<!-- {name}:.*?-->\n(```\w*\n(.*?)```|((\|[^\n]*\n)+))", PAGE, re.DOTALL)
    assert found, f"the page has no block marked {name}"
    return (found[2] or found[3]).splitlines()


@pytest.mark.parametrize("line", marked("layouts"))
def test_the_picture_is_the_layout(line):
    name, *cells = line.split()[:17]
    assert name in LAYOUTS
    cell = BLOCK_CYCLIC_TOKENS if name == "block_cyclic" else 1
    plan = plan_ring([8 * cell] * 2, 16 * cell, 4, name)
    held = [set((plan.local_indices(rank) // cell).tolist()) for rank in range(4)]
    assert [int(rank) for rank in cells] == [
        next(rank for rank in range(4) if index in held[rank]) for index in range(16)
    ]


@pytest.mark.parametrize("line", marked("balance")[2:])
def test_the_balance_is_what_the_plans_count(line):
    documents, ring, *cells = (cell.strip() for cell in line.strip("|").split("|"))
    for name, cell in zip(LAYOUTS, cells, strict=True):
        plan = plan_ring(DOCUMENTS[documents], TOTAL, int(ring), name)
        steps = range(plan.ring_size)
        calls = max(sum(len(plan.rectangles(rank, step)) for step in steps) for rank in steps)
        assert cell == f"{plan.imbalance:.2f}, {calls}", name


@pytest.mark.timeout(120)
def test_the_snippet_runs(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text("\n".join(marked("snippet")) + "\n")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = sorted(done.stdout.splitlines())
    assert len(said) == 2, said
    for rank, line in enumerate(said):
        assert re.fullmatch(rf"rank {rank} of 2: \w+, \d+ tokens, right", line)
