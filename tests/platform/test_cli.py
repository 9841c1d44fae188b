"""The command line: help, exit codes, messages, and run folders read without a cluster."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from ringworld_platform import head
from ringworld_platform.cli import app
from ringworld_platform.left_alone import LeftAlone
from ringworld_workers.log_lines import log_line

COMMANDS = (
    *("validate", "run", "submit", "stop", "resume", "status", "list", "watch", "logs", "report"),
    *(
        "events",
        "doctor",
        "up",
        "down",
        "data",
        "parity",
        "dev",
        "plan",
        "generate",
        "chat",
        "serve",
    ),
)
IN_GROUPS = {"data": "build", "dev": "s3"}
"""A command of each group."""


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on this machine is not the tests' business."""
    monkeypatch.setattr(head, "find_running", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def ringworld(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})


@pytest.fixture
def bad_spec(tmp_path: Path) -> Path:
    path = tmp_path / "bad.yaml"
    path.write_text("kind: train\nname: bad\nstagess: []\ndata: {}\n")
    return path


@pytest.fixture
def in_runs(recorded_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory whose runs folder holds the recorded run."""
    monkeypatch.chdir(recorded_run.parent.parent)
    return recorded_run


def test_help_groups_commands_and_shows_the_shortest_path() -> None:
    result = ringworld("--help")
    assert result.exit_code == 0
    for text in (*COMMANDS, "Train", "Look", "Data and machines", "ringworld run jobs/quickstart"):
        assert text in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command: str) -> None:
    names = [command, IN_GROUPS[command]] if command in IN_GROUPS else [command]
    result = ringworld(*names, "--help")
    assert result.exit_code == 0
    assert f"$ ringworld {' '.join(names)}" in result.output


def test_start_up_imports_nothing_heavy() -> None:
    code = (
        "import sys, ringworld_platform.cli;"
        "heavy = {'torch', 'ray', 'mlflow', 'matplotlib', 'deepspeed', 'numpy', 'pydantic'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_bad_spec_is_the_users_mistake(bad_spec: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from ringworld_platform.cli import main; main()"]
        + ["run", str(bad_spec)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "did you mean stages?" in done.stderr
    assert f"{bad_spec}:3" in done.stderr
    assert "nothing was started" in done.stderr


@pytest.mark.parametrize("command", ["validate", "submit", "doctor"])
def test_every_command_that_takes_a_spec_refuses_a_bad_one(command: str, bad_spec: Path) -> None:
    result = ringworld(command, str(bad_spec))
    assert result.exit_code == 2
    assert "stagess" in result.stderr


def test_an_unknown_option_is_the_users_mistake() -> None:
    result = ringworld("run", "--colour", "x.yaml")
    assert result.exit_code == 2
    assert "--colour" in result.stderr


def test_status_reads_the_folder_and_says_so(in_runs: Path) -> None:
    result = ringworld("status", "quickstart")
    assert result.exit_code == 0, result.output
    assert "no cluster is up" in result.stderr
    for text in ("quickstart-1", "SUCCEEDED", "16k (3/3)", "02-16k/step-00000020", "8Ki"):
        assert text in result.stdout


def test_status_json_holds_what_the_contract_says(in_runs: Path) -> None:
    result = ringworld("status", "--json")
    status = json.loads(result.stdout)
    expected = (
        "job run_id state reason stage stage_index num_stages step num_steps global_step attempt "
        "context_length ring_size data_parallel_size checkpoint loss tokens_per_second "
        "eta_seconds error run_folder workers"
    )
    assert set(expected.split()) <= set(status)
    assert status["run_id"] == "quickstart-1"
    row = "rank pid node device phase step slow since hop awaits memory_bytes compute_seconds"
    assert set(status["workers"][0]) == set(row.split())


@pytest.mark.parametrize("command", ["status", "logs", "events", "report", "watch", "resume"])
def test_an_unknown_job_names_the_nearest(command: str, in_runs: Path) -> None:
    result = ringworld(command, "quikstart")
    assert result.exit_code == 2
    assert "did you mean quickstart" in result.stderr
    assert "Traceback" not in result.output


def test_no_runs_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ringworld("status").exit_code == 2
    empty = ringworld("list")
    assert empty.exit_code == 0
    assert "no runs yet" in empty.stdout
    assert json.loads(ringworld("list", "--json").stdout) == []
    assert list(tmp_path.iterdir()) == []


def test_list_shows_every_run(in_runs: Path) -> None:
    result = ringworld("list")
    assert "quickstart-1" in result.stdout
    assert "SUCCEEDED" in result.stdout
    (only,) = json.loads(ringworld("list", "--json").stdout)
    assert only["job"] == "quickstart"
    assert json.loads(ringworld("list", "--json", "--state", "running,failed").stdout) == []
    assert "quickstart-1" in ringworld("list", "--state", "succeeded").stdout
    assert "none of 1 runs is FAILED" in ringworld("list", "--state", "FAILED").stderr
    unknown = ringworld("list", "--state", "runing")
    assert unknown.exit_code == 2
    assert "did you mean RUNNING?" in " ".join(unknown.stderr.replace("│", " ").split())


def test_logs_of_ranks(in_runs: Path) -> None:
    assert "quickstart-1 has logged nothing yet" in ringworld("logs", "quickstart").stderr
    (in_runs / "logs").mkdir()
    plain = "hello from rank 1\n2026-11-22 12:39:26,406 WARNING a.loop: bye\nof it\n"
    (in_runs / "logs" / "rank-1.log").write_text(plain)
    said = log_line(1.79e9, "INFO", "a.loop", "joined", "Trace\nback", rank=0, stage="4k", step=3)
    (in_runs / "logs" / "rank-0.log").write_text(f"{said}\n")

    one = ringworld("logs", "quickstart", "--rank", "1").stdout.splitlines()
    assert one[0] == "hello from rank 1" and one[2] == "of it"
    assert re.fullmatch(r"11-2\d [\d:]{8}  WARN   r1  -         loop: bye", one[1])
    both = ringworld("logs", "-f", "quickstart-1").stdout  # a run that has ended
    assert "  INFO   r0  4k/3      loop: joined\n    Trace\n    back\n" in both
    assert both.count("bye") == 1 and "\x1b" not in both
    (found,) = ringworld("logs", "quickstart", "--json", "--grep", "BACK|joi").stdout.splitlines()
    assert json.loads(found) == json.loads(said)
    assert ringworld("logs", "quickstart", "--level", "warn").stdout.count("bye\nof it") == 1
    assert "none of 4 lines" in ringworld("logs", "quickstart", "--stage", "9k").stderr
    assert "ranks 0 to 1" in ringworld("logs", "quickstart", "--rank", "7").stderr
    bad = ringworld("logs", "quickstart", "--rank", "x")
    assert bad.exit_code == 2 and "write 3, or 0,2" in " ".join(bad.stderr.split())


def test_events_are_a_table_or_json(in_runs: Path) -> None:
    table = ringworld("events")
    assert table.exit_code == 0, table.output
    lines = table.stdout.splitlines()
    assert lines[0].split() == ["time", "stage", "step", "kind", "rank", "text"]
    assert len(lines) == 4 and lines[2].endswith("going back to step 10 of 8k")
    found = [json.loads(line) for line in ringworld("events", "--json").stdout.splitlines()]
    assert [event["kind"] for event in found] == ["submitted", "worker_lost", "recovered"]
    one = ringworld("events", "quickstart", "-f", "--kind", "worker_lost,recovered", "--json")
    assert len(one.stdout.splitlines()) == 2
    none = ringworld("events", "--kind", "recoverd")
    assert none.stdout == "" and "did you mean recovered?" in none.stderr
    assert "none has a stage" in ringworld("events", "--stage", "4k").stderr
    assert ringworld("events", "--since", "1h").stdout == "", "they are of 2026"
    bad = ringworld("events", "--since", "soon")
    assert bad.exit_code == 2 and "write 10min or 2h" in " ".join(bad.stderr.split())
    (in_runs / "events.jsonl").write_text('{"seq": 1, "torn\n[]\n')
    assert "no events yet" in ringworld("events").stderr


@pytest.mark.parametrize("command", ["events", "logs", "watch"])
def test_an_abandoned_run_is_not_followed_for_ever(
    in_runs: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("ringworld_platform.left_alone.GRACE_SECONDS", 0.2)
    state = in_runs / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "state": "RUNNING"}))
    follow = [] if command == "watch" else ["-f"]
    done = ringworld(command, "quickstart-1", *follow)
    assert done.exit_code == 0, done.output
    told = " ".join(done.stderr.split())
    assert "quickstart-1 has not ended, and is followed no longer: no controller runs it" in told
    assert "`ringworld resume quickstart-1` continues it" in told
    assert command == "logs" or "going back to step 10 of 8k" in done.stdout


def test_a_run_is_left_alone_only_where_that_lasts() -> None:
    now = [0.0]
    alone = LeftAlone(10.0, lambda: now[0])
    found = []
    for moment, left in ((0, True), (9, True), (9.5, False), (12, True), (21, True), (22, True)):
        now[0] = float(moment)
        found.append(alone.seen({"left": left}))
    assert found == [False, False, False, False, False, True], "a controller came in between"


def test_watch_without_a_terminal_prints_lines(in_runs: Path) -> None:
    result = ringworld("watch")
    assert result.exit_code == 0, result.output
    assert "stage 16k step 20/20" in result.stdout


def test_report_writes_the_file(in_runs: Path) -> None:
    result = ringworld("report")
    assert result.exit_code == 0, result.output
    assert "held-out loss" in result.stdout
    assert (in_runs / "report.html").is_file()


def test_a_bug_leaves_its_trace_in_a_file(
    in_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(view: object, name: str) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("ringworld_platform.run_view.find_status", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = ringworld("status")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "internal error: KeyError" in result.stderr
    (trace,) = tmp_path.glob("ringworld-error-*.txt")
    assert "Traceback" in trace.read_text()
    assert "Traceback" in ringworld("--debug", "status").stderr


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt])
def test_ctrl_c_gives_130(
    in_runs: Path, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    def interrupted(view: object, name: str) -> None:
        raise interrupt

    monkeypatch.setattr("ringworld_platform.run_view.find_status", interrupted)
    assert ringworld("status").exit_code == 130


def test_a_closed_pipe_is_quiet(in_runs: Path) -> None:
    code = "from ringworld_platform.cli import main; main()"
    command = f"{sys.executable} -c '{code}' list --json | true"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr


def test_version() -> None:
    assert ringworld("--version").stdout.startswith("ringworld ")


def test_a_report_that_cannot_be_written_hides_not_how_the_run_ended(
    recorded_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ringworld_platform.commands.train import _exit

    (recorded_run / "report.html").mkdir()
    failed = {"run_id": "quickstart-1", "run_folder": recorded_run, "state": "FAILED"}

    with pytest.raises(typer.Exit) as ended:
        _exit({**failed, "error": "the disk is full"})

    assert ended.value.exit_code == 1
    assert "quickstart-1 failed: the disk is full" in capsys.readouterr().err
