"""A step on a busy machine: the table, and the whole of it in a few steps."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from scripts import bench_busy


def test_the_table_has_a_row_for_each_company_and_each_way_to_wait():
    rows = [{"neighbours": count, "spins": spins, "seconds": [0.1, 0.3, 0.2]} for count in (0, 2) for spins in bench_busy.SPINS]
    told = bench_busy.table({"rows": rows}).splitlines()[2:]
    assert told[0] == "| alone | not set | 0.20 s | 0.10 to 0.30 s |" and told[3].startswith("| beside 2 other trainings | 1000 |")


@pytest.mark.slow
def test_each_is_measured_and_no_training_is_left_behind(tmp_path: Path):
    done = CliRunner().invoke(bench_busy.bench, ["--steps", "2", "--out", str(tmp_path / "busy.json")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "busy.json").read_text())["rows"]
    assert len(rows) == 4 and all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    assert not [file for file in Path("/proc").glob("[0-9]*/cmdline") if b"bench_busy import time_steps; time_steps(1000000)" in file.read_bytes()]
