"""Two runs side by side: what is a regression, what is noise, and the exit code that says it."""

from __future__ import annotations

import copy
import json

import pytest
from fusednorm.bench import __main__ as command
from fusednorm.bench import compare
from fusednorm.bench.results import FIELDS, load

HEADER = {"device": "a card", "l2_bytes": 1, "threads": 4, "torch": "2.13", "copy_gb_per_s": 100.0}


def row(provider="cuda", ms=1.0, spread=0.02, **changes):
    half = ms * spread / 2
    identity = {
        "kind": "kernel",
        "op": "batch_norm",
        "provider": provider,
        "direction": "forward",
        "shape": [2, 8, 4, 4],
        "dtype": "float32",
        "layout": "nchw",
        "act": None,
        "residual": False,
        "graph": True,
        "cold": True,
        "run": 0,
    }
    times = {"ms_p10": ms - half, "ms_median": ms, "ms_p90": ms + half}
    return dict.fromkeys(FIELDS) | identity | times | changes


def lost(**changes):
    return row(ms_p10=None, ms_median=None, ms_p90=None, error="out of memory", **changes)


def verdicts(a, b, **options):
    found = compare.changes((HEADER, a), (options.pop("header", HEADER), b), **options)
    return [(change.row["provider"], change.verdict, change.regressed) for change in found]


def test_slower_beyond_noise_is_a_regression_of_ours():
    assert verdicts([row()], [row(ms=1.2)]) == [("cuda", "slower", True)]
    assert verdicts([row()], [row(ms=0.8)]) == [("cuda", "faster", False)]
    assert verdicts([row()], [row(ms=1.04)]) == [("cuda", "same", False)]
    # What is not ours is shown and flags nothing.
    assert verdicts([row("compile")], [row("compile", ms=2.0)]) == [("compile", "slower", False)]


def test_spread_is_noise():
    calm, wild = row(ms=1.2, spread=0.02), row(ms=1.2, spread=0.6)
    assert verdicts([row()], [calm])[0][1] == "slower"
    assert verdicts([row()], [wild])[0][1] == "same"
    assert verdicts([row(spread=0.6)], [calm])[0][1] == "same"


def test_a_machine_that_is_slower_as_a_whole_is_no_regression():
    """Held to the peer of the same run; without one, to the bandwidth of copy_."""
    a, b = [row(), row("cudnn")], [row(ms=2.0), row("cudnn", ms=2.0)]
    assert verdicts(a, b)[0][1] == "same"
    assert verdicts(a, b, by="none")[0][1] == "slower"
    slow = HEADER | {"copy_gb_per_s": 50.0}
    assert verdicts(a[:1], b[:1], header=slow) == [("cuda", "same", False)]
    assert verdicts(a, b, by="copy", header=slow)[0][1] == "same"
    # And one that is faster as a whole hides none.
    assert verdicts(a, [row(), row("cudnn", ms=0.5)])[0][1:] == ("slower", True)
    assert verdicts(a[:1], [row()], header=HEADER | {"copy_gb_per_s": 200.0})[0][1] == "slower"
    # The peer's own spread counts.
    assert verdicts(a, [row(), row("cudnn", ms=0.8, spread=0.8)])[0][1] == "same"


def test_peers_are_of_the_same_case_and_sitting():
    a = [row(), row("cudnn"), row("cudnn", ms=9.0, cold=False)]
    assert verdicts(a, [row(ms=1.5), row("cudnn"), row("cudnn", ms=13.5, cold=False)])[0] == (
        "cuda",
        "slower",
        True,
    )
    # native in one run and cudnn in the other are no common measure.
    found = compare.changes((HEADER, [row(), row("native")]), (HEADER, [row(), row("cudnn")]))
    assert found[0].by == "copy"
    # A sitting has its own bandwidth.
    header = HEADER | {"runs": [{"copy_gb_per_s": 100.0}, {"copy_gb_per_s": 50.0}]}
    assert verdicts([row()], [row(ms=2.0, run=1)], header=header)[0][1] == "same"


def test_a_row_that_lost_its_time_is_a_regression():
    assert verdicts([row()], [lost()]) == [("cuda", "lost", True)]
    assert verdicts([lost()], [row()]) == [("cuda", "gained", False)]
    assert verdicts([lost()], [lost()]) == []


def written(path, rows, **header):
    path.write_text(json.dumps({"header": HEADER | header, "rows": rows}))
    return str(path)


def test_exit_codes(tmp_path, capsys):
    a = written(tmp_path / "a.json", [row(), row("triton")])
    same = written(tmp_path / "same.json", [row(), row("triton")], torch="2.14")
    worse = written(tmp_path / "worse.json", [row(ms=1.5), row("triton")])
    assert command.main(["compare", a, same]) == 0
    told = capsys.readouterr().out
    assert "torch 2.13 -> 2.14" in told
    assert "2 rows in both: 2 same; 0 regressions of ours" in told
    assert command.main(["compare", a, worse]) == 1
    told = capsys.readouterr().out
    assert "REGRESSION slower  x1.50 (noise 1 % held to copy) 1 -> 1.5 ms  batch_norm cuda" in told
    assert "1 regressions of ours" in told
    assert "triton" not in told
    assert command.main(["compare", a, worse, "--threshold", "0.6"]) == 0
    assert command.main(["compare", a, worse, "--all", "--threshold", "0.6"]) == 0
    assert "triton" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("header", "named"),
    [({"device": "another"}, "device"), ({"l2_bytes": None}, "l2_bytes")],
)
def test_other_machines_are_not_compared(tmp_path, capsys, header, named):
    a, b = written(tmp_path / "a.json", [row()]), written(tmp_path / "b.json", [row()], **header)
    assert command.main(["compare", a, b]) == 2
    told = capsys.readouterr().err
    assert "different machines" in told
    assert named in told
    assert told.count("\n") == 1


def test_threads_are_half_of_a_cpu():
    cpu = {**HEADER, "l2_bytes": None}
    assert compare.incomparable(cpu, cpu | {"threads": 2}) is not None
    assert compare.incomparable(HEADER, HEADER | {"threads": 2}) is None


def test_bad_input(tmp_path, capsys):
    a = written(tmp_path / "a.json", [row()])
    other = written(tmp_path / "other.json", [row(dtype="float16")])
    torn = tmp_path / "torn.json"
    torn.write_text(json.dumps({"header": HEADER, "rows": [row()]})[:-20])
    for b in (other, str(torn), str(tmp_path / "absent.json")):
        assert command.main(["compare", a, b]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_old_files_can_be_compared(tmp_path):
    """Of before a row had a kind, sittings and an error."""
    old = copy.deepcopy(row())
    for name in ("kind", "run", "error", "peak_bytes", "images_per_s", "repetitions"):
        del old[name]
    path = written(tmp_path / "old.json", [old])
    header, rows = load(tmp_path / "old.json")
    assert (rows[0]["kind"], rows[0]["error"]) == ("kernel", None)
    assert command.main(["compare", path, written(tmp_path / "new.json", [row()])]) == 0
