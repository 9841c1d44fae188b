"""A codebook job from its clips to a folder with the trained tokenizer and its report.

The folder holds ``codebook/`` (config.json and weights), ``result.json``, ``report.png``,
``metrics.jsonl``, and while it is being trained ``frames/`` and ``state.pt``. State and frames are
replaced whole, so that a training that is killed at any moment goes on from the last state.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ringworld_jobs.codebook import CodebookJob
from ringworld_model.vision.frames import psnr
from ringworld_model.vision.vqgan_tokenizer import VQGANTokenizer
from ringworld_workers.codebook.clips import Clips, gather_clips
from ringworld_workers.codebook.quality import (
    MAX_FRAMES,
    continuous_psnr,
    evenly,
    fit_patches,
    measure,
)
from ringworld_workers.codebook.report import write_report
from ringworld_workers.codebook.trainer import Trainer
from ringworld_workers.codebook.update import Update
from ringworld_workers.data.files import DataError
from ringworld_workers.data.work import written_whole

METRICS_FILE, RESULT_FILE, REPORT_FILE = "metrics.jsonl", "result.json", "report.png"
_STATE_FILE, _FRAMES_FOLDER = "state.pt", "frames"
_YIELD_SECONDS = 0.5


def pick_device(wanted: str) -> str:
    """The device that a job's ``device`` comes to on this machine.

    Raises:
        DataError: a GPU is asked for, and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise DataError("device: cuda, but no GPU is to be found here; write auto or cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def train_codebook(
    job: CodebookJob, base: Path, out: Path, should_stop: Callable[[], bool]
) -> Iterator[Update]:
    """Train, and yield how far it is, twice a second at most; go on where a folder has a state.

    Args:
        job: the job.
        base: folder that its paths start from.
        out: folder of the result.
        should_stop: asked after every step; once it says so, the state is saved and training ends.

    Raises:
        DataError: clips that cannot be used, or a folder that holds another job's training.
    """
    training = _Training(job, base, out)
    if training.finished is not None:
        yield Update("done", job.training.steps, 1.0, {}, training.finished)
        return
    yield from training.run(should_stop)


class _Training:
    """One run of this process over a training."""

    def __init__(self, job: CodebookJob, base: Path, out: Path) -> None:
        self.job, self.base, self.out = job, base, out
        self.digest = _digest(job)
        self.finished = self._finished()
        self.latest: dict[str, float] = {}

    def run(self, should_stop: Callable[[], bool]) -> Iterator[Update]:
        device = pick_device(self.job.device)
        self.out.mkdir(parents=True, exist_ok=True)
        yield Update("decode clips", 0, 0.0, {})
        clips = gather_clips(self.job, self.base, self.out / _FRAMES_FOLDER)
        trainer = Trainer(self.job, clips.frames("train"), device)
        self.spent = self._restore(trainer)
        self.started = time.monotonic()
        self._forget_after(trainer.step)
        held_out = clips.frames("held_out")
        watched = np.array(held_out[evenly(len(held_out), MAX_FRAMES)])
        told = 0.0
        saved_step, saved_at = trainer.step, time.monotonic()
        with (self.out / METRICS_FILE).open("a", encoding="utf-8") as metrics:
            while (share := self._share(trainer.step)) < 1.0:
                figures = asdict(trainer.run_step(share))
                if trainer.step % self.job.training.evaluate_every_steps == 0:
                    figures |= self._evaluate(trainer, watched, device)
                self.latest |= figures
                record = {"step": trainer.step, "seconds": round(self._seconds(), 3), **figures}
                metrics.write(json.dumps(record) + "\n")
                stop, now = should_stop(), time.monotonic()
                due = self.job.training.save_every.due(trainer.step - saved_step, now - saved_at)
                if due or stop:
                    metrics.flush()
                    self._save(trainer)
                    saved_step, saved_at = trainer.step, time.monotonic()
                if now - told >= _YIELD_SECONDS or stop:
                    told = now
                    phase = "stopped" if stop else "train"
                    yield Update(phase, trainer.step, self._share(trainer.step), self.latest)
                if stop:
                    return
        yield Update("measure", trainer.step, 1.0, self.latest)
        result = self._finish(trainer, clips, device)
        yield Update("done", trainer.step, 1.0, self.latest, result)

    def _evaluate(self, trainer: Trainer, frames: Any, device: str) -> dict[str, float]:
        if not trainer.quantised:
            return {"held_out_psnr_db": continuous_psnr(trainer.model, frames, device)}
        tokenizer = VQGANTokenizer(trainer.model, device)
        codes = tokenizer.encode(frames)
        return {
            "held_out_psnr_db": psnr(tokenizer.decode(codes), frames),
            "held_out_codes_used": len(np.unique(codes)),
        }

    def _finish(self, trainer: Trainer, clips: Clips, device: str) -> dict[str, Any]:
        """Write the tokenizer and the report; what was only needed on the way goes last."""
        tokenizer = VQGANTokenizer(trainer.model, device)
        tokenizer.save(self.out)
        quality = measure(tokenizer, clips)
        patches = fit_patches(self.job, clips)
        plain = measure(patches, clips) if patches is not None else None
        result = {
            "name": self.job.name,
            "job_digest": self.digest,
            "tokenizer": tokenizer.describe(),
            "steps": trainer.step,
            "seconds": round(self._seconds(), 1),
            "device": device,
            "train_frames": len(clips.frames("train")),
            "held_out_frames": len(clips.frames("held_out")),
            "held_out": asdict(quality),
            "patch_codebook": asdict(plain) if plain is not None else None,
            "skipped": clips.skipped,
            "credits": sorted({v.credit for v in self.job.videos.values() if v.credit}),
        }
        write_report(
            self.out / REPORT_FILE,
            records=_records(self.out / METRICS_FILE),
            frames=clips.frames("held_out"),
            tokenizers={"VQGAN": tokenizer} | ({"patches": patches} if patches else {}),
            qualities={"VQGAN": quality} | ({"patches": plain} if plain else {}),
        )
        with written_whole(self.out / RESULT_FILE) as path:
            path.write_text(json.dumps(result, indent=1), encoding="utf-8")
        (self.out / _STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.out / _FRAMES_FOLDER, ignore_errors=True)
        return result

    def _seconds(self) -> float:
        """Seconds of training, those before a restart included."""
        return self.spent + time.monotonic() - self.started

    def _share(self, step: int) -> float:
        share = step / self.job.training.steps
        if self.job.training.time_limit is not None:
            share = max(share, self._seconds() / self.job.training.time_limit)
        return min(1.0, share)

    def _save(self, trainer: Trainer) -> None:
        state = {"job": self.digest, "seconds": self._seconds(), "trainer": trainer.state()}
        with written_whole(self.out / _STATE_FILE) as path:
            torch.save(state, path)

    def _restore(self, trainer: Trainer) -> float:
        """Load the folder's state, if it has one; returns the seconds spent so far."""
        path = self.out / _STATE_FILE
        if not path.is_file():
            return 0.0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            # What torch says would have the reader load it in a way that runs code.
            raise DataError(
                f"{path} is no state of a training, or damaged; remove it to begin anew"
            ) from error
        if state["job"] != self.digest:
            raise DataError(_other_job(self.out))
        trainer.restore(state["trainer"])
        return float(state["seconds"])

    def _forget_after(self, step: int) -> None:
        """Take out of the metrics what a killed training did after its last state."""
        path = self.out / METRICS_FILE
        kept = [record for record in _records(path) if record["step"] <= step]
        for record in kept:
            self.latest |= {k: v for k, v in record.items() if k not in ("step", "seconds")}
        with written_whole(path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")

    def _finished(self) -> dict[str, Any] | None:
        path = self.out / RESULT_FILE
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if result["job_digest"] != self.digest:
            raise DataError(_other_job(self.out))
        return result


def _digest(job: CodebookJob) -> str:
    """Changes with everything that changes what a step computes."""
    content = job.model_dump(mode="json")
    for name in ("save_every", "time_limit"):
        content["training"].pop(name)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _other_job(out: Path) -> str:
    return (
        f"{out} holds the training of another job, or of this one before it was changed; "
        "give another folder with --out, or remove it"
    )


def _records(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; a last line that a kill cut short does not count."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
