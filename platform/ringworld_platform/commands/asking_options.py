"""Options of the commands that ask a model, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ringworld_model.sampling.settings import DrawSettings, SamplingSettings

MODEL = (
    "RUN, RUN/STAGE or RUN/STAGE/STEP, s3://BUCKET/PREFIX/RUN, or a folder of weights (exported, "
    "or Hugging Face's)."
)
ModelPlace = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
Temperature = Annotated[
    float, typer.Option("--temperature", help="Of text; 0 takes the likeliest token.")
]
TopK = Annotated[int, typer.Option("--top-k", help="Of text: so many likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Of text: this share of the probability.")]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Of text seen before; 1: none.")
]
PresencePenalty = Annotated[
    float, typer.Option("--presence-penalty", help="Of text drawn before, as OpenAI's.")
]
FrequencyPenalty = Annotated[
    float, typer.Option("--frequency-penalty", help="For each time it was drawn, as OpenAI's.")
]
VisionTemperature = Annotated[float, typer.Option("--vision-temperature", help="Of frames.")]
VisionTopK = Annotated[
    int | None,
    typer.Option("--vision-top-k", help="Of frames; 1000 for an image, 100 for a video if none."),
]
VisionTopP = Annotated[float, typer.Option("--vision-top-p", help="Of frames.")]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", help="How much the prompt counts in frames; image 5, else 1."),
]
Seed = Annotated[int, typer.Option("--seed", help="Of all draws.")]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=1, help="Tokens of an answer in text at most.")
]
MaxFrames = Annotated[
    int | None,
    typer.Option("--max-frames", min=0, help="Frames that an answer in text may draw; 0: none."),
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends an answer; \\n: a line.")
]
Fps = Annotated[
    float | None,
    typer.Option("--fps", min=0.01, help="Frames a second: taken of a video, and written to one."),
]
TokenizerPath = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="PATH", help="The model's text tokenizer, if not found."),
]
CodebookPath = Annotated[
    Path | None,
    typer.Option("--codebook", metavar="PATH", help="The model's codebook, if not found."),
]
Ring = Annotated[
    int, typer.Option("--ring", min=1, help="Processes that share the context's memory.")
]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"], typer.Option("--dtype", help="Of the weights.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="To compute on.")]
Chunk = Annotated[
    int, typer.Option("--chunk", min=1, help="Tokens of a pass over the prompt; less takes less.")
]
SaveTo = Annotated[
    Path | None,
    typer.Option("--save", metavar="DIR", help="Where frames go that an answer in text draws."),
]


def sampling_settings(
    *,
    text: DrawSettings,
    vision: DrawSettings,
    max_tokens: int,
    stop: list[str] | None,
    seed: int,
    guidance: float,
) -> SamplingSettings:
    """The settings of one answer; ``\\n`` and ``\\t`` in stop texts are a line and a tab.

    Raises:
        typer.BadParameter: a value that means nothing.
    """
    from ringworld_model.sampling.settings import SamplingSettings

    stops = [one.replace("\\n", "\n").replace("\\t", "\t") for one in stop or []]
    try:
        return SamplingSettings(
            text=text,
            vision=vision,
            max_new_tokens=max_tokens,
            stop=tuple(stops),
            seed=seed,
            guidance_scale=guidance,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def draw_settings(**values: float) -> DrawSettings:
    """How one modality is drawn.

    Raises:
        typer.BadParameter: a value that means nothing.
    """
    from ringworld_model.sampling.settings import DrawSettings

    try:
        return DrawSettings(**values)  # type: ignore[arg-type]  # top_k is an int
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
