"""Tells Ray that the cloud is about to take this node away, so that jobs save and move.

``python -m ringworld_platform.spot_notice`` stays beside Ray on a machine of AWS and asks its
metadata service, as AWS advises, every five seconds. With ``--now SECONDS`` it tells Ray at once,
and stays until the node's workers have gone: what Kubernetes runs before it ends a pod. Needs no
credentials and no rights but the cluster's token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime

import psutil

log = logging.getLogger(__name__)

# Of AWS (IMDSv2): the same address on each of its machines, and on no network.
METADATA = "http://169.254.169.254"
LOOK_SECONDS = 5.0
REPLY_SECONDS = 3.0
TOKEN_SECONDS = 300
RAY_SECONDS = 60.0
_OF_RAY_ITSELF = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


def interruption(metadata: str = METADATA) -> float | None:
    """When this machine will be taken away, if AWS has said so.

    Args:
        metadata: url of the metadata service.

    Returns:
        Seconds since the epoch; None as long as there is no notice, or no service that answers.
    """
    life = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
    try:
        token = _ask(f"{metadata}/latest/api/token", "PUT", life)
        shown = {"X-aws-ec2-metadata-token": token}
        said = _ask(f"{metadata}/latest/meta-data/spot/instance-action", "GET", shown)
        return datetime.fromisoformat(str(json.loads(said)["time"])).timestamp()
    except urllib.error.HTTPError as error:
        if error.code != 404:  # which is how it says that there is none
            log.warning("the metadata service answers %d", error.code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("no answer of the metadata service: %s", type(error).__name__)
    return None


def watch(
    tell: Callable[[str, float], None],
    *,
    metadata: str = METADATA,
    look_seconds: float = LOOK_SECONDS,
) -> None:
    """Wait for a notice, and pass it on; once, for a notice is never taken back.

    Args:
        tell: takes the reason and the seconds that are left.
        metadata: url of the metadata service.
        look_seconds: between two looks.
    """
    while (end := interruption(metadata)) is None:
        time.sleep(look_seconds)
    tell("the cloud takes back this spot machine", max(0.0, end - time.time()))


def drain(reason: str, seconds: float) -> None:
    """Have Ray start nothing new on this node and tell everybody why.

    Args:
        reason: for people.
        seconds: that are left.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", reason]
    command += ["--deadline-remaining-seconds", str(int(seconds))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RAY_SECONDS)
    except subprocess.TimeoutExpired:
        log.error("Ray did not answer within %g s", RAY_SECONDS)
        return
    if done.returncode:
        log.error("Ray refused: %s", done.stderr.strip()[-300:])
    else:
        log.info("told Ray: %s, %d s are left", reason, seconds)


def workers_here() -> int:
    """Ray's processes on this machine, or in this container, that work for somebody."""
    count = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, IndexError):
            name = process.cmdline()[0]
            count += name.startswith("ray::") and not name.startswith(_OF_RAY_ITSELF)
    return count


def main() -> None:
    """See the module."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--now", metavar="SECONDS", type=float, help="this node ends in so long")
    now: float | None = parser.parse_args().now
    if now is None:
        watch(drain)
        return
    end = time.monotonic() + now
    drain("its pod is being ended", now)
    while workers_here() and time.monotonic() < end:
        time.sleep(1.0)


def _ask(url: str, method: str, headers: dict[str, str]) -> str:
    # Never through a proxy: it would be asked for its own machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, method=method, headers=headers)
    with opener.open(request, timeout=REPLY_SECONDS) as reply:
        return str(reply.read().decode())


if __name__ == "__main__":
    main()
