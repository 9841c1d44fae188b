"""A job reaches nodes that have never heard of ringworld; what only this machine has is refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import sysconfig
import textwrap
import time
import venv
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from train_jobs import MODEL, make_sources

from ringworld_jobs.any_job import load_any_job
from ringworld_jobs.load import load_job
from ringworld_platform import remote_submit, shipping
from ringworld_platform.remote_submit import NotForElsewhere, refuse_local
from ringworld_platform.shipping import PACKAGES, UploadRefused, runtime_env

RINGWORLD = str(Path(sys.executable).with_name("ringworld"))
WAIT_SECONDS = 150.0


def job_text(store: str, **data: object) -> str:
    return yaml.safe_dump(
        {
            "kind": "train",
            "name": "small",
            "model": {
                "hidden_size": MODEL.hidden_size,
                "ffn_size": MODEL.ffn_size,
                "num_layers": 2,
                "num_heads": 2,
                "num_kv_heads": 1,
            },
            "data": data,
            "resources": {"accelerator": "cpu", "workers": {"min": 1, "max": 1}},
            "checkpoint": {"store": store, "every": "1 steps"},
            "tracking": {"mlflow": "off"},
            "stages": [
                {
                    "name": "only",
                    "context_length": 256,
                    "rope_theta": 1e4,
                    "steps": 1,
                    "global_batch_tokens": 256,
                    "mesh": {"sequence_parallel": 1},
                    "mixture": {"books": 1.0},
                    "learning_rate": {"peak": 1e-3},
                }
            ],
        }
    )


# --- what is shipped ---


def test_our_packages_and_nothing_else_are_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = runtime_env()
    assert tuple(Path(folder).name for folder in shipped["py_modules"]) == PACKAGES
    assert shipped["excludes"] == ["__pycache__"]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert runtime_env() == {}, "handed over with the command already"


def test_more_than_code_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "ringworld_jobs"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name in ("film.mkv", "__pycache__/old.pyc"):
        with (package / name).open("wb") as file:
            file.truncate(40 << 20)
    monkeypatch.setattr(shipping, "_folder", lambda name: package)
    monkeypatch.setattr(shipping, "PACKAGES", ("ringworld_jobs",))
    with pytest.raises(UploadRefused, match=r"hold 40 MiB, 40 MiB .*film\.mkv; at most 32 MiB"):
        runtime_env()


@pytest.mark.parametrize(
    ("store", "data", "said"),
    [
        ("file://runs", {"sources": {"books": {"shards": "/books"}}}, "checkpoint.store"),
        ("s3://bucket/runs", {"sources": {"books": {"shards": "books"}}}, "books.shards"),
    ],
)
def test_what_only_this_machine_has_is_refused(
    store: str, data: dict[str, object], said: str, tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(job_text(store, **data))
    with pytest.raises(NotForElsewhere, match=f"{said}.* s3://BUCKET/PREFIX"):
        refuse_local(load_job(job, check_files=False), job)


EVALUATE = {"kind": "eval", "name": "asked", "model": "s3://bucket/runs/small-1"}
ANSWER = {"kind": "generate", "name": "said", "model": "small-1", "prompts": "/mnt/all/p.jsonl"}


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (EVALUATE | {"evaluate": ["needle"]}, ""),
        (EVALUATE | {"evaluate": ["needle"], "model": "./weights"}, "model = .*s3://BUCKET"),
        (EVALUATE | {"evaluate": ["needle"], "tokenizer": "words.json"}, "tokenizer = .*absolute"),
        (
            EVALUATE | {"evaluate": {"needle": {"haystack": {"files": ["texts/*.txt"]}}}},
            r"evaluate\.needle\.haystack\.files\[0\] = .*absolute path that all nodes",
        ),
        (ANSWER, ""),
        (ANSWER | {"prompts": "p.jsonl"}, "prompts = .*absolute path that all nodes"),
        (ANSWER | {"out": "answers"}, "out = 'answers' .*s3://BUCKET"),
        (ANSWER | {"out": "s3://bucket/answers"}, ""),
    ],
)
def test_jobs_on_a_model_go_there_too(job: dict[str, object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job | {"checkpoint": {"store": "s3://bucket/runs"}}))
    spec = load_any_job(path, check_files=False)
    if not said:
        refuse_local(spec, path)
        return
    with pytest.raises(NotForElsewhere, match=said):
        refuse_local(spec, path)


def test_what_all_machines_have_is_taken(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    for shards in ("s3://bucket/books", "/mnt/all/books"):
        job.write_text(job_text("s3://bucket/runs", sources={"books": {"shards": shards}}))
        refuse_local(load_job(job, check_files=False), job)


def test_an_address_is_a_heads_or_a_dashboards() -> None:
    assert remote_submit.is_dashboard("http://127.0.0.1:8265")
    assert not remote_submit.is_dashboard("ray-head:6379")
    assert not remote_submit.is_dashboard(None)


# --- a cluster whose Python does not have it ---


@dataclass
class Stranger:
    """A Ray head of a Python that has everything but ringworld."""

    address: str
    dashboard: str
    environment: dict[str, str]
    python: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def stranger(tmp_path: Path, s3_url: str) -> Iterator[Stranger]:
    place = tmp_path / "stranger"
    venv.create(place / "env", symlinks=True)
    site = next((place / "env" / "lib").glob("python*/site-packages"))
    # A folder that is named so lends its packages, but not those that it only points to.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(place / "env" / "bin" / "python")
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {
        "HOME": str(place),
        "PATH": f"{place}/env/bin:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    port, dashboard, agent = free_port(), free_port(), free_port()
    command = [python, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={port}", "--object-store-memory=78643200", "--disable-usage-stats"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}"]
    output = place / "ray.log"
    with output.open("wb") as log:
        head = psutil.Popen(
            command, cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while "--block" not in output.read_text():
            assert head.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        yield Stranger(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment, python)
    finally:
        family = [head, *head.children(recursive=True)]
        head.terminate()
        for process in psutil.wait_procs(family, timeout=5)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def call(command: list[str], stranger: Stranger, cwd: Path) -> tuple[int, str]:
    done = subprocess.run(
        command, cwd=cwd, env=stranger.environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_job_brings_its_packages_to_a_cluster_that_lacks_them(
    stranger: Stranger, s3_url: str, tmp_path: Path
) -> None:
    code, output = call([stranger.python, "-c", "import ringworld_jobs"], stranger, tmp_path)
    assert code == 1 and "No module named 'ringworld_jobs'" in output

    (laptop := tmp_path / "laptop").mkdir()
    books = make_sources(tmp_path / "data")["documents"]
    (laptop / "job.yaml").write_text(job_text(s3_url, sources={"books": {"shards": books}}))
    submit = [RINGWORLD, "submit", "job.yaml", "--address"]
    code, output = call([*submit, stranger.dashboard], stranger, laptop)
    assert code == 0 and "small-1 submitted" in output, output

    from ringworld_workers.store.s3_store import S3Store

    store, deadline = S3Store(s3_url), time.monotonic() + WAIT_SECONDS
    while not any(info.key.endswith("manifest.json") for info in store.list("small-1")):
        assert time.monotonic() < deadline, [info.key for info in store.list()]
        time.sleep(0.5)

    script = f"""
        import ray
        from ringworld_platform import cluster
        cluster.connect({stranger.address!r}, ship=True)
        def there():
            import ringworld_jobs, sys
            return sys.prefix, ringworld_jobs.__file__
        print(*ray.get(ray.remote(there).remote(), timeout=100))
    """
    code, output = call([sys.executable, "-c", textwrap.dedent(script)], stranger, laptop)
    assert code == 0, output
    prefix, module = output.splitlines()[-1].split()
    assert Path(prefix) == Path(stranger.python).parents[1]
    assert "py_modules_files" in module
