"""generate: text, images and videos from a trained model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ringworld_platform.commands import asking_options as options
from ringworld_platform.commands.idle_options import refuse_idle
from ringworld_platform.commands.options import DEFAULT_RUNS, Runs
from ringworld_platform.console import err

if TYPE_CHECKING:
    from ringworld_platform.commands.generating import FileRequest

DEFAULT_BATCH = 8
_OF_TEXT = (
    "save",
    "max_tokens",
    "max_frames",
    "stop",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "media_first",
)
"""Parameters that mean nothing to what is drawn."""


def generate(
    context: typer.Context,
    model: options.ModelPlace,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROMPT]",
            help="Text; {image} and {video} in it say where the media stand. -: standard input.",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="A picture to ask about.")
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option("--video", metavar="FILE", help="A video to ask about.")
    ] = None,
    media_first: Annotated[
        bool, typer.Option("--media-first", help="Media before the text, not behind it.")
    ] = False,
    to_image: Annotated[
        Path | None, typer.Option("--to-image", metavar="FILE.png", help="Draw an image.")
    ] = None,
    to_video: Annotated[
        Path | None, typer.Option("--to-video", metavar="FILE.mp4", help="Draw a video (or .gif).")
    ] = None,
    begin_with: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="An image or video that the video goes on."),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames", min=1, help="Frames to draw (8), or to take evenly of a --video (8)."
        ),
    ] = None,
    fps: options.Fps = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE.jsonl", help="Many questions, one a line."),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.jsonl", help="Their answers; a rerun goes on."),
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Questions that are answered together.")
    ] = DEFAULT_BATCH,
    form: Annotated[
        Literal["auto", "chat", "plain"],
        typer.Option("--form", help="In the chat template or bare; auto: as it was trained."),
    ] = "auto",
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    vision_temperature: options.VisionTemperature = 1.0,
    vision_top_k: options.VisionTopK = None,
    vision_top_p: options.VisionTopP = 1.0,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    max_tokens: options.MaxTokens = 256,
    max_frames: options.MaxFrames = None,
    stop: options.Stop = None,
    save: options.SaveTo = None,
    tokenizer: options.TokenizerPath = None,
    codebook: options.CodebookPath = None,
    ring: options.Ring = 1,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    chunk: options.Chunk = 8192,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Ask a model: for text, about images and videos, for an image or a video.

    Text goes to standard output as it is written. With --prompts, answers are appended to --out one
    by one; after a stop or a kill the same command does what is missing. With a --ring of N, N
    processes share the memory of the context and each holds the whole model.
    """
    from ringworld_jobs.evaluate_generate import IMAGE_GUIDANCE, IMAGE_TOP_K, VIDEO_TOP_K
    from ringworld_platform.commands.asking import (
        asking_errors,
        load_vocabularies,
        open_ring,
        standard_input,
    )
    from ringworld_platform.commands.generating import FileRequest, answer_file, answer_one

    target = to_image or to_video
    if to_image and to_video:
        raise typer.BadParameter("give --to-image or --to-video, one of them")
    if begin_with and not to_video:
        raise typer.BadParameter("--from is what a --to-video begins with; --video asks about one")
    if target and (image or video):
        raise typer.BadParameter("--image and --video are asked about; a video goes on --from one")
    if (prompts is None) != (answers is None):
        raise typer.BadParameter("--prompts and --out belong together")
    if prompts and (prompt or image or video or begin_with):
        raise typer.BadParameter("with --prompts, the lines say what is asked")
    if not prompts and not (prompt or image or video or target):
        raise typer.BadParameter("nothing is asked; give a PROMPT, --image, --video or --prompts")
    _refuse_idle(context, "--to-image" if to_image else "--to-video" if to_video else "")
    if max_frames == 0:
        refuse_idle(context, ["save"], "keeps what an answer draws, and --max-frames is 0")
    if not prompts:
        refuse_idle(context, ["batch"], "is of many questions, and there are no --prompts")
        if not target and not video:
            why = "is of a video, and there is no --video to ask about and no --to-video"
            refuse_idle(context, ["frames", "fps"], why)
    if guidance is None:
        guidance = IMAGE_GUIDANCE if to_image else 1.0
    if vision_top_k is None:
        vision_top_k = VIDEO_TOP_K if to_video else IMAGE_TOP_K
    settings = options.sampling_settings(
        text=options.draw_settings(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
        ),
        vision=options.draw_settings(
            temperature=vision_temperature, top_k=vision_top_k, top_p=vision_top_p
        ),
        max_tokens=max_tokens,
        stop=stop,
        seed=seed,
        guidance=guidance,
    )
    with asking_errors():
        request = FileRequest(
            settings=settings,
            form=form,
            media_first=media_first,
            frames=frames,
            fps=fps,
            max_frames=max_frames,
            target=target,
            to="image" if to_image else "video" if to_video else "text",
            save=save,
        )
        _check(request, prompts is not None)
        coder = load_vocabularies(model, runs, tokenizer, codebook)
        rings = partial(open_ring, coder, ring=ring, device=device, dtype=dtype, chunk=chunk)
        if prompts is not None and answers is not None:
            answer_file(prompts, answers, batch, coder, request, rings)
            return
        text = standard_input().read() if prompt == "-" else prompt or ""
        ask = request.ask(text, image or [], video or [], begin_with, coder)
        err().print(
            f"{coder.label}: {len(ask.prompt):,} of {coder.context_length:,} tokens",
            style="dim",
            markup=False,
        )
        with rings() as opened:
            answer_one(opened, ask, request, coder)


def _refuse_idle(context: typer.Context, target: str) -> None:
    """Refuse options that do nothing beside ``--to-image`` or ``--to-video``."""
    if target:
        why = f"is of answers in text, and {target} draws"
        refuse_idle(context, _OF_TEXT, why, f"leave it out, or {target}")
    if target == "--to-image":
        why = "is of a video, and --to-image draws one frame"
        refuse_idle(context, ["frames", "fps"], why, "leave it out, or take --to-video")


def _check(request: FileRequest, many: bool) -> None:
    """Refuse a file name without a known suffix; of many answers it names a folder."""
    from ringworld_workers.generation.media_files import check_suffix

    if request.target is not None and not many:
        check_suffix(request.target, video=request.to == "video")
