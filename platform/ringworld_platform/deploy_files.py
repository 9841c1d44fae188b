"""The files that `ringworld deploy` writes: what is in ``deploy``, with a user's own names in it.

Each is plain text with marks such as ``@{bucket}``, which neither YAML, JSON nor a shell uses.
"""

from __future__ import annotations

import re
import string
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ringworld_jobs.problem import nearest
from ringworld_jobs.store_url import UnsafeUrl, parse_store
from ringworld_platform.errors import PlatformError

FOLDER = Path(__file__).parent / "deploy"
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d+")
# Nodes run more than our workers; Kubernetes itself takes its share of them first.
_CPUS_FOR_PODS, _MEMORY_FOR_PODS = 0.9, 0.85


class DeployError(PlatformError):
    """The files cannot be written as asked."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A type of machine with GPUs.

    Attributes:
        gpus: that it has.
        cpus: virtual ones.
        memory_gib: of the host.
        network_cards: that EFA can use, each with an interface of its own.
    """

    gpus: int
    cpus: int
    memory_gib: int
    network_cards: int


MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "p6-b200.48xlarge": Machine(8, 192, 2048, 8),
        "p5en.48xlarge": Machine(8, 192, 2048, 16),
        "p5e.48xlarge": Machine(8, 192, 2048, 32),
        "p5.48xlarge": Machine(8, 192, 2048, 32),
        "p4de.24xlarge": Machine(8, 96, 1152, 4),
        "p4d.24xlarge": Machine(8, 96, 1152, 4),
        "g6e.48xlarge": Machine(8, 192, 1536, 4),
        "g6.48xlarge": Machine(8, 192, 768, 1),
        "g5.48xlarge": Machine(8, 192, 768, 1),
    }
)
"""AWS's own figures of what the workers may be."""


@dataclass(frozen=True, slots=True)
class Target:
    """Files that belong together.

    Attributes:
        files: their names.
        summary: what they are for, in a line.
        needs: values that have no default.
        commands: that come next, with marks as in the files.
    """

    files: tuple[str, ...]
    summary: str
    needs: tuple[str, ...]
    commands: tuple[str, ...] = ()


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "bucket": Target(
            ("bucket.yaml", "iam-policy.json"),
            "a private bucket, the least rights to it, roles and network rules (CloudFormation)",
            ("bucket",),
        ),
        "aws": Target(
            ("aws.yaml",),
            "a Ray cluster of GPU machines, spot and on demand, for `ray up`",
            ("subnet", "security_group"),
        ),
        "image": Target(("Dockerfile",), "a container image with all that nodes need", ()),
        "kubernetes": Target(
            ("kuberay-cluster.yaml", "kuberay-job.yaml"),
            "a RayCluster, and a RayJob with a cluster of its own, for KubeRay",
            ("bucket", "image"),
        ),
        "observability": Target(
            (
                "prometheus.yml",
                "grafana/grafana.ini",
                "grafana/provisioning/datasources/ringworld.yaml",
                "grafana/provisioning/dashboards/ringworld.yaml",
                "grafana/dashboards/ringworld.json",
            ),
            "Prometheus and Grafana for a cluster, that of `ringworld up` unless you name another",
            (),
            (
                "prometheus --config.file=@{folder}/prometheus.yml "
                "--storage.tsdb.path=@{folder}/prometheus-data "
                "--web.listen-address=127.0.0.1:9090",
                "grafana server --homepath=/usr/share/grafana "
                "--config=@{folder}/grafana/grafana.ini",
            ),
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Values:
    """What a user fills in; an empty one was not given.

    Attributes:
        name: of the cluster, and the beginning of the names of all that belongs to it.
        region: of AWS.
        bucket: for checkpoints; its own, because bucket.yaml makes it.
        prefix: in the bucket; nothing else of it can be read or written.
        instance_type: of the workers, one of ``MACHINES``.
        max_workers: machines, at most, of each kind and together.
        image: of the containers.
        ami: machine image of AWS.
        subnet: of the head.
        worker_subnet: of the workers; default: the head's.
        security_group: of all machines.
        folder: that the files go to, absolute.
        dashboard: of Ray, ``http://HOST:PORT``.
        token_file: with the token that the dashboard asks for; empty: it asks for none.
    """

    name: str = "ringworld"
    region: str = "us-east-1"
    bucket: str = ""
    prefix: str = "runs"
    instance_type: str = "p5.48xlarge"
    max_workers: int = 8
    image: str = ""
    ami: str = (
        "resolve:ssm:/aws/service/deeplearning/ami/x86_64/"
        "base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
    )
    subnet: str = ""
    worker_subnet: str = ""
    security_group: str = ""
    folder: str = "/etc/ringworld"
    dashboard: str = "http://127.0.0.1:8265"
    token_file: str = ""


class _Marks(string.Template):
    """Text with marks such as @{name}."""

    delimiter = "@"


def render(target: str, values: Values) -> dict[str, str]:
    """Fill in the files of a target.

    Args:
        target: one of ``TARGETS``.
        values: what goes in.

    Returns:
        The text of each file, by its name.

    Raises:
        DeployError: no such target; a value is missing, or none that AWS or Kubernetes takes.
    """
    if target not in TARGETS:
        near = nearest(target, list(TARGETS))
        raise DeployError(
            f"there is no target {target!r}; there are {', '.join(TARGETS)}"
            + (f"; did you mean {near}?" if near else "")
        )
    _check(target, values)
    marks = _marks(values)
    return {name: _fill(name, marks) for name in TARGETS[target].files}


def next_commands(target: str, values: Values) -> list[str]:
    """What to do with a target's files, where they do not say it all themselves."""
    return [_Marks(command).substitute(_marks(values)) for command in TARGETS[target].commands]


def write(files: Mapping[str, str], folder: Path, *, force: bool = False) -> list[Path]:
    """Write files into a folder, all of them or none.

    Args:
        files: text by name.
        folder: made if it is not there.
        force: replace files that are there and say something else.

    Returns:
        Their paths.

    Raises:
        DeployError: a file is there with other content, and force is False.
    """
    paths = {folder / name: text for name, text in files.items()}
    other = [
        str(path.relative_to(folder))
        for path, text in paths.items()
        if path.exists() and not (path.is_file() and path.read_text(encoding="utf-8") == text)
    ]
    if other and not force:
        raise DeployError(
            f"{folder} holds {', '.join(other)} with other content, yours perhaps; "
            "--force replaces them, --to names another folder"
        )
    for path, text in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(paths)


def _fill(name: str, marks: Mapping[str, str]) -> str:
    text = (FOLDER / name).read_text(encoding="utf-8")
    for inserted, indent in (("groups", "  "), ("job_groups", "    ")):
        if f"@{{{inserted}}}" in text:
            groups = (FOLDER / "kuberay-groups.yaml").read_text(encoding="utf-8").rstrip()
            text = text.replace(f"@{{{inserted}}}", textwrap.indent(groups, indent))
    return _Marks(text).substitute(marks)


def _marks(values: Values) -> dict[str, str]:
    machine = MACHINES[values.instance_type]
    workers = values.worker_subnet or values.subnet
    interfaces = [
        f"      - {{NetworkCardIndex: {card}, DeviceIndex: {min(card, 1)}, InterfaceType: efa, "
        f'SubnetId: "{workers}", Groups: ["{values.security_group}"]}}'
        for card in range(machine.network_cards)
    ]
    return {
        "name": values.name,
        "region": values.region,
        "bucket": values.bucket,
        "prefix": values.prefix.strip("/"),
        "instance_type": values.instance_type,
        "max_workers": str(values.max_workers),
        "image": values.image or "ringworld",
        "ami": values.ami,
        "subnet": values.subnet,
        "security_group": values.security_group,
        "network_interfaces": "\n".join(interfaces),
        "folder": values.folder,
        "dashboard": values.dashboard.rstrip("/"),
        "authorization": (
            f'\n        authorization: {{type: Bearer, credentials_file: "{values.token_file}"}}'
            if values.token_file
            else ""
        ),
        "gpus": str(machine.gpus),
        "cpus": str(int(machine.cpus * _CPUS_FOR_PODS)),
        "memory": f"{int(machine.memory_gib * _MEMORY_FOR_PODS)}Gi",
    }


def _check(target: str, values: Values) -> None:
    options = {need: f"--{need.replace('_', '-')}" for need in TARGETS[target].needs}
    missing = [option for need, option in options.items() if not getattr(values, need)]
    if missing:
        raise DeployError(f"{target} also needs {' and '.join(missing)}")
    if not _NAME.fullmatch(values.name):
        raise DeployError(
            f"--name {values.name!r}: at most 40 of a-z, 0-9 and -, a letter first and no - last"
        )
    if not _REGION.fullmatch(values.region):
        raise DeployError(f"--region {values.region!r} is none of AWS's, such as us-east-1")
    if values.instance_type not in MACHINES:
        near = nearest(values.instance_type, list(MACHINES)) or "p5.48xlarge"
        raise DeployError(
            f"--instance-type {values.instance_type!r} is none that is known here; "
            f"write {near} and edit the file, or take one of {', '.join(MACHINES)}"
        )
    if values.max_workers < 1:
        raise DeployError(f"--max-workers {values.max_workers}: at least 1")
    if not values.prefix.strip("/"):
        raise DeployError("--prefix is empty; rights to a whole bucket are more than is needed")
    if values.bucket:
        try:
            parse_store(f"s3://{values.bucket}/{values.prefix}")
        except UnsafeUrl:
            raise DeployError("--bucket or --prefix holds more than a name") from None
        except ValueError as error:
            raise DeployError(f"--bucket or --prefix: {error}") from None
    if not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]_-]+/?", values.dashboard):
        raise DeployError(
            f"--dashboard {values.dashboard!r} is none: write http://HOST:PORT, as in the line "
            "that `ringworld up` prints"
        )
    watching = target == "observability"
    for option, text in (
        ("--to", values.folder if watching else ""),
        ("RAY_AUTH_TOKEN_PATH", values.token_file if watching else ""),
        ("--image", values.image),
        ("--ami", values.ami),
        ("--subnet", values.subnet),
        ("--worker-subnet", values.worker_subnet),
        ("--security-group", values.security_group),
    ):
        if re.search(r"[^A-Za-z0-9._:/@-]", text):
            raise DeployError(f"{option} {text!r} has a character that is in no such name")
