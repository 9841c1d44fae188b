"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job spec.")]
RunName = Annotated[str, typer.Argument(metavar="JOB", help="A job's name (its newest run) or id.")]
NewestRun = Annotated[
    str | None,
    typer.Argument(metavar="[JOB]", help="A job's name or a run id; the newest run if left out."),
]
Runs = Annotated[
    Path, typer.Option("--runs", metavar="DIR", help="Folder of runs, when no cluster is asked.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="ADDRESS", help="Ray cluster, such as ray-head:6379 or auto."
    ),
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="Look in a store on S3, such as s3://BUCKET/PREFIX, instead of here.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
JsonLines = Annotated[
    bool, typer.Option("--json", help="Print JSON for other programs, one object a line.")
]
Cpus = Annotated[
    int | None,
    typer.Option("--cpus", min=1, help="CPU cores that Ray may hand out; all if left out."),
]

DEFAULT_RUNS = Path("runs")
