"""serve: an OpenAI-compatible endpoint over a trained model."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringworld_platform.commands import asking_options as options
from ringworld_platform.commands.options import DEFAULT_RUNS, Address, Runs
from ringworld_platform.console import err, out

if TYPE_CHECKING:
    from ringworld_platform.serving.launching import RingShape

KEY_VARIABLE = "RINGWORLD_API_KEY"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_LEAST_KEY = 16
_LOOK_SECONDS = 2.0


def serve(
    model: options.ModelPlace,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="What requests call the model.")
    ] = None,
    ring: options.Ring = 1,
    max_concurrent: Annotated[
        int, typer.Option("--max-concurrent", min=1, help="Requests answered at the same time.")
    ] = 8,
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=0, help="Requests that wait; more get 429.")
    ] = 128,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option("--max-prompt-tokens", min=1, help="Of a request; else the context."),
    ] = None,
    max_answer_tokens: Annotated[
        int,
        typer.Option("--max-answer-tokens", min=1, help="Of an answer, and if none are asked for."),
    ] = 4096,
    max_body_mb: Annotated[
        int, typer.Option("--max-body-mb", min=1, help="MiB of a request, media included.")
    ] = 32,
    cache_tokens: Annotated[
        int | None,
        typer.Option("--cache-tokens", min=1, help="Of all requests; else by the free memory."),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds for a request, waiting included.")
    ] = 600.0,
    media_timeout: Annotated[
        float,
        typer.Option("--media-timeout", min=0.1, help="Seconds for a request's images and videos."),
    ] = 120.0,
    allow_urls: Annotated[
        list[str] | None,
        typer.Option("--allow-urls", metavar="HOST", help="Media may be fetched from there."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help=f"The key that requests must have; else ${KEY_VARIABLE}, else none.",
        ),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Let in anyone, also beyond loopback.")
    ] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    chunk: options.Chunk = 2048,
    tokenizer: options.TokenizerPath = None,
    codebook: options.CodebookPath = None,
    address: Address = None,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients ask for it, until Ctrl-C.

    Chat completions (streamed or whole, with images and videos) and completions, from one ring of
    ranks, on the Ray cluster where one is up, else on one of its own. Requests join between two
    tokens, so that none waits for another's end.
    """
    from ringworld_platform.commands.asking import asking_errors, load_vocabularies
    from ringworld_platform.serving.settings import ServeSettings, digest_of

    key = _key(api_key_file)
    loopback = host in _LOOPBACK
    if not loopback and not key and not no_api_key:
        raise typer.BadParameter(
            f"on {host} others can reach it; give --api-key-file (or ${KEY_VARIABLE}), or "
            "--no-api-key if another server in front asks for one",
            param_hint="--host",
        )
    with asking_errors():
        source = load_vocabularies(model, runs, tokenizer, codebook).source
        settings = ServeSettings(
            name=name or _short(source.label),
            max_concurrent=max_concurrent,
            max_queue=max_queue,
            max_body_bytes=max_body_mb << 20,
            max_prompt_tokens=max_prompt_tokens,
            max_answer_tokens=max_answer_tokens,
            media_seconds=media_timeout,
            timeout_seconds=timeout,
            cache_tokens=cache_tokens,
            allowed_urls=tuple(allow_urls or ()),
            key_digest=digest_of(key) if key else "",
            loopback=loopback,
        )
        with _cluster(address, ring):
            from ringworld_platform.serving.launching import serving

            shape = _shape(ring, device, dtype, chunk)
            with err().status(f"loading {source.label}") as line:
                endpoint = serving(
                    source,
                    settings,
                    shape,
                    host=host,
                    port=port,
                    on_wait=lambda said: line.update(f"loading {source.label}: {said}"),
                )
                url = endpoint.__enter__()
            with contextlib.ExitStack() as stack:
                stack.push(endpoint)
                out().print(_welcome(url, settings.name, bool(key)), markup=False)
                _stay(url)


@contextlib.contextmanager
def _cluster(address: str | None, ring: int) -> Iterator[None]:
    """The cluster that is up, or one for this command."""
    from ringworld_platform import cluster, head
    from ringworld_platform.errors import ClusterError

    if address is None and head.find_running() is None:
        if head.token_file() is None:
            # Serve's replica takes calls on every interface: only the token keeps strangers out.
            raise ClusterError(
                "RAY_AUTH_MODE turns Ray's token off, without which others on the network could "
                "call Ray Serve's replica; unset it"
            )
        cores = len(os.sched_getaffinity(0))
        with cluster.local_cluster(num_cpus=max(ring, cores)):
            yield
        return
    info = cluster.connect(address, ship=True)
    err().print(f"using the Ray cluster at {info.address}", style="dim")
    try:
        yield
    finally:
        cluster.disconnect()


def _shape(ring: int, device: str, dtype: str, chunk: int) -> RingShape:
    from ringworld_platform.serving.launching import RingShape, choose_device

    threads = max(1, len(os.sched_getaffinity(0)) // ring)
    return RingShape(
        size=ring, device=choose_device(device, ring), dtype=dtype, chunk=chunk, threads=threads
    )


def _key(path: Path | None) -> str:
    """The key, from its file or the environment; empty: none.

    Raises:
        typer.BadParameter: the file cannot be read, others may read it, or it holds no good key.
    """
    where = str(path) if path is not None else f"${KEY_VARIABLE}"
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if path is not None:
        try:
            mode = path.stat().st_mode
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"{path} cannot be read ({type(error).__name__})") from None
        if mode & (stat.S_IRGRP | stat.S_IROTH):
            raise typer.BadParameter(f"others may read {path}; make it yours alone: chmod 600")
        if not key:
            raise typer.BadParameter(f"{path} is empty; write a key into it")
    if key and (len(key) < _LEAST_KEY or not key.isascii() or any(c.isspace() for c in key)):
        raise typer.BadParameter(
            f"the key in {where} has {len(key)} characters; take {_LEAST_KEY} ASCII characters or "
            "more, without spaces, such as from `openssl rand -hex 24`"
        )
    return key


def _short(label: str) -> str:
    """A folder's name without the folders that it is in: they are nobody's business."""
    return Path(label).name if Path(label).is_absolute() or Path(label).is_dir() else label


def _welcome(url: str, name: str, has_key: bool) -> str:
    header = ' -H "Authorization: Bearer $KEY"' if has_key else ""
    key = 'os.environ["KEY"]' if has_key else '"none"'
    return f"""{name} is served at {url}/v1 (health: {url}/health, metrics: {url}/metrics)

  curl {url}/v1/chat/completions -H "Content-Type: application/json"{header} \\
    -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'

  {"import os; " if has_key else ""}from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key={key})
  chat = client.chat.completions.create(
      model="{name}", messages=[{{"role": "user", "content": "Hello"}}], stream=True
  )
  for piece in chat:
      print(piece.choices[0].delta.content or "", end="", flush=True)

Ctrl-C stops it."""


def _stay(url: str) -> None:
    """Wait for Ctrl-C; say when the ring is lost, and when it is there again."""
    from ringworld_platform.serving.launching import health

    console, said = err(), "ready"
    while True:
        time.sleep(_LOOK_SECONDS)
        found = health(url) or {"status": "gone"}
        state = str(found["status"])
        if state != said:
            detail = f": {found['detail']}" if found.get("detail") else ""
            console.print(f"{time.strftime('%H:%M:%S')} {state}{detail}", markup=False)
            said = state
