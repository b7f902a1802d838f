"""How well deadlines are kept: ``python -m benchmarks.bench_deadlines``.

Requests one after the other, each with a random deadline between half of what the first exit takes at most (its 99th
percentile) and a little more than the whole network takes, or twice the first; on an otherwise idle machine, and with
one core kept busy by another process. Told are the first exit's 99th percentile, which share of the requests that left
it so much time had no answer, and how long after the deadline the call returned.

Between two requests, hurried or not, it pauses for half of what the network takes. Then, a quarter as often, *back to
back*, without a pause, so that a stage called off in the one may still run when the next comes; there every deadline
leaves time for the first exit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import crowdexit
from benchmarks.machine import describe, in_a_line, keep
from crowdexit.data.image import read_pixels
from crowdexit.inference.anytime import DeadlineMissed
from crowdexit.inference.counter import CrowdCounter, load
from crowdexit.inference.policies import policy_named

STREET = Path(crowdexit.__file__).parent / "samples" / "street.jpg"
WARM_UP, FOREVER_MS = 10, 1e9
# What is measured: how many cores are busy with something else, whether a request comes right after the other.
STATES = {
    "idle": (0, False),
    "one core busy": (1, False),
    "idle, back to back": (0, True),
    "one core busy, back to back": (1, True),
}


@contextmanager
def busy(cores: int) -> Iterator[None]:
    """Keep so many cores busy with something else."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(
    counter: CrowdCounter, image: Any, requests: int, alone: int, back_to_back: bool, policy_name: str
) -> dict[str, Any]:
    """Requests that nobody hurries, then those with a deadline; times in milliseconds."""
    policy = policy_named(policy_name)
    _ = counter.profile  # measured here, not in the first request
    warm_up = [counter.count(image, deadline_ms=FOREVER_MS).exits[-1].latency_ms for _ in range(WARM_UP)]
    pause_s = 0 if back_to_back else float(np.median(warm_up)) / 2000
    unhurried = []
    for _ in range(alone):
        time.sleep(pause_s)  # a machine that has rested is slower at first
        unhurried.append(counter.count(image, deadline_ms=FOREVER_MS).exits)
    first = float(np.quantile([exits[0].latency_ms for exits in unhurried], 0.99))
    whole = float(np.median([exits[-1].latency_ms for exits in unhurried]))
    least = first if back_to_back else first / 2
    deadlines = np.random.default_rng(0).uniform(least, max(1.2 * whole, 2 * first), requests)
    late, unanswered, fitting, chosen = [], 0, 0, Counter[str]()
    for deadline in deadlines.tolist():
        time.sleep(pause_s)
        begun = time.perf_counter()
        try:
            chosen[counter.count(image, deadline_ms=deadline, late="fail", policy=policy).chosen.exit] += 1
            answered = True
        except DeadlineMissed:
            answered = False
        late.append(1000 * (time.perf_counter() - begun) - deadline)
        fitting += deadline >= first
        unanswered += deadline >= first and not answered
    after = np.maximum(late, 0)
    return {
        "first_exit_p99_ms": first,
        "whole_p50_ms": whole,
        "requests": requests,
        "first_exit_fits": fitting,
        "unanswered_though_it_fits": unanswered / max(1, fitting),
        "late_p50_ms": float(np.median(after)),
        "late_p99_ms": float(np.quantile(after, 0.99)),
        "late_max_ms": float(after.max()),
        "chosen": dict(chosen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet-s")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--policy", default="anytime", choices=("anytime", "fits"))
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=100, help="counts without a deadline, for the first exit's p99")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures here")
    args = parser.parse_args()
    counter, image = load(args.model, runtime=args.runtime), read_pixels(STREET)
    report: dict[str, Any] = {
        "machine": describe(),
        "model": counter.model,
        "runtime": counter.chain.runtime,
        "policy": args.policy,
    }
    print(in_a_line(report["machine"]))
    print(f"{counter.model}, {counter.chain.runtime}, {args.policy}")
    for name, (cores, back_to_back) in STATES.items():
        with busy(cores):
            requests = -(-args.requests // 4) if back_to_back else args.requests
            r = measure(counter, image, requests, args.alone, back_to_back, args.policy)
        report[name] = r
        print(
            f"\n{name}: first exit p99 {r['first_exit_p99_ms']:.1f} ms, "
            f"{r['first_exit_p99_ms'] / r['whole_p50_ms']:.2f} of the whole's median {r['whole_p50_ms']:.1f} ms"
        )
        print(
            f"  {r['requests']} random deadlines, {r['first_exit_fits']} with time for the first exit; "
            f"of these without an answer {r['unanswered_though_it_fits']:.2%}"
        )
        print(
            f"  returned after the deadline by {r['late_p50_ms']:.2f} ms (median), "
            f"{r['late_p99_ms']:.2f} (p99), {r['late_max_ms']:.2f} (most)"
        )
        print("  chosen: " + ", ".join(f"{exit} {n}" for exit, n in sorted(r["chosen"].items())), flush=True)
    keep(report, args.json)


if __name__ == "__main__":
    main()
