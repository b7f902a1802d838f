"""How fast a network runs, and what an early exit saves: ``python -m benchmarks.bench_runtimes``.

Every runtime against the same network's plain forward in eager float32, as a textbook would write it; with all exits
against the backbone in one piece, which has none; up to each exit against the end, beside what the FLOPS promise.
Random weights, a simulated picture and sound; all measured in turn in one process.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, in_a_line, in_turn, matmul_rate
from crowdexit import zoo
from crowdexit.analysis.cost import cost_of
from crowdexit.inference.runtimes.arrays import RuntimeUnavailable
from crowdexit.inference.runtimes.base import ReadyChain
from crowdexit.inference.runtimes.pick import pick
from crowdexit.network import FINAL, MultiExitNetwork
from crowdexit.stages import Features, Stage, inputs

RUNTIMES = ("eager", "eager-bf16", "compile", "compile-bf16", "openvino", "openvino-bf16", "openvino-int8", "onnx")
PLAIN = "plain"


class InOnePiece(Stage):
    """All stages of a backbone as one: nothing can be asked in between."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.stages = torch.nn.ModuleList(stages)

    def forward(self, features: Features) -> Features:
        for stage in self.stages:
            features = stage(features)
        return features


def without_exits(network: MultiExitNetwork) -> MultiExitNetwork:
    """The backbone as it is run where nobody thinks of exits: one stage, one answer."""
    copied: Any = deepcopy(network)
    whole = InOnePiece(list(copied.stages))
    return MultiExitNetwork([whole], copied.final, {}, network.config).eval()


def last_of(chain: ReadyChain, features: Features, exits: Sequence[str]) -> None:
    """Walk to the last of these exits, asking each."""
    for _ in chain.stream(features, exits):
        pass


def plain(network: MultiExitNetwork, features: Features) -> None:
    """The forward of a textbook: float32, the weights as they were made, every layer after the other."""
    with torch.no_grad():
        network(features, [FINAL])


def measure(runtime: str, network: MultiExitNetwork, features: Features, rounds: int) -> dict[str, float]:
    """Seconds of the plain forward, the backbone in one piece, the chain to each exit, and to all of them."""
    chain = pick(runtime).ready(deepcopy(network))
    whole = pick(runtime).ready(without_exits(network))
    works: dict[str, Callable[[], object]] = {
        PLAIN: partial(plain, deepcopy(network), features),
        "one piece": partial(last_of, whole, features, [FINAL]),
        "all exits": partial(last_of, chain, features, chain.exit_names),
        **{name: partial(last_of, chain, features, [name]) for name in chain.exit_names},
    }
    return in_turn(works, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet")
    parser.add_argument("--size", default="1024x576")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="with commas between")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    exits = tuple(zoo.ExitSpec(place, place, "slvit") for place in ("V1", "AV1", "AV2"))
    spec = zoo.Spec(args.model, exits=exits, changes={"size": (width, height)})
    torch.manual_seed(0)
    network = zoo.build(spec).eval()
    features = inputs(torch.randn(1, 3, height, width), torch.randn(1, 1, 96, 64))
    costs = cost_of(spec, args.model)
    machine = describe()
    rates = {name: matmul_rate(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    print(f"{args.model} at {args.size}, {costs.backbone_flops / 1e9:.0f} GFLOP; {in_a_line(machine)}")
    print(", ".join(f"a {name} matrix product runs at {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    print(f"{'runtime':14} {'ms':>8} {'plain ÷':>8} {'of the rate':>12} {'exits cost':>11}   speedup ÷ that of FLOPS")
    results = {}
    for runtime in args.runtimes.split(","):
        try:
            seconds = measure(runtime, network, features, args.rounds)
        except RuntimeUnavailable as error:
            print(f"{runtime:14} {error}")
            continue
        rate = rates["bf16" if runtime.endswith(("bf16", "int8")) else "fp32"]
        speedups = {e.exit: {"measured": seconds[FINAL] / seconds[e.exit], "of_flops": e.speedup} for e in costs.exits}
        results[runtime] = {
            "seconds": seconds,
            "faster_than_plain": seconds[PLAIN] / seconds[FINAL],
            "share_of_matrix_rate": costs.backbone_flops / seconds[FINAL] / rate,
            "exits_cost": seconds["all exits"] / seconds["one piece"],
            "speedups": speedups,
        }
        kept = "  ".join(f"{name} {v['measured'] / v['of_flops']:.2f}" for name, v in speedups.items())
        told = results[runtime]
        print(
            f"{runtime:14} {1e3 * seconds[FINAL]:8.1f} {told['faster_than_plain']:7.2f}× "
            f"{told['share_of_matrix_rate']:11.0%} {told['exits_cost']:10.3f}×   {kept}"
        )
    if args.json is not None:
        made = {"machine": machine, "model": args.model, "size": args.size, "rates": rates, "runtimes": results}
        part = args.json.with_name(args.json.name + ".part")
        part.write_text(json.dumps(made, indent=1), "utf-8")
        part.replace(args.json)


if __name__ == "__main__":
    main()
