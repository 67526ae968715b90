"""The benchmark's results files: whole at any moment, gone on with, set aside, filed."""

from __future__ import annotations

import json
import time

import pytest
import torch
from fusednorm.bench import machine, results, timing
from fusednorm.bench.results import FIELDS, IDENTITY, Job, Log, history, key, load
from fusednorm.bench.run import DeviceLost, jobs, run

from bench_cases import rows_of, small_plan, wrong


@pytest.fixture(autouse=True)
def as_users_run(poisoned, monkeypatch):
    """Filling every fresh tensor would be timed too; the copy takes seconds in every process."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    monkeypatch.setattr(timing, "copy_gb_per_s", lambda device: 10.0)


def test_rows_have_the_schema_and_the_file_is_whole_after_each_group(tmp_path):
    out = tmp_path / "deep" / "bench.json"
    seen = []

    def tell(done, of, title, left):
        seen.append((done, of, len(json.loads(out.read_text())["rows"])))

    log = Log.resume(out, machine.header("cpu"))
    run(jobs(small_plan(layouts=("nchw", "nhwc"))), "cpu", log, progress=tell)
    assert seen == [(0, 2, 0), (1, 2, 1), (2, 2, 2)]
    header, rows = load(out)
    assert rows == log.rows
    assert [tuple(row) for row in rows] == [FIELDS] * 2
    assert not rows[0]["graph"]
    assert rows[0]["shape"] == [2, 32, 6, 4]
    assert rows[0]["gb_per_s"] == pytest.approx(rows[0]["min_bytes"] / rows[0]["ms_median"] / 1e6)
    assert rows[0]["pct_copy"] == pytest.approx(10 * rows[0]["gb_per_s"])
    needed = (
        "device driver cuda torch triton cudnn clocks commit copy_gb_per_s threads cpus sources"
    )
    assert header.keys() >= {*needed.split(), "runs", "started"}


def test_budget_stops_before_the_next_group(tmp_path):
    said = []
    log = Log.resume(tmp_path / "bench.json", {})
    plan = small_plan(layouts=("nchw", "nhwc"))
    run(jobs(plan), "cpu", log, budget=0.0, say=said.append)
    assert load(tmp_path / "bench.json")[1] == []
    assert said == ["2 of 2 groups left out, to keep within 0 s"]
    assert load(tmp_path / "bench.json")[0]["left_out"] == 2


def test_a_group_too_long_for_what_is_left_is_not_begun():
    begun = []

    def job(name, latest):
        row = dict.fromkeys(IDENTITY) | {"kind": "kernel", "op": name}

        def measure(wanted):
            begun.append(name)
            time.sleep(0.05)
            return [dict.fromkeys(FIELDS) | row for row in wanted]

        return Job(name, [row], measure, latest)

    said = []
    found = [job("first", 1e9), job("long", 0.01), job("last", 1e9)]
    run(found, "cpu", Log.resume(None, {}), say=said.append)
    assert begun == ["first", "last"]
    assert said == ["1 of 3 groups left out, to keep within inf s"]


def job_of(providers, measure):
    rows = [
        dict.fromkeys(IDENTITY) | {"kind": "kernel", "op": "o", "provider": p} for p in providers
    ]
    return Job("group", rows, measure)


def with_errors(rows, **errors):
    return [dict.fromkeys(FIELDS) | row | {"error": errors.get(row["provider"])} for row in rows]


def test_a_job_that_raises_is_rows_with_its_error():
    def measure(wanted):
        raise RuntimeError("out of luck\nand a long trace")

    log = Log.resume(None, {})
    run([job_of("ab", measure), job_of("c", with_errors)], "cpu", log)
    told = "RuntimeError: out of luck"
    assert [(r["provider"], r["error"]) for r in log.rows] == [
        ("a", told),
        ("b", told),
        ("c", None),
    ]


def test_who_breaks_the_device_is_a_row_and_the_others_are_measured_later(tmp_path, monkeypatch):
    """A broken CUDA context fails everything that comes after, none of whom is to blame."""
    broken = []

    def synchronize():
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def measure(wanted):
        broken.append(1)
        return with_errors(wanted, a=None, b="AcceleratorError: CUDA error: x", c="CUDA error: x")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    log = Log.resume(tmp_path / "b.json", {})
    found = [job_of("abc", measure), job_of("d", with_errors)]
    with pytest.raises(DeviceLost, match=r"illegal memory access .* \(in group\)"):
        run(found, "cuda", log)
    rows = load(tmp_path / "b.json")[1]
    assert [row["provider"] for row in rows] == ["a", "b"]

    broken.clear()
    found[0] = job_of("abc", with_errors)
    log = Log.resume(tmp_path / "b.json", {})
    run(found, "cuda", log)
    assert [(row["provider"], row["error"]) for row in log.rows[2:]] == [("c", None), ("d", None)]


def header(**changes):
    return {"device": "a", "threads": 1, "commit": "c", "sources": "s"} | changes


def test_a_second_command_measures_what_is_missing(tmp_path):
    out, said = tmp_path / "b.json", []
    first = small_plan()
    for _ in range(2):
        log = Log.resume(out, header(), said.append)
        run(jobs(first), "cpu", log, say=said.append)
    assert said == ["going on: 1 rows are there, 0 of 1 groups left"]
    assert len(load(out)[0]["runs"]) == 1
    before = load(out)[1]
    log = Log.resume(out, header(started="now"), said.append)
    run(jobs(small_plan(directions=("forward", "both"))), "cpu", log)
    found, rows = load(out)
    assert rows[:1] == before
    assert [(row["direction"], row["run"]) for row in rows] == [("both", 0), ("forward", 1)]
    assert len(found["runs"]) == 2
    assert not list(tmp_path.glob("*before*"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"commit": "d"}, 'commit was "c" and is "d"'),
        ({"sources": "t"}, "sources"),
        ({"device": "b"}, "device"),
        ({"threads": 2}, "threads"),
        ({"torch": "9"}, "torch was null"),
    ],
)
def test_rows_of_something_else_are_set_aside(tmp_path, changes, named):
    out, said = tmp_path / "b.json", []
    run(jobs(small_plan()), "cpu", Log.resume(out, header()))
    kept = out.read_bytes()
    log = Log.resume(out, header(**changes), said.append)
    assert log.rows == []
    assert (tmp_path / "b.before.json").read_bytes() == kept
    (line,) = said
    assert named in line
    assert "b.before.json" in line


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"an hour of somebody's GPU",
        b'{"header": {}, "rows": [{"op": "batch_norm", "prov',
        b'{"header": {}}',
        b'{"header": [], "rows": []}',
        b'{"header": {}, "rows": [{"op": "batch_norm"}]}',
        b'{"header": {}, "rows": [7]}',
        b"[1, 2]",
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_set_aside_and_never_written_over(tmp_path, content):
    out, said = tmp_path / "b.json", []
    with pytest.raises(ValueError, match="is not a whole results file") as raised:
        out.write_bytes(content)
        load(out)
    assert "\n" not in str(raised.value)
    for count in ("", "-2", "-3"):
        out.write_bytes(content)
        Log.resume(out, header(), said.append).begin("now", 1.0)
        assert (tmp_path / f"b.before{count}.json").read_bytes() == content
        assert load(out)[1] == []
    assert len(said) == 3
    assert all("\n" not in line and "b.before" in line for line in said)


def test_infinity_is_no_json(tmp_path):
    log = Log.resume(tmp_path / "b.json", header())
    log.begin("now", 1.0)
    row = dict.fromkeys(FIELDS) | {"kind": "kernel", "shape": [1], "max_err": float("inf")}
    log.add([row | {"op": "o", "provider": "p", "direction": "d", "ref_err": float("nan")}])
    assert load(tmp_path / "b.json")[1][0]["max_err"] is None
    assert "Infinity" not in (tmp_path / "b.json").read_text()


def test_a_step_is_the_same_row_captured_or_not():
    row = dict.fromkeys(IDENTITY) | {"kind": "step", "graph": True}
    assert key(row) == key(row | {"graph": False})
    assert key(row | {"kind": "kernel"}) != key(row | {"kind": "kernel", "graph": False})
    assert all(
        key(row) != key(row | {name: "x"}) for name in IDENTITY if name not in ("graph", "kind")
    )


def test_results_are_filed_with_their_history(tmp_path):
    log = Log.resume(None, header(l2_bytes=1))
    log.begin("2026-01-02T00:00:00", 1.0)
    saved = [results.save(log, tmp_path, "a-card") for _ in range(2)]
    assert [path.name for path in saved] == ["2026-01-02-c.json", "2026-01-02-c-2.json"]
    later = Log.resume(None, header(commit=None))
    later.begin("2026-01-03T00:00:00", 1.0)
    assert results.save(later, tmp_path, "a-card").name == "2026-01-03-sources-s.json"
    newest = tmp_path / "a-card" / "bench.json"
    assert load(newest)[0]["started"] == "2026-01-03T00:00:00"
    found = history(newest.parent)
    assert [head["started"][8:10] for head, _ in found] == ["02", "02", "03"]


def test_an_error_is_a_row_that_is_there():
    (row,) = rows_of(small_plan(providers=[wrong("raises")]))
    assert Log(None, {}, [row]).missing([row]) == []
