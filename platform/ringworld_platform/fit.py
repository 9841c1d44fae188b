"""Whether a job could ever start: asked when it is submitted, before a run exists."""

from __future__ import annotations

from ringworld_jobs.any_job import Job
from ringworld_jobs.spec import JobSpec
from ringworld_platform.capacity import Cluster
from ringworld_platform.errors import JobTooLarge
from ringworld_platform.mesh_choice import MeshChoice
from ringworld_platform.room import Bundle, count


def refuse_unfit(spec: Job, cluster: Cluster, *, gpus: bool) -> None:
    """Refuse a job that the nodes can never hold, on none of the meshes that its spec permits.

    Args:
        spec: the job.
        cluster: the nodes, and those that an autoscaler may add. Where it is not known which those
            are, nothing is refused: the job waits, and says for what.
        gpus: its workers take a GPU each.

    Raises:
        JobTooLarge: a stage, or the data's preparation, finds no room.
    """
    if cluster.growth is None:
        return
    rooms = [*(node.total for node in cluster.nodes.values()), *cluster.growth.values()]
    nodes = "all nodes that may come" if cluster.growth else "all nodes"
    cpus = spec.resources.cpus_per_worker
    bundle = Bundle(cpus, int(gpus))
    there = count(bundle, rooms)
    if not there:
        largest = max((room.cpus for room in rooms if room.gpus >= bundle.gpus), default=None)
        if largest is None:
            raise JobTooLarge(
                "resources.accelerator = gpu: no node has a GPU; set it to cpu or auto, or add one"
            )
        kind = "node with a GPU" if gpus else "node"
        raise JobTooLarge(
            f"resources.cpus_per_worker = {cpus}: the largest {kind} has {largest:g} CPUs; lower it"
        )
    if not isinstance(spec, JobSpec):
        return  # it does with any number of workers
    choice = MeshChoice(spec, patient=False)
    for index, stage in enumerate(spec.stages):
        size = choice.begin(index, there).world_size
        if size > there:
            least = spec.resources.workers.min or "empty: one whole ring"
            raise JobTooLarge(
                f"stages[{index}] ({stage.name}) needs {bundle.named(size)}, and {nodes} together "
                f"hold {there}; shrink its mesh, allow a smaller one (resources.workers.min is "
                f"{least}), or add nodes"
            )
