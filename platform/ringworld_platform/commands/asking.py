"""What the commands that ask a model share: its loading as one line, and errors as one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from ringworld_platform.commands.checkpoint_frame import plain_errors
from ringworld_platform.console import FAILED, MISTAKE, err

if TYPE_CHECKING:
    from ringworld_model.sampling.answer import Event
    from ringworld_workers.generation.coder import Coder
    from ringworld_workers.generation.local_ring import LocalRing

_SHOWN_TOKENS = 4096
"""Prompts from this length on are worth a line about how they are read."""


@contextmanager
def asking_errors() -> Iterator[None]:
    """End the command with one line where a model cannot be loaded or asked so."""
    from ringworld_jobs.prompts_file import PromptsError
    from ringworld_model.hf_config import WeightsError
    from ringworld_model.sampling.draw import DrawError
    from ringworld_workers.data.files import DataError
    from ringworld_workers.generation.local_ring import OutOfMemory, RingError
    from ringworld_workers.generation.source import RequestError

    try:
        with plain_errors():
            yield
    except (
        *(RequestError, PromptsError, DataError),
        *(WeightsError, RingError, DrawError),
    ) as error:
        err().print(f"error: {error}", style="red", markup=False)
        mistake = isinstance(error, RequestError | PromptsError)
        raise typer.Exit(MISTAKE if mistake else FAILED) from None
    except OutOfMemory as error:
        first = str(error).splitlines()[0]
        err().print(
            f"error: {first} Spread the context over a larger --ring, or take --dtype bf16 or a "
            "smaller --chunk",
            style="red",
            markup=False,
        )
        raise typer.Exit(FAILED) from None


def load_vocabularies(
    model: str, runs: Path, tokenizer: Path | None, codebook: Path | None
) -> Coder:
    """Find a model, and load what turns questions into its tokens; its weights are not read.

    Raises:
        UnknownRunError: there is no such model.
        RequestError, DataError, CheckpointError, StoreError, WeightsError: it cannot be used.
    """
    from ringworld_platform.model_places import find_model
    from ringworld_workers.generation.coder import load_coder

    return load_coder(find_model(model, runs, tokenizer=tokenizer, codebook=codebook))


@contextmanager
def open_ring(
    coder: Coder, *, ring: int, device: str, dtype: str, chunk: int
) -> Iterator[LocalRing]:
    """The model on a ring of this machine's processes; all of them are gone at the end."""
    from ringworld_workers.generation.local_ring import LocalRing

    with ExitStack() as stack:
        with err().status(f"loading {coder.label}") as line:
            made = LocalRing(
                coder.source,
                size=ring,
                device=device,
                dtype=dtype,
                coder=coder,
                chunk=chunk,
                on_tensor=lambda done, of: line.update(
                    f"loading {coder.label}: {done}/{of} tensors"
                ),
            )
            stack.enter_context(made)
        yield made


def standard_input() -> TextIO:
    """Standard input, whose bytes that are no UTF-8 are refused with the text that they are in."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


class Reading:
    """Says how far a long prompt is read, on standard error: a bar on a terminal, else a line."""

    def __init__(self, least: int = _SHOWN_TOKENS) -> None:
        """Begin now; shorter prompts than ``least`` tokens are not worth a word."""
        self._least = least
        self._begun = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        """Take (tokens read, tokens in all), as ``on_chunk``."""
        if total < self._least:
            return
        seconds = time.monotonic() - self._begun
        text = f"read {done:,}/{total:,} tokens, {done / max(seconds, 1e-6):,.0f} tokens/s"
        if self._terminal:
            sys.stderr.write(f"\r{text}\x1b[K" + ("\n" if done == total else ""))
            sys.stderr.flush()
        elif done == total:
            err().print(f"{text}, {seconds:.1f} s", markup=False)


def stream_text(events: Iterator[Event], on_event: Callable[[Event], Any]) -> tuple[int, float]:
    """Write text to standard output as it comes.

    Args:
        events: of one answer.
        on_event: told of each event, before its text is written.

    Returns:
        Tokens, and seconds from the first to the last.
    """
    tokens, begun, last = 0, 0.0, ""
    for event in events:
        begun = begun or time.monotonic()
        tokens += event.token is not None
        on_event(event)
        if event.text:
            sys.stdout.write(event.text)
            sys.stdout.flush()
            last = event.text
    if last and not last.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    return tokens, time.monotonic() - begun if begun else 0.0


def rate_text(tokens: int, seconds: float) -> str:
    """How fast an answer came: the first token's time is that of the prompt."""
    speed = f", {(tokens - 1) / seconds:,.1f} tokens/s" if tokens > 1 and seconds > 0 else ""
    return f"{tokens:,} token{'' if tokens == 1 else 's'}{speed}"
