"""The benchmark's command line: names, files that go on, are set aside and filed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from fusednorm.bench import __main__ as command
from fusednorm.bench import machine, progress, selection, steps, timing
from fusednorm.bench import run as run_module
from fusednorm.bench.providers import PROVIDERS
from fusednorm.bench.results import FIELDS, Log, key, load
from fusednorm.bench.run import run

BENCH = [sys.executable, "-m", "fusednorm.bench"]
TINY = ["--device", "cpu", "--threads", "1", "--dtype", "float32", "--op", "batch_norm"]
TINY += ["--provider", "native", "reference"]


@pytest.fixture(autouse=True)
def as_users_run(poisoned, monkeypatch):
    """Filling every fresh tensor would be timed too; the copy takes seconds in every process."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    monkeypatch.setattr(timing, "copy_gb_per_s", lambda device: 10.0)


def bench(*arguments, check=True):
    command = [*BENCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("--kind", "step"),
        ("--op", "batch_group_norm[32]"),
        ("--op", "resnet50[batch_norm]"),
        ("--provider", "cudnn-frontend"),
        ("--shapes", "detection"),
        ("--dtype", "bfloat16"),
        ("--layout", "nhwc"),
        ("--direction", "infer_folded"),
        ("--fusion", "residual+leaky_relu"),
        ("--mode", "eager"),
        ("--cache", "warm"),
    ],
)
def test_unknown_names_list_the_known(option, known, capsys, tmp_path):
    out = tmp_path / "bench.json"
    assert command.main(["run", "--device", "cpu", "--out", str(out), option, "nonsense"]) == 2
    told = capsys.readouterr().err
    assert "unknown" in told
    assert "'nonsense'" in told
    assert known in told
    assert told.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--repetitions", "0"], "--repetitions 0: expected at least 1"),
        (["--threads", "0"], "--threads 0: expected at least 1"),
        (["--threads", "99999"], "--threads 99999: expected at most the"),
        (["--side", "0"], "--side 0: expected at least 1"),
        (["--batch", "2", "0"], "--batch 0: expected at least 1"),
        (["--budget", "-1"], "--budget -1: expected seconds"),
        (["--budget", "nan"], "--budget nan: expected seconds"),
    ],
)
def test_numbers_are_checked(given, told, capsys, tmp_path):
    assert command.main(["run", "--device", "cpu", "--out", str(tmp_path / "b"), *given]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_no_gpu_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["run", "--device", "cuda", "--out", str(tmp_path / "b.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_list_knows_what_is_here(capsys):
    assert command.main(["list"]) == 0
    told = capsys.readouterr().out
    for line in (
        "batch_group_norm[32]",
        "resnet50[batch_norm]",
        "odd.c65",
        "3d.stem",
        "residual+silu",
        "compile-max-autotune",
    ):
        assert line in told
    if not torch.cuda.is_available():
        assert "needs a CUDA GPU" in told


def chosen(*arguments):
    options = command._parser().parse_args(["run", *arguments])
    return [row for job in selection.jobs(options, "cpu") for row in job.rows]


def test_filters_narrow_what_is_measured():
    everything = chosen()
    assert {row["kind"] for row in everything} == {"kernel", "step"}
    # Torch compiles for seconds a case: asked for only.
    assert not {row["provider"] for row in everything} & {*selection.COMPILERS}
    rows = chosen("--shapes", "tiny", "--fusion", "none", "silu", "residual+relu")
    assert {row["kind"] for row in rows} == {"kernel"}
    assert {(row["act"], row["residual"]) for row in rows} == {
        (None, False),
        ("silu", False),
        ("relu", True),
    }
    rows = chosen("--op", "resnet50[batch_norm]", "--direction", "infer", "--batch", "3")
    assert {(r["op"], r["direction"], r["shape"][0]) for r in rows} == {
        ("resnet50[batch_norm]", "infer", 3)
    }
    rows = chosen("--kind", "step", "--dtype", "bfloat16", "--provider", "native")
    assert {(r["kind"], r["dtype"], r["provider"]) for r in rows} == {
        ("step", "bfloat16", "native")
    }


def test_a_default_run_on_a_gpu_is_hours_and_not_days(monkeypatch):
    monkeypatch.setattr(run_module, "_l2_bytes", lambda: 50 * 2**20)
    for name, provider in PROVIDERS.items():
        here = dataclasses.replace(provider, missing=lambda device: None)
        monkeypatch.setitem(PROVIDERS, name, here)
    for arguments, groups in (["run"], 200), (["run", "--quick"], 40):
        options = command._parser().parse_args(arguments)
        found = selection.jobs(options, "cuda")
        assert len(found) <= groups
        kinds = [job.rows[0]["kind"] for job in found]
        # A quick run compiles until its budget is spent, so networks come first.
        assert (kinds[0], kinds[-1]) == (
            ("step", "kernel") if options.quick else ("kernel", "step")
        )
        ways = {(row["graph"], row["cold"]) for job in found for row in job.rows}
        assert len(ways) == 4


def test_nothing_that_fits_is_an_error(capsys, tmp_path):
    out = str(tmp_path / "b.json")
    asked = ["--shapes", "odd.plain", "--layout", "nhwc", "--device", "cpu", "--out", out]
    assert command.main(["run", *asked]) == 2
    assert "nothing to measure" in capsys.readouterr().err


def test_no_provider_that_runs_here_is_an_error(capsys, tmp_path):
    asked = ["--shapes", "tiny", "--provider", "cudnn", "--device", "cpu"]
    assert command.main(["run", *asked, "--out", str(tmp_path / "b.json")]) == 2
    told = capsys.readouterr()
    assert told.out == "cudnn: not measured, needs a CUDA GPU\n"
    assert told.err.startswith("error: nothing to measure")


def test_stopped_by_hand_says_how_to_go_on(capsys, monkeypatch):
    def stopped(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run", stopped)
    assert command.main(["run"]) == 130
    assert "goes on" in capsys.readouterr().err


# -- whole commands -------------------------------------------------------------------------------


def test_resumes_after_a_kill(tmp_path):
    """SIGKILL in the middle: the rows that were written stay as they are, the rest is added."""
    out = tmp_path / "b.json"
    asked = [*TINY, "--shapes", "tiny", "odd.c24", "cpu", "--direction", "forward", "both"]
    asked = ["run", *asked, "--out", str(out), "--repetitions", "8"]
    victim = subprocess.Popen([*BENCH, *asked], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out.exists() and len(json.loads(out.read_text())["rows"]) >= 4):
        assert victim.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    before = load(out)[1]
    assert 4 <= len(before) < 32

    done = bench(*asked)
    assert f"going on: {len(before)} rows are there" in done.stdout
    found, rows = load(out)
    assert rows[: len(before)] == before
    assert len(rows) == len({key(row) for row in rows}) == 4 * 2 * 2 * 2
    assert len(found["runs"]) == 2
    assert {row["run"] for row in rows} == {0, 1}
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_command_line_end_to_end(tmp_path):
    """run, then report with all outputs, as a user would; an earlier file is kept."""
    out = tmp_path / "b.json"
    page, text, light, dark = (tmp_path / f"b.{end}" for end in ("html", "md", "png", "dark.png"))
    out.write_text("an hour of somebody's GPU")
    filters = [*TINY, "--shapes", "tiny.a", "--direction", "forward"]
    filters[filters.index("reference")] = "cudnn"
    done = bench("run", *filters, "--repetitions", 5, "--out", out, "--save", tmp_path / "results")
    assert "cudnn: not measured, needs a CUDA GPU" in done.stdout
    assert "set aside" in done.stdout
    assert (tmp_path / "b.before.json").read_text() == "an hour of somebody's GPU"
    # Not a terminal: no bar, and nothing of the profiler's.
    assert done.stderr == ""
    (folder,) = (tmp_path / "results").iterdir()
    assert folder.name == machine.slug(load(out)[0])
    assert {path.name for path in folder.iterdir()} > {"bench.json"}
    assert load(folder / "bench.json") == load(out)
    outputs = ["--html", page, "--markdown", text, "--png", light, "--dark-png", dark]
    done = bench("report", folder / "bench.json", *outputs)
    for shown in (done.stdout, text.read_text()):
        assert "(2x8x4x4) float32 nhwc" in shown
    assert page.read_text().lower().startswith("<!doctype html>")
    assert light.read_bytes().startswith(b"\x89PNG")
    assert dark.read_bytes().startswith(b"\x89PNG")
    failed = bench("report", text, check=False)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)


@pytest.mark.slow
def test_quick_takes_less_than_a_minute(tmp_path):
    """Also on a machine that has other things to do; then it measures less and says so."""
    began = time.monotonic()
    done = bench("run", "--quick", "--device", "cpu", "--out", tmp_path / "b.json")
    taken = time.monotonic() - began
    rows = load(tmp_path / "b.json")[1]
    timed = [row for row in rows if row["ms_median"] is not None]
    assert {"native", "reference", "eager"} <= {row["provider"] for row in timed}
    assert taken < 60, done.stdout.splitlines()[:12]


def test_progress_is_quiet_unless_somebody_looks(capsys, monkeypatch):
    with progress.shown() as tell:
        tell(0, 2, "a group", 3.0)
    assert capsys.readouterr() == ("", "")
    with progress.shown("plain") as tell:
        tell(0, 2, "a group", float("nan"))
        tell(1, 2, "another", 83.0)
        tell(2, 2, "", 0.0)
    assert capsys.readouterr().err == "[1/2] a group\n[2/2] another  1:23 left\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with progress.shown() as tell:
        tell(1, 2, "without rich", 5.0)
    assert capsys.readouterr().err == "[2/2] without rich  0:05 left\n"


def test_a_bar_on_a_terminal():
    """Through a terminal of its own, since rich asks for one."""
    pytest.importorskip("rich")
    code = (
        "from fusednorm.bench import progress\n"
        "with progress.shown() as tell:\n"
        "    tell(0, 4, 'a group [x]', float('nan')); tell(3, 4, 'the last [y]', 61.0)\n"
    )
    leader, follower = os.openpty()
    environ = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", code], stderr=follower, env=environ)
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert done.returncode == 0
    assert "3/4" in shown
    assert "1:01 left" in shown
    assert "the last [y]" in shown


def test_what_a_run_says_is_said_once(capsys):
    said = []
    say = command._once(said.append)
    for _ in range(2):
        say("cuda: not measured, needs a CUDA GPU")
    assert said == ["cuda: not measured, needs a CUDA GPU"]


def test_steps_stand_in_the_same_file():
    """What a network's job promises and makes are the same rows."""
    plan = steps.StepPlan.quick(
        "cpu", variants=["resnet50[batch_norm]"], providers=["native"], repetitions=1
    )
    (job,) = steps.jobs(plan)
    log = run([job], "cpu", Log.resume(None, {}))
    assert [key(row) for row in log.rows] == [key(row) for row in job.rows]
    assert log.missing(job.rows) == []
    assert log.rows[0]["images_per_s"] > 0
    assert {*log.rows[0]} == {*FIELDS}
