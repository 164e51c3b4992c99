"""What several ranks answer together is what one answers, to the last bit, for every kind of request."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_three_ranks_answer_as_one_and_each_does_its_share(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    subprocess.run(
        [*command, str(ROOT / "tests/evaluation/dealt_worker.py"), str(tmp_path / "done.json")],
        env=environment, check=True, timeout=300,
    )  # fmt: skip
    done = json.loads((tmp_path / "done.json").read_text())
    assert sum(done["loglikelihood"]) == 28
    assert sum(done["generate_until"]) == 9
    assert sum(done["loglikelihood_rolling"]) > 18  # windows
    assert all(min(shares) > 0 for shares in done.values())
