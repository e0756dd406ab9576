"""Whether a run that is killed at any moment ends as one that was left alone.

    python benchmarks/resume.py

A small model of pictures, clips, sounds and text is trained by the command line, packed, in accumulated steps, with dropout and
augmentation, and writes checkpoints after each step. It is killed (SIGKILL) at a random moment of its CPU time, every third time
at one inside a save; then the same command with --ckpt_path last (without it, where nothing is there yet) goes on with it to its
end. `identical_share` is the share of runs whose weights, optimizer, scheduler, random generators, place in the data and rows of
each batch are those of a run that was not killed, by SHA-256. `orphans` counts files that such a run has not: in the run folder,
in that for temporary files, and in the cache.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch makes its threads
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROW = "{:>6}  {:<13} {:>10} {:>8}  {}"


def kill(numbers: range, seed: int) -> list[tuple[bool, int]]:
    """Kills runs, and prints a row of each: whether it ended as it should, and how many files it left."""
    from tests.faults.killing import kill_runs

    ended = []
    with tempfile.TemporaryDirectory() as folder:
        for run in kill_runs(Path(folder), numbers, seed):
            where = "inside a save" if run.inside_save else "anywhere"
            why = " ".join([*run.orphans, *run.problem.splitlines()[-1:]])
            print(ROW.format(run.number, where, "yes" if run.is_identical else "no", len(run.orphans), why), flush=True)
            ended.append((run.is_identical, len(run.orphans)))
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    options = parser.parse_args()
    from tests.faults.killing import import_all

    import_all()
    print(ROW.format("kill", "killed", "identical", "orphans", "why not"), flush=True)
    shares = [range(job, options.kills, options.jobs) for job in range(options.jobs)]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
        ended = [run for share in pool.map(kill, shares, [options.seed] * options.jobs) for run in share]
    identical = sum(is_identical for is_identical, _ in ended) / len(ended)
    print(json.dumps({"kills": len(ended), "identical_share": identical, "orphans": sum(orphans for _, orphans in ended)}))


if __name__ == "__main__":
    main()
