"""A committed checkpoint's fp32 master weights in Hugging Face's layout, streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ringworld_jobs.spec import JobSpec
from ringworld_model.hf_save import MAX_SHARD_BYTES, write_pretrained
from ringworld_model.hf_sink import Sink
from ringworld_model.vision.frame_tokenizer import load_frame_tokenizer
from ringworld_workers.checkpoint.layout import CheckpointRef
from ringworld_workers.checkpoint.range_reader import RangeReader
from ringworld_workers.checkpoint_tools.choose import manifest_of
from ringworld_workers.checkpoint_tools.held_config import held_config
from ringworld_workers.data.tokenizer import TextTokenizer, load_tokenizer
from ringworld_workers.engine.base import OwnedRange
from ringworld_workers.generation.folder import CODEBOOK, write_about
from ringworld_workers.store.base import Store

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_checkpoint(
    store: Store,
    ref: CheckpointRef,
    spec: JobSpec,
    sink: Sink,
    *,
    dtype: Dtype = "fp32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: Path | None = None,
    codebook: Path | None = None,
    about: Mapping[str, Any] | None = None,
    on_tensor: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, int]:
    """Write a checkpoint so that ``transformers`` loads it, and ``from_pretrained`` and init_from.

    Each parameter is read from the store, verified and written before the next one. config.json
    gets the rope_theta and the context_length of the checkpoint's stage.

    Args:
        store: the run's.
        ref: which checkpoint.
        spec: of the run; tables have the sizes of the checkpoint's.
        sink: where the files go, such as ``FolderSink``.
        dtype: of the weights.
        max_shard_bytes: most bytes of tensors in a file.
        tokenizer: a folder or file of the text tokenizer, to be written beside the weights; its
            ids of text start and end go to config.json.
        codebook: a folder or file of the frame tokenizer, to be written to ringworld/codebook.
        about: what the training data says of both, and the words of its chats; to
            ringworld/data.json. ``generate`` holds the vocabularies against it.
        on_tensor: told the parameter that is next, how many are done, and how many there are.

    Returns:
        Bytes of the files by name, config.json first.

    Raises:
        CheckpointError: it is damaged, or of another model than the spec's.
        WeightsError: the place is not empty, or its disk lacks the room.
        DataError: the tokenizer cannot be read.
        StoreError: the store, or that of the sink, failed.
    """
    manifest = manifest_of(store, ref)
    config = held_config(spec, manifest, ref)
    stage = spec.stages[ref.stage_index]
    source = RangeReader(store, manifest)
    text = None if tokenizer is None else load_tokenizer(tokenizer)
    done = 0

    def read(name: str) -> Tensor:
        nonlocal done
        on_tensor(name, done, len(manifest.tensors))
        done += 1
        shape = manifest.tensors[name]
        data = torch.empty(prod(shape), dtype=torch.float32)
        source.read_into(OwnedRange(name, "param", shape, 0, data))
        return data.view(shape)

    return write_pretrained(
        sink,
        config,
        read,
        rope_theta=stage.rope_theta,
        context_length=stage.context_length,
        dtype=DTYPES[dtype],
        max_shard_bytes=max_shard_bytes,
        bos_token_id=None if text is None else text.bos_id,
        eos_token_id=None if text is None else text.eos_id,
        finish=partial(_write_vocabulary, text, codebook, about),
    )


def _write_vocabulary(
    text: TextTokenizer | None, codebook: Path | None, about: Mapping[str, Any] | None, folder: Path
) -> None:
    if text is not None:
        text.save(folder)
    if codebook is not None:
        place = folder / CODEBOOK
        place.mkdir(parents=True)
        load_frame_tokenizer(codebook).save(place)
    if about:
        write_about(folder, about)
