"""examples/hugging_face.py: a Llama trains over a ring, and its gradients are one rank's."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ringworld_model.ring import plan_ring
from ringworld_model.ring.layout import LAYOUTS

EXAMPLE = Path(__file__).parents[3] / "examples/hugging_face.py"


@pytest.fixture(scope="module")
def example():
    """The example as a module; transformers is imported by its ranks only."""
    spec = importlib.util.spec_from_file_location("hugging_face", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(240)
def test_it_learns_with_the_gradients_of_one_rank():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps", "4", "--context-length", "1024", "--check"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"step +\d+  loss (\S+)", done.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] - 1, done.stdout
    count, error = re.search(r"worst of (\d+) gradients, \S+: off by (\S+)", done.stdout).groups()
    # Of two layers with seven matrices and two norms each, the embedding, the last norm, the head.
    assert count == "21" and 0 < float(error) <= 1e-5


def test_wrong_gradients_fail_the_check(example):
    right = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    assert "b: off by 0.0e+00" in example.compare(right, right)
    assert "a: off by 5.0e-06" in example.compare(right | {"a": torch.full((3,), 1 + 5e-6)}, right)
    for wrong in (torch.full((3,), 1 + 2e-5), torch.full((3,), torch.nan)):
        with pytest.raises(RuntimeError, match="a: off by .*, more than 1e-05"):
            example.compare(right | {"a": wrong}, right)
    with pytest.raises(RuntimeError, match="only one side has gradients of .'b'"):
        example.compare({"a": right["a"]}, right)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cut_keeps_positions_and_next_tokens_of_the_documents(example, layout):
    lengths = [5, 1, 300]
    documents = [torch.randint(256, (length,)) for length in lengths]
    plan = plan_ring(lengths, 306, 4, layout)
    held = []
    for rank in range(4):
        cut = example.share(documents, plan, rank)
        assert cut["input_ids"].shape == (1, plan.local_length)
        assert torch.equal(cut["labels"], cut["shift_labels"])
        columns = (cut[name][0].tolist() for name in ("input_ids", "position_ids", "labels"))
        held += zip(plan.local_indices(rank).tolist(), *columns, strict=True)
    expected = [
        (int(token), at, int(document[at + 1]) if at + 1 < len(document) else -100)
        for document in documents
        for at, token in enumerate(document)
    ]
    rest = [(0, 0, -100)] * (len(held) - 306)
    assert [token for _, *token in sorted(held)] == [list(token) for token in expected + rest]
