"""A small job with text and video, as the end-to-end tests have, and its data."""

from __future__ import annotations

import av
import numpy as np
import pytest

from ringworld_jobs.load import load_job
from ringworld_jobs.spec import JobSpec
from ringworld_workers.parity.rows import JobData, open_data

RECIPE = """
kind: data
name: small
tokenizer: {train: {vocabulary_size: 300}}
codebook: {codebook_size: 16, frame_size: 8, patch_size: 4, iterations: 2}
videos:
  ball:
    path: ball.mkv
    captions: [{start: 0, end: 2, text: "A ball rolls."}, {start: 2, end: 4, text: "It rests."}]
datasets:
  notes: {kind: text, files: ["notes-*.txt"]}
  clips: {kind: video_text, videos: [ball], fps: 10, frames_per_clip: 5}
"""

JOB = """
kind: train
name: small
model: {hidden_size: 32, ffn_size: 48, num_layers: 3, num_heads: 4, num_kv_heads: 2}
data: {recipe: recipe.yaml, cache: cache}
resources: {accelerator: cpu, workers: {max: 2}}
defaults:
  learning_rate: {peak: 3e-3}
  mixture: {clips: 0.4, notes: 0.6}
  steps: 1
stages:
- {name: first, context_length: 256, rope_theta: 1e4, global_batch_tokens: 256}
- name: second
  context_length: 1536
  rope_theta: 1e5
  global_batch_tokens: 1536
  memory: {activation_checkpointing: attention_saved}
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[JobSpec, JobData]:
    """A small job with text and video, as the end-to-end tests have, and its data."""
    folder = tmp_path_factory.mktemp("job")
    for index in range(6):
        order = np.random.default_rng(index).permutation(30)
        text = " ".join(f"Note {k} of the ring {k % 7}." for k in order)
        (folder / f"notes-{index}.txt").write_text(text)
    with av.open(str(folder / "ball.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
        for index in range(40):
            pixels = np.full((16, 16, 3), 90, np.uint8)
            pixels[4:8, index % 12 : index % 12 + 4] = (230, 100, 40 + index)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "job.yaml").write_text(JOB.replace("cache: cache", f"cache: {folder / 'cache'}"))
    spec = load_job(folder / "job.yaml")
    return spec, open_data(spec, lambda phase, done, total: None)
