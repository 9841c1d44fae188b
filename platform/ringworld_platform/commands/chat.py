"""chat: a conversation in the terminal, about a long document or video that is read once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ringworld_platform.commands import asking_options as options
from ringworld_platform.commands.idle_options import refuse_idle
from ringworld_platform.commands.options import DEFAULT_RUNS, Runs
from ringworld_platform.console import err


def chat(
    context: typer.Context,
    model: options.ModelPlace,
    document: Annotated[
        Path | None,
        typer.Option("--document", metavar="FILE.txt", help="Text to ask about, read once."),
    ] = None,
    video: Annotated[
        Path | None, typer.Option("--video", metavar="FILE", help="A video to ask about.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", metavar="FILE", help="A picture to ask about.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, help="Of the video at most, evenly.")
    ] = None,
    fps: options.Fps = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    seed: options.Seed = 0,
    max_tokens: options.MaxTokens = 256,
    max_frames: options.MaxFrames = 0,
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
    """Talk to a model, about a document or video if one is given.

    It is read once; its keys and values stay in memory, spread over the ring, for every question.
    Lines are questions; /reset, /undo, /image FILE, /video FILE, /quit and /help are commands.
    Ctrl-C ends an answer, twice the chat. Questions may come from a pipe, one a line.
    """
    from ringworld_jobs.evaluate_generate import IMAGE_TOP_K
    from ringworld_platform.commands.asking import (
        Reading,
        asking_errors,
        load_vocabularies,
        open_ring,
        standard_input,
    )
    from ringworld_platform.commands.chatting import Chat, read_document
    from ringworld_workers.generation.conversation import Conversation, opening_prompt
    from ringworld_workers.generation.prompts import Clip, Image, Part

    if max_frames == 0:
        why = "keeps what an answer draws, and --max-frames is 0"
        refuse_idle(context, ["save"], why, "let it draw: --max-frames 8")
    draw = options.draw_settings(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    settings = options.sampling_settings(
        text=draw,
        vision=options.draw_settings(top_k=IMAGE_TOP_K),
        max_tokens=max_tokens,
        stop=stop,
        seed=seed,
        guidance=1.0,
    )
    with asking_errors():
        about: list[Part] = [] if document is None else [read_document(document)]
        about += [] if image is None else [Image(image)]
        about += [] if video is None else [Clip(video, fps=fps, num_frames=frames)]
        coder = load_vocabularies(model, runs, tokenizer, codebook)
        opening = opening_prompt(about, coder) if about else None
        console = err()
        console.print(
            f"{coder.label}, a context of {coder.context_length:,} tokens"
            + (f", {len(opening):,} of them given" if opening else ""),
            markup=False,
        )
        if coder.source.chat is None:
            note = "as far as is known, it was trained on no conversation: it may not answer in one"
            console.print(note, style="yellow", markup=False)
        with open_ring(coder, ring=ring, device=device, dtype=dtype, chunk=chunk) as opened:
            conversation = Conversation(opened, settings, max_frames)
            if opening is not None:
                conversation.read(opening, on_chunk=Reading(least=0))
            lines = standard_input()
            Chat(conversation, coder, lines, fps=fps, frames=frames, save=save).run()
