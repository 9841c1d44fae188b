"""The `ringworld` command: names, groups and examples. What commands do is in ``commands``."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import typer

from ringworld_platform.commands import (
    chat,
    checkpoints,
    data,
    data_look,
    data_needles,
    deploy,
    dev,
    evaluate,
    export,
    generate,
    look,
    machines,
    parity,
    plan,
    records,
    serve,
    track,
    train,
    train_codebook,
    validate,
    watch,
)
from ringworld_platform.console import Guarded, examples

TRAIN, ASK, LOOK, MACHINES = "Train", "Ask a model", "Look", "Data and machines"

app = typer.Typer(
    name="ringworld",
    cls=Guarded,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Train video and language world models on million-token contexts.\n\n"
        "The shortest path, on any laptop:  [bold cyan]ringworld run jobs/quickstart.yaml[/]"
    ),
    epilog=examples(
        "ringworld validate jobs/quickstart.yaml   # what would it do?",
        "ringworld run jobs/quickstart.yaml        # train here, in the foreground",
        "ringworld up; ringworld submit jobs/quickstart.yaml; ringworld watch",
        "ringworld COMMAND --help                  # more on one command",
    ),
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"ringworld {version('ringworld')}")
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the stack trace of an internal error."),
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Take the options that stand before a command."""


def _add(
    to: typer.Typer,
    panel: str | None,
    function: Callable[..., None],
    *lines: str,
    name: str | None = None,
    more: str = "",
) -> None:
    """Add a command; its docstring is its help, its paragraphs not broken where the code is."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    to.command(
        name=name,
        help="\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs),
        epilog=examples(*lines) + more,
        rich_help_panel=panel,
    )(function)


def _presets() -> str:
    from ringworld_model.config import PRESETS

    return f"\n\nModel presets: {', '.join(PRESETS)}."


_add(
    app,
    TRAIN,
    validate.validate,
    "ringworld validate jobs/quickstart.yaml",
    "ringworld validate jobs/quickstart.yaml --resolved   # every default",
    "ringworld validate jobs/lwm-text-7b.yaml --no-files  # plan without the data",
    more=_presets(),
)
_add(
    app,
    TRAIN,
    plan.plan,
    "ringworld plan jobs/quickstart.yaml                  # on this machine",
    "ringworld plan jobs/lwm-text-7b.yaml --gpus 64xH100-80GB --price 2.5",
    "ringworld plan job.yaml --cluster --json",
)
_add(
    app,
    TRAIN,
    parity.parity,
    "ringworld parity jobs/quickstart.yaml",
    "ringworld parity jobs/quickstart.yaml --stage 4k --ring-sizes 2,3 --precision fp64",
    "ringworld parity jobs/quickstart.yaml --run quickstart   # kept with the run",
)
_add(
    app,
    TRAIN,
    train.run,
    "ringworld run jobs/quickstart.yaml",
    "ringworld run jobs/quickstart.yaml --dashboard",
    "ringworld run jobs/quickstart.yaml | tee run.log     # plain lines",
)
_add(
    app,
    TRAIN,
    train.submit,
    "ringworld up && ringworld submit jobs/quickstart.yaml",
    "ringworld submit jobs/quickstart.yaml --address ray-head:6379",
    "ringworld submit job.yaml --address http://127.0.0.1:8265   # a tunnel to a dashboard",
)
_add(app, TRAIN, train.stop, "ringworld stop quickstart")
_add(
    app,
    TRAIN,
    train.resume,
    "ringworld resume quickstart",
    "ringworld resume quickstart-3 --runs runs",
    "ringworld resume s3://bucket/runs/quickstart-3       # begun on another machine",
)
_add(
    app,
    TRAIN,
    export.export,
    "ringworld export quickstart --to weights             # its last checkpoint",
    "ringworld export quickstart-3/4k --to weights --dtype bf16",
    "ringworld export s3://bucket/runs/quickstart-3 --to s3://bucket/weights",
)
_add(
    app,
    ASK,
    evaluate.evaluate,
    "ringworld evaluate quickstart/4k --task perplexity --data .ringworld/data/DIGEST/books",
    "ringworld evaluate weights --task needle --task multi_needle --workers 4",
    "ringworld evaluate eval.yaml                          # limits and all settings",
)
_add(
    app,
    ASK,
    generate.generate,
    'ringworld generate quickstart "My fellow Americans,"',
    'ringworld generate RUN "What is this?" --image cat.png',
    'ringworld generate RUN "A drummer in blue light" --to-image drummer.png',
    'ringworld generate RUN "A band plays" --to-video band.mp4 --from start.mp4 --frames 8',
    "ringworld generate weights --prompts questions.jsonl --out answers.jsonl --ring 2",
)
_add(
    app,
    ASK,
    chat.chat,
    "ringworld chat quickstart",
    "ringworld chat RUN --document book.txt --ring 2",
    "ringworld chat weights --video clip.mp4 --fps 2 < questions.txt",
)
_add(
    app,
    ASK,
    serve.serve,
    "ringworld serve quickstart                     # its last checkpoint, on 127.0.0.1:8000",
    "ringworld serve weights --ring 4 --max-concurrent 16",
    "ringworld serve weights --host 0.0.0.0 --api-key-file key",
)
_add(
    app,
    LOOK,
    look.status,
    "ringworld status                        # the newest run",
    "ringworld status quickstart-3 --json",
)
_add(
    app,
    LOOK,
    look.list_runs,
    "ringworld list",
    "ringworld list --state QUEUED,WAITING",
    "ringworld list --json",
    name="list",
)
_add(
    app,
    LOOK,
    watch.watch,
    "ringworld watch                         # the newest run",
    "ringworld watch quickstart --view ring",
    "ringworld watch s3://bucket/runs/quickstart-3",
    "ringworld watch quickstart --svg watch.svg --size 120x40",
)
_add(
    app,
    LOOK,
    records.events,
    "ringworld events                        # the newest run",
    "ringworld events quickstart --kind failure,slow --since 2h",
    "ringworld events quickstart-3 --json | jq .text",
    "ringworld events -f s3://bucket/runs/quickstart-3",
)
_add(
    app,
    LOOK,
    records.logs,
    "ringworld logs -f quickstart            # all ranks, as they come",
    "ringworld logs quickstart-3 --rank 0,4-7 --level warning",
    "ringworld logs quickstart --stage 16k --grep 'ring compute' --tail 20",
    "ringworld logs quickstart --json | jq 'select(.traceback)'",
)
_add(app, LOOK, look.report, "ringworld report", "ringworld report quickstart-3")
_add(
    app,
    LOOK,
    track.track,
    "ringworld track quickstart-3                         # MLflow was away at its end",
    "ringworld track quickstart-3 --to http://mlflow:5000",
)

checkpoints_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look at a run's checkpoints, compare, copy and remove them.",
)
_add(
    checkpoints_app,
    None,
    checkpoints.list_checkpoints,
    "ringworld checkpoints list quickstart",
    "ringworld checkpoints list s3://bucket/runs/quickstart-3 --json",
    name="list",
)
_add(
    checkpoints_app,
    None,
    checkpoints.show,
    "ringworld checkpoints show quickstart               # its newest one",
    "ringworld checkpoints show quickstart-3/4k/60 --tensors",
)
_add(
    checkpoints_app,
    None,
    checkpoints.verify,
    "ringworld checkpoints verify quickstart-3           # all of the run",
    "ringworld checkpoints verify s3://bucket/runs/quickstart-3/4k/60",
)
_add(
    checkpoints_app,
    None,
    checkpoints.diff,
    "ringworld checkpoints diff quickstart-1/4k quickstart-2/4k",
    "ringworld checkpoints diff -q quickstart-1 s3://bucket/runs/quickstart-1 && echo equal",
)
_add(
    checkpoints_app,
    None,
    checkpoints.copy,
    "ringworld checkpoints copy quickstart-3 s3://bucket/runs",
    "ringworld checkpoints copy s3://bucket/runs/quickstart-3/4k/60 backup",
)
_add(
    checkpoints_app,
    None,
    checkpoints.prune,
    "ringworld checkpoints prune quickstart-3 --dry-run",
    "ringworld checkpoints prune s3://bucket/runs/quickstart-3 --keep 2 --yes",
)
app.add_typer(checkpoints_app, name="checkpoints", rich_help_panel=LOOK)

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Prepare training data.")
_add(data_app, None, data.build, "ringworld data build jobs/recipes/quickstart.yaml")
_add(
    data_app,
    None,
    data_needles.needles,
    "ringworld data needles --to needles-2k.jsonl --tokens 2Ki --documents 4000",
    "ringworld data needles --to n.jsonl --tokens 8Ki --tokenizer tokenizer.json --seed 1",
)
_add(
    data_app,
    None,
    train_codebook.train_codebook,
    "ringworld data train-codebook jobs/codebooks/band.yaml",
    "ringworld data train-codebook clips.yaml --out codebooks/clips",
)
_add(
    data_app,
    None,
    data_look.inspect,
    "ringworld data inspect .ringworld/data/quickstart-1a2b3c4d5e6f7a8b",
    "ringworld data inspect jobs/recipes/quickstart.yaml --dataset clips --samples 8",
    "ringworld data inspect jobs/recipes/quickstart.yaml --context 8Ki,128Ki --rings 4,16",
)
_add(
    data_app,
    None,
    data_look.check,
    "ringworld data check .ringworld/data/quickstart-1a2b3c4d5e6f7a8b",
    "ringworld data check .ringworld/data/quickstart-1a2b3c4d5e6f7a8b/texts",
)
app.add_typer(data_app, name="data", rich_help_panel=MACHINES)
_add(
    app,
    MACHINES,
    machines.doctor,
    "ringworld doctor",
    "ringworld doctor jobs/quickstart.yaml   # and what this job needs",
)
_add(app, MACHINES, machines.up, "ringworld up", "ringworld up --cpus 4 --no-dashboard")
_add(app, MACHINES, machines.down, "ringworld down")
_add(
    app,
    MACHINES,
    deploy.deploy,
    "ringworld deploy --list",
    "ringworld deploy bucket --bucket my-runs --region us-east-1 --to deploy",
    "ringworld deploy kubernetes --bucket my-runs --image REGISTRY/ringworld:1",
)

dev_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Servers to try with.")
_add(
    dev_app,
    None,
    dev.s3,
    "ringworld dev s3 -- ringworld run jobs/quickstart-s3.yaml",
    "ringworld dev s3                     # stays until Ctrl-C",
    "ringworld dev s3 --env-file s3.env   # then, in another shell:  . ./s3.env",
)
app.add_typer(dev_app, name="dev", rich_help_panel=MACHINES)


def main() -> None:
    """Run the command line and end the process with its exit code."""
    app()
