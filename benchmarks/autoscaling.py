"""A job whose stages take 1, 2, 4 and 1 workers, on a cluster that Ray's autoscaler grows.

Real controller, gangs and autoscaler (v2); nodes are processes of this machine, one CPU each, and
come within seconds instead of minutes. The training loop is that of the tests, without a model, or
with ``--train`` the real one. The job runs twice on one cluster: its stages' nodes asked for when
the stage before has ended, then while it still trains. Writes the table, the samples and a picture:

    python benchmarks/autoscaling.py --picture docs/images/autoscaling.png
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from autoscaling_report import Sample, Stage, Trial, write

from ringworld_jobs.spec import JobSpec
from ringworld_platform.client import Client
from ringworld_platform.runner_config import RunnerConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "platform"))
from autoscaling_cluster import AutoscalingCluster, autoscaling_cluster  # noqa: E402
from mini_jobs import CONFIG, mini_job, worker_environment  # noqa: E402

STAGES = (("1k", 1), ("2k", 2), ("4k", 4), ("1k again", 1))
SAMPLE_SECONDS = 0.2
MOST_NODES = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run.

    Attributes:
        steps: of each stage.
        step_seconds: of each step without a model.
        train: with the real training loop.
        timeout_seconds: of a job.
    """

    steps: int
    step_seconds: float
    train: bool
    timeout_seconds: float


class Watch:
    """Counts nodes in a thread, five times a second."""

    def __init__(self, cluster: AutoscalingCluster) -> None:
        """Take the cluster; nothing is counted yet."""
        self._cluster, self.samples = cluster, list[Sample]()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> Watch:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        self._end.set()
        self._thread.join()

    def _count(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            nodes = self._cluster.nodes()
            requested = self._cluster.requested()
            sample = Sample(time.time(), nodes.busy, nodes.idle, nodes.pending, requested)
            self.samples.append(sample)


def job(folder: Path, name: str, prewarm: str, plan: Plan) -> JobSpec:
    """The job of four stages."""
    spec = mini_job(
        folder,
        name,
        stages=tuple((stage.replace(" ", "-"), ring, plan.steps) for stage, ring in STAGES),
        step_seconds=plan.step_seconds,
        workers=(1, MOST_NODES),
        prewarm=prewarm,
    )
    if not plan.train:
        return spec
    from test_elastic import VOCABULARY

    values = spec.model_dump(mode="json")
    values["model"] = {
        "hidden_size": 32,
        "ffn_size": 48,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 4,
        "text_vocab_size": VOCABULARY,
        "vision": {"codebook_size": 16},
    }
    values["optimizer"] = {}
    return JobSpec.model_validate(values)


def run(client: Client, cluster: AutoscalingCluster, spec: JobSpec, plan: Plan) -> Trial:
    """Run a job on an empty cluster until the cluster is empty again."""
    with Watch(cluster) as watch:
        began = time.time()
        run_id = client.submit(spec)
        final = client.wait(run_id, timeout_seconds=plan.timeout_seconds)
        if final["state"] != "SUCCEEDED":
            raise SystemExit(f"{run_id}: {final['state']}: {final['reason']}")
        ended = time.time()
        while cluster.nodes().alive:
            if time.time() - ended > plan.timeout_seconds:
                raise SystemExit("nodes stay though nobody needs them")
            time.sleep(SAMPLE_SECONDS)
    records, events = client.metrics(run_id).items, client.events(run_id)
    stages = []
    for index, (name, workers) in enumerate(STAGES):
        steps = [
            float(record["time"])
            for record in records
            if record["kind"] == "step" and record["stage_index"] == index
        ]
        begins = f"stage {spec.stages[index].name} on "
        room = next(float(e["time"]) for e in events if begins in e["text"])
        stages.append(Stage(name, workers, room, min(steps), max(steps)))
    asked = [float(event["time"]) for event in events if event["kind"] == "prewarm"]
    return Trial(
        str(spec.resources.prewarm), began, ended, tuple(stages), tuple(asked), watch.samples
    )


def main() -> None:
    """Run both on one cluster, and write what was seen."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of each stage")
    parser.add_argument("--step-seconds", type=float, default=0.2)
    parser.add_argument("--idle-seconds", type=float, default=5.0, help="of a node before it goes")
    parser.add_argument("--train", action="store_true", help="with the real training loop")
    parser.add_argument("--timeout-seconds", type=float, default=600.0, help="of each job")
    parser.add_argument("--results", type=Path, default=here / "results")
    parser.add_argument("--picture", type=Path, help="where the picture goes, if anywhere else")
    options = parser.parse_args()
    plan = Plan(options.steps, options.step_seconds, options.train, options.timeout_seconds)
    load = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory(prefix="ringworld-autoscaling-") as name,
        autoscaling_cluster(
            most=MOST_NODES, idle_seconds=options.idle_seconds, env_vars=worker_environment()
        ) as cluster,
    ):
        folder = Path(name)
        if plan.train:
            from test_elastic import write_books

            write_books(folder / "books")
        runner = RunnerConfig() if plan.train else CONFIG
        client = Client.attach(folder, runner=runner)
        try:
            trials = [
                run(client, cluster, job(folder, f"prewarm-{prewarm}", prewarm, plan), plan)
                for prewarm in ("off", "auto")
            ]
        finally:
            client.shutdown()
    about = {
        **asdict(plan),
        "idle_seconds": options.idle_seconds,
        "cores": os.cpu_count(),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
    }
    write(trials, about, options.results, options.picture)


if __name__ == "__main__":
    main()
