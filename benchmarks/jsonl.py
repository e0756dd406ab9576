"""Random access to a JSON-lines file: index, re-open, memory, one row. Linux only, for the memory is read from /proc.

Run: python benchmarks/jsonl.py
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python benchmarks/jsonl.py` finds the packages

from datamodules.jsonl import JsonlFile

GOALS = {"index_cpu_seconds": 3.0, "reopen_seconds": 0.3, "bytes_per_row": 16.0, "random_row_us": 100.0}


def write_rows(path: Path, num_rows: int, rng: random.Random) -> None:
    """Writes rows of the usual shape: a picture, a question of 5 to 40 words and an answer."""
    words = [f"word{number}" for number in range(1000)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            question = "<image>" + " ".join(rng.choices(words, k=rng.randint(5, 40)))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": rng.choice(words)}]
            file.write(json.dumps({"messages": messages, "images": [f"{number:07d}.jpg"]}) + "\n")


def memory_bytes(index_name: str) -> int:
    """Memory of this process without the pages of files, but with those of the mapped index."""
    status = Path("/proc/self/status").read_text()
    kilobytes = int(status.split("RssAnon:")[1].split()[0])
    in_index = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            in_index = line.endswith(index_name)
        elif first == "Rss:" and in_index:
            kilobytes += int(rest[0])
    return 1024 * kilobytes


def measure(path: Path, num_rows: int, num_reads: int, rng: random.Random) -> dict[str, float]:
    """Builds the index, opens it again, reads random rows, and counts the memory after that.

    The pages of the data file itself are not counted: they are the kernel's cache, dropped when memory is short.
    """
    index_name = f"{path.name}.idx"
    memory_before = memory_bytes(index_name)
    start = time.process_time()
    JsonlFile(path)
    index_cpu_seconds = time.process_time() - start

    start = time.perf_counter()
    rows = JsonlFile(path)
    reopen_seconds = time.perf_counter() - start
    assert len(rows) == num_rows

    picks = [rng.randrange(num_rows) for _ in range(num_reads)]
    start = time.process_time()
    num_right = sum(rows[i]["images"] == [f"{i:07d}.jpg"] for i in picks)
    random_row_us = 1e6 * (time.process_time() - start) / num_reads
    assert num_right == num_reads
    return {
        "index_cpu_seconds": round(index_cpu_seconds, 3),
        "reopen_seconds": round(reopen_seconds, 5),
        "bytes_per_row": round((memory_bytes(index_name) - memory_before) / num_rows, 2),
        "random_row_us": round(random_row_us, 2),
    }


def main() -> None:
    """Prints the table, then the figures as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--reads", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, args.rows, rng)
        print(f"{args.rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB")
        figures = measure(path, args.rows, args.reads, rng)
    print(f"{'':20}{'measured':>12}{'goal':>10}")
    for name, value in figures.items():
        print(f"{name:20}{value:12}{GOALS[name]:10}")
    print(json.dumps({"rows": args.rows, **figures}))


if __name__ == "__main__":
    main()
