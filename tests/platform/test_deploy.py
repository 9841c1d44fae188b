"""Each deployment file against the schema that it must meet, and what it must never open."""

from __future__ import annotations

import configparser
import copy
import functools
import json
import logging
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pod_types import FILE as POD_TYPES
from pod_types import schema
from typer.main import get_command
from typer.testing import CliRunner

from ringworld_platform.cli import app
from ringworld_platform.deploy_files import (
    FOLDER,
    MACHINES,
    TARGETS,
    DeployError,
    Values,
    render,
    write,
)

ROOT = Path(__file__).parents[2]
VALUES = Values(
    bucket="my-runs",
    image="registry.example/ringworld:1",
    subnet="subnet-0123456789abcdef0",
    worker_subnet="subnet-0fedcba9876543210",
    security_group="sg-0123456789abcdef0",
)

# KubeRay's CRDs rayclusters.ray.io and rayjobs.ray.io, version 1.5: names and types of the fields.
KUBERAY: dict[str, dict[str, Any]] = {
    "RayCluster": {
        "*apiVersion": ["ray.io/v1"],
        "*kind": ["RayCluster"],
        "*metadata": "V1ObjectMeta",
        "*spec": "RayClusterSpec",
    },
    "RayJob": {
        "*apiVersion": ["ray.io/v1"],
        "*kind": ["RayJob"],
        "*metadata": "V1ObjectMeta",
        "*spec": "RayJobSpec",
    },
    "RayClusterSpec": {
        "authOptions": "AuthOptions",
        "autoscalerOptions": "AutoscalerOptions",
        "enableInTreeAutoscaling": "boolean",
        "gcsFaultToleranceOptions": "any",
        "*headGroupSpec": "HeadGroupSpec",
        "headServiceAnnotations": "{string}",
        "managedBy": "string",
        "rayVersion": "string",
        "suspend": "boolean",
        "upgradeStrategy": "any",
        "workerGroupSpecs": "[WorkerGroupSpec]",
    },
    "AuthOptions": {"enableK8sTokenAuth": "boolean", "mode": ["disabled", "token"]},
    "AutoscalerOptions": {
        "env": "[V1EnvVar]",
        "envFrom": "[V1EnvFromSource]",
        "idleTimeoutSeconds": "integer",
        "image": "string",
        "imagePullPolicy": "string",
        "resources": "V1ResourceRequirements",
        "securityContext": "V1SecurityContext",
        "upscalingMode": ["Default", "Aggressive", "Conservative"],
        "version": ["v1", "v2"],
        "volumeMounts": "[V1VolumeMount]",
    },
    "HeadGroupSpec": {
        "enableIngress": "boolean",
        "headService": "any",
        "labels": "{string}",
        "rayStartParams": "{string}",
        "resources": "{string}",
        "serviceType": "string",
        "*template": "V1PodTemplateSpec",
    },
    "WorkerGroupSpec": {
        "*groupName": "string",
        "idleTimeoutSeconds": "integer",
        "labels": "{string}",
        "*maxReplicas": "integer",
        "*minReplicas": "integer",
        "numOfHosts": "integer",
        "rayStartParams": "{string}",
        "replicas": "integer",
        "resources": "{string}",
        "scaleStrategy": "any",
        "suspend": "boolean",
        "*template": "V1PodTemplateSpec",
    },
    "RayJobSpec": {
        "activeDeadlineSeconds": "integer",
        "backoffLimit": "integer",
        "clusterSelector": "{string}",
        "deletionStrategy": "any",
        "entrypoint": "string",
        "entrypointNumCpus": "number",
        "entrypointNumGpus": "number",
        "entrypointResources": "string",
        "jobId": "string",
        "managedBy": "string",
        "metadata": "{string}",
        "rayClusterSpec": "RayClusterSpec",
        "runtimeEnvYAML": "string",
        "shutdownAfterJobFinishes": "boolean",
        "submissionMode": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"],
        "submitterConfig": "any",
        "submitterPodTemplate": "V1PodTemplateSpec",
        "suspend": "boolean",
        "ttlSecondsAfterFinished": "integer",
    },
}

# The right that each request of S3 needs, as AWS's service authorization reference has it.
RIGHTS = {
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "CompleteMultipartUpload": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListObjectsV2": "s3:ListBucket",
    "ListParts": "s3:ListMultipartUploadParts",
    "PutObject": "s3:PutObject",
    "UploadPart": "s3:PutObject",
}


class CloudFormation(yaml.SafeLoader):
    """YAML with CloudFormation's own tags, each as ``{tag: value}``."""


def _tagged(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    return {tag: loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else None}


CloudFormation.add_multi_constructor("!", _tagged)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def rendered(target: str, name: str, values: Values = VALUES) -> Any:
    return yaml.load(render(target, values)[name], CloudFormation)


# --- writing them ---


def test_every_file_is_of_a_target_and_says_how_it_is_used() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    ours = {name for target in TARGETS.values() for name in target.files}
    parts = {"kuberay-groups.yaml"}
    assert {str(path.relative_to(FOLDER)) for path in files} == ours | parts
    for target in TARGETS:
        for name, text in render(target, VALUES).items():
            assert "@{" not in text, name
            if "/" not in name and not name.endswith(".json"):
                assert re.search(
                    r"^#   (ray|kubectl|aws|docker|prometheus) ", text, re.MULTILINE
                ), name


def test_the_wheel_ships_them() -> None:
    """Hatchling packs all in a package but what git ignores."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert "platform/ringworld_platform" in packages
    assert FOLDER == ROOT / "platform/ringworld_platform/deploy"
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert not {"deploy", "deploy/", "*.yaml", "*.json"} & set(ignored)


def test_the_command_writes_and_never_replaces_unasked(tmp_path: Path) -> None:
    command = ["deploy", "bucket", "--bucket", "my-runs", "--to", str(tmp_path / "new")]
    assert CliRunner().invoke(app, command).exit_code == 0
    policy = tmp_path / "new" / "iam-policy.json"
    before = policy.read_text()
    assert CliRunner().invoke(app, command).exit_code == 0, "the same again is no change"
    policy.write_text("mine")
    refused = CliRunner().invoke(app, [*command, "--region", "eu-west-1"])
    assert refused.exit_code == 2
    assert "iam-policy.json" in refused.output and "--force" in refused.output
    assert policy.read_text() == "mine"
    assert "us-east-1" in (tmp_path / "new" / "bucket.yaml").read_text(), "all or none"
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    assert policy.read_text() == before


def test_what_watches_a_cluster_points_to_it_and_to_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where no cluster runs
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/keys/token")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    to = tmp_path / "watch"
    command = ["deploy", "observability", "--to", str(to), "--dashboard", "http://10.0.0.5:8265/"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    printed = result.output.replace("\n", " ")
    assert f"prometheus --config.file={to}/prometheus.yml" in printed
    assert (
        f"grafana server --homepath=/usr/share/grafana --config={to}/grafana/grafana.ini" in printed
    )

    scraped = yaml.safe_load((to / "prometheus.yml").read_text())
    (found,) = scraped["scrape_configs"][0]["http_sd_configs"]
    assert found["url"] == "http://10.0.0.5:8265/api/prometheus/sd"
    # Prometheus takes no type for Bearer only where it scrapes, not where it asks whom to.
    assert found["authorization"] == {"type": "Bearer", "credentials_file": "/keys/token"}
    ini = configparser.ConfigParser()
    ini.read(to / "grafana/grafana.ini")
    assert ini["server"]["http_addr"] == "127.0.0.1"
    provisioning = Path(ini["paths"]["provisioning"])
    assert provisioning == to / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/ringworld.yaml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    (provider,) = yaml.safe_load((provisioning / "dashboards/ringworld.yaml").read_text())[
        "providers"
    ]
    boards = list(Path(provider["options"]["path"]).glob("*.json"))
    assert boards == [Path(ini["dashboards"]["default_home_dashboard_path"])]

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    assert "authorization" not in (to / "prometheus.yml").read_text()
    wrong = CliRunner().invoke(app, ["deploy", "observability", "--dashboard", "10.0.0.5:8265"])
    assert wrong.exit_code == 2


def test_the_command_lists_what_there_is() -> None:
    output = CliRunner().invoke(app, ["deploy", "--list"]).output
    files = [name for target in TARGETS.values() for name in target.files]
    assert all(name.partition("/")[0] in output for name in files)


@pytest.mark.parametrize(
    ("target", "changes", "said"),
    [
        ("kubernets", {}, "did you mean kubernetes"),
        ("aws", {"subnet": ""}, "aws also needs --subnet"),
        ("bucket", {"bucket": ""}, "--bucket"),
        ("bucket", {"bucket": "My_Runs"}, "--bucket or --prefix"),
        ("bucket", {"prefix": "/"}, "--prefix is empty"),
        ("bucket", {"bucket": "key:secret@runs"}, "--bucket or --prefix"),
        ("aws", {"name": "Ring"}, "--name 'Ring'"),
        ("aws", {"region": "useast"}, "--region 'useast'"),
        ("aws", {"instance_type": "p5.48xlage"}, "write p5.48xlarge"),
        ("aws", {"subnet": "x\n  - y"}, "--subnet"),
        ("aws", {"max_workers": 0}, "--max-workers 0"),
    ],
)
def test_what_cannot_be_is_refused(target: str, changes: dict[str, Any], said: str) -> None:
    values = Values(**({name: getattr(VALUES, name) for name in Values.__slots__} | changes))
    with pytest.raises(DeployError) as refusal:
        render(target, values)
    assert said in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write(render("bucket", VALUES), tmp_path / "file")


# --- ray up ---


def ray_up(text: str) -> dict[str, Any]:
    """What `ray up` does with the file before it contacts anybody."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(text)
    validate_config(filled := prepare_config(copy.deepcopy(config)))
    return dict(filled)


@pytest.mark.parametrize("instance_type", MACHINES)
def test_ray_takes_the_cluster_of_aws(instance_type: str) -> None:
    values = Values(
        subnet="subnet-1",
        worker_subnet="subnet-2",
        security_group="sg-1",
        instance_type=instance_type,
    )
    config = ray_up(render("aws", values)["aws.yaml"])
    kinds, machine = config["available_node_types"], MACHINES[instance_type]
    assert config["head_node_type"] == "head"
    assert kinds["head"]["resources"]["CPU"] == 0
    for name in ("gpu", "gpu-spot"):
        kind, node = kinds[name], kinds[name]["node_config"]
        assert (kind["min_workers"], kind["max_workers"]) == (0, values.max_workers)
        assert kind["resources"]["GPU"] == machine.gpus
        assert 0 < kind["resources"]["CPU"] < machine.cpus
        cards = node["NetworkInterfaces"]
        assert [card["NetworkCardIndex"] for card in cards] == list(range(machine.network_cards))
        assert [card["DeviceIndex"] for card in cards] == [0] + [1] * (machine.network_cards - 1)
        assert {card["SubnetId"] for card in cards} == {"subnet-2"}
        assert node["Placement"]["GroupName"] == values.name
    assert kinds["gpu-spot"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert not kinds["gpu"]["node_config"]["InstanceMarketOptions"]
    profiles = {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in kinds.values()}
    assert profiles == {"ringworld-head", "ringworld-worker"}, "never Ray's own, with all rights"


@pytest.mark.parametrize(
    ("old", "new"), [("max_workers: 8", "max_worker: 8"), ("type: aws", "kind: aws")]
)
def test_ray_refuses_a_slip_in_it(old: str, new: str) -> None:
    text = render("aws", VALUES)["aws.yaml"]
    assert old in text
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError, AttributeError)):
        ray_up(text.replace(old, new))


def test_a_gang_gets_spot_machines_first_and_all_at_once() -> None:
    """What Ray's autoscaler would start for 24 workers of a GPU each."""
    from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
    from ray.autoscaler._private.resource_demand_scheduler import (
        _default_utilization_scorer,
        get_nodes_for,
    )

    kinds = ray_up(render("aws", VALUES)["aws.yaml"])["available_node_types"]
    known = NodeAvailabilitySummary(node_availabilities={})
    scorer = functools.partial(_default_utilization_scorer, node_availability_summary=known)
    bundles = [{"GPU": 1.0, "CPU": 8.0}] * 24
    nodes, left = get_nodes_for(kinds, {}, "head", 8, bundles, scorer)
    assert (dict(nodes), left) == ({"gpu-spot": 3}, [])


def test_the_cluster_of_aws_is_closed() -> None:
    text = render("aws", VALUES)["aws.yaml"]
    config = ray_up(text)
    profile = next(line for line in config["setup_commands"] if "ringworld-profile" in line)
    assert "RAY_AUTH_MODE=token" in profile
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    for line in starts:
        assert line.startswith(". ~/.ringworld-profile;"), "each with the token"
    hosts = re.findall(r"--dashboard-host=(\S+)", text)
    assert hosts == ["127.0.0.1"]
    assert "~/.ray/auth_token" in config["file_mounts"]


# --- Kubernetes ---


def kubernetes_schema(kind: str) -> dict[str, Any]:
    return schema(json.loads(POD_TYPES.read_text()) | KUBERAY, kind)


@pytest.mark.parametrize(
    ("name", "kind"), [("kuberay-cluster.yaml", "RayCluster"), ("kuberay-job.yaml", "RayJob")]
)
def test_kuberay_takes_the_manifests(name: str, kind: str) -> None:
    manifest = rendered("kubernetes", name)
    jsonschema.validate(manifest, kubernetes_schema(kind))
    spec = manifest["spec"]
    cluster = spec if kind == "RayCluster" else spec["rayClusterSpec"]
    assert cluster["rayVersion"] == pins()["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["serviceType"] == "ClusterIP" and not head.get("enableIngress")
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert [group["groupName"] for group in groups] == ["gpu-spot", "gpu"]
    for group in [head, *groups]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["serviceAccountName"] == "ringworld"
        for container in pod["containers"]:
            assert container["image"] == VALUES.image
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["requests"] == container["resources"]["limits"]
    for group in groups:
        assert (group["minReplicas"], group["maxReplicas"]) == (0, VALUES.max_workers)
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("enableInTreeAutoscaling: true", "enableInTreeAutoScaling: true"),
        ("idleTimeoutSeconds: 600", "idleTimeoutSeconds: 10min"),
        ("{mode: token}", "{mode: tokens}"),
        ("maxReplicas: 8", "maxReplicas: '8'"),
        ("groupName: gpu-spot", "name: gpu-spot"),
        ("terminationGracePeriodSeconds: 120", "terminationGracePeriod: 120"),
        ("mountPath: /dev/shm", "path: /dev/shm"),
    ],
)
def test_the_schema_refuses_a_slip(old: str, new: str) -> None:
    text = render("kubernetes", VALUES)["kuberay-cluster.yaml"]
    assert old in text
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text.replace(old, new)), kubernetes_schema("RayCluster"))


def test_the_job_runs_a_command_that_there_is() -> None:
    words = rendered("kubernetes", "kuberay-job.yaml")["spec"]["entrypoint"].split()
    assert words[0] == "ringworld"
    usage = CliRunner().invoke(app, [words[1], "--help"])
    assert usage.exit_code == 0 and "--address" in usage.output


# --- the bucket and the rights to it ---


def test_the_policy_is_what_the_store_needs_and_no_more(
    s3_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Every operation of a store, on a real server; botocore's own log tells the requests."""
    from ringworld_workers.store.s3_store import S3Store

    store = S3Store(s3_url, part_bytes=5 << 20)
    with caplog.at_level(logging.DEBUG, "botocore.endpoint"):
        store.check_writable()
        store.put("a/large", [bytes(6 << 20)])
        store.put("a/small", [b"0123"])
        assert not store.put_if_absent("a/small", b"4567")
        data, etag = store.get_with_etag("a/small")
        store.put_if_match("a/small", data, etag)
        store.get("a/small")
        store.read_into("a/small", 1, [memoryview(bytearray(2))])
        store.read_into("a/small", 0, [])
        store.list("a")
        store.folders("")
        with pytest.raises(RuntimeError, match="lost"):
            store.put("b/broken", _breaks())
        store.unfinished("b")
        store.remove_unfinished("b", older_than_seconds=0.0)
        store.delete("a/small")
        store.delete_prefix("a")
    asked = set(re.findall(r"OperationModel\(name=(\w+)\)", caplog.text))
    caplog.clear()  # pages, where the test fails
    needed = {RIGHTS[request] for request in asked}

    policy = json.loads(render("bucket", VALUES)["iam-policy.json"])
    granted: set[str] = set()
    for statement in policy["Statement"]:
        actions = statement["Action"]
        granted |= {actions} if isinstance(actions, str) else set(actions)
        assert statement["Resource"].startswith("arn:aws:s3:::my-runs")
        assert "*" not in statement["Resource"].removesuffix("/runs/*")
    assert granted == needed


def _breaks() -> Any:
    yield bytes(12 << 20)
    raise RuntimeError("lost")


def test_the_bucket_is_private_and_its_policy_the_same() -> None:
    files = render("bucket", VALUES)
    resources = rendered("bucket", "bucket.yaml")["Resources"]
    bucket = resources["Bucket"]
    assert bucket["DeletionPolicy"] == "Retain"
    assert set(bucket["Properties"]["PublicAccessBlockConfiguration"].values()) == {True}
    assert bucket["Properties"]["BucketEncryption"]
    rules = bucket["Properties"]["LifecycleConfiguration"]["Rules"]
    assert any("AbortIncompleteMultipartUpload" in rule for rule in rules)
    stated = resources["StorePolicy"]["Properties"]["PolicyDocument"]
    assert stated == json.loads(files["iam-policy.json"])
    tokens = yaml.scan(files["bucket.yaml"])
    assert not any(isinstance(token, yaml.AliasToken) for token in tokens), "AWS takes none"
    inbound = resources["Nodes"]["Properties"]["SecurityGroupIngress"]
    assert [(rule["FromPort"], rule["CidrIp"]) for rule in inbound] == [(22, {"Ref": "SshFrom"})]


# --- the image ---


def test_the_image_is_built_of_what_there_is() -> None:
    text = render("image", VALUES)["Dockerfile"]
    lines = re.sub(r"\\\n", " ", text).splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    assert copied and all((ROOT / source).exists() for sources in copied for source in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    sources = {
        package.split("/")[0] for package in project["tool"]["hatch"]["build"]["dev-mode-dirs"]
    }
    assert sources | {project["project"]["readme"], "pyproject.toml"} <= {
        s for c in copied for s in c
    }
    pinned = re.findall(r"([a-z]+)(?:\[[a-z,]+\])?==([\d.]+)", text)
    assert {name for name, _ in pinned} == {"torch", "deepspeed", "ray"}
    assert all(pins()[name] == version for name, version in pinned)
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER 1000"] and lines.index(users[0]) > lines.index(
        "COPY platform /src/platform"
    )
    assert "RAY_AUTH_MODE=token" in text
    base = next(line for line in lines if line.startswith("FROM "))
    assert re.fullmatch(r"FROM nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", base)


# --- the page ---


def commands_of_the_page() -> list[list[str]]:
    """Command lines of docs/deploy.md, split as a shell does."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    inline = re.findall(r"`((?:ringworld|ray|kubectl) [^`\n]+)`", text)
    named = [line.removeprefix("$ ") for line in [*lines, *inline] if "=$(" not in line]
    words = [
        shlex.split(line) for line in named if re.match(r"[A-Z_]+=|ringworld|ray|kubectl", line)
    ]
    bare = [[w for w in line if not re.fullmatch(r"[A-Z_]+=\S+", w)] for line in words]
    return [line for line in bare if line and line[0] in ("ringworld", "ray", "kubectl")]


def test_the_page_says_commands_that_there_are() -> None:
    """Names and options, of ringworld's commands and of Ray's; its files are those we write."""
    from ray.scripts.scripts import cli as ray_cli

    said = commands_of_the_page()
    assert {line[0] for line in said} == {"ringworld", "ray", "kubectl"} and len(said) > 20
    for line in said:
        if line[0] == "kubectl":
            continue
        command: Any = ray_cli if line[0] == "ray" else get_command(app)
        rest = line[1:]
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, line
            command, rest = command.commands[rest[0]], rest[1:]
        options = {option for param in command.params for option in param.opts}
        options |= {option for param in command.params for option in param.secondary_opts}
        given = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert given <= options, line
    files = {name for target in TARGETS.values() for name in target.files}
    named = set(re.findall(r"\bdeploy/([\w.-]+)", (ROOT / "docs" / "deploy.md").read_text()))
    assert named <= files
    listed = CliRunner().invoke(app, ["deploy", "--list"]).output
    assert listed.strip() in (ROOT / "docs" / "deploy.md").read_text()
