"""How fast a network runs, and what an early exit saves: ``python -m benchmarks.bench_runtimes``.

Every runtime against the same network's plain forward in eager float32 on the same device, as a textbook would write
it; with all exits against the backbone in one piece, which has none; up to each exit against the end, beside what the
FLOPS promise; and the final exit's rate of operations against plain matrix products. Random weights, a simulated
image and audio; all measured in turn in one process, ratios round by round. How far an answer is from the plain one
is reported only to show that the same thing was computed: what that means for counts, ``bench_agreement`` tells.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import Multiplier, cache_of_its_own, describe, finish, in_a_line, in_turn, keep
from crowdexit.evaluation.cost import CostTable, cost_of
from crowdexit.models import zoo
from crowdexit.models.network import FINAL, MultiExitNetwork
from crowdexit.models.stages import Features, Stage, inputs
from crowdexit.runtimes.arrays import RuntimeUnavailable
from crowdexit.runtimes.base import ReadyChain
from crowdexit.runtimes.openvino import multiplies_bf16
from crowdexit.runtimes.selection import select_runtime

RUNTIMES = (
    *("eager", "eager-bf16", "winograd", "compile", "compile-bf16"),
    *("openvino", "openvino-bf16", "openvino-int8", "onnx"),
)
ON_GPU = ("cuda", "cuda-bf16", "cuda-half")
LEAST_S = 60.0  # of a fast runtime's rounds
PLAIN, ONE_PIECE, ALL, MATRICES = "plain", "one piece", "all exits", "matrix products"


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


def run_exit(chain: ReadyChain, features: Features, exits: Sequence[str]) -> None:
    """Run everything up to the last of these exits, and each of them."""
    for _ in chain.stream(features, exits):
        pass


def plain(network: MultiExitNetwork, features: Features, device: str) -> Tensor:
    """The forward of a textbook, to the density map: float32, the weights as they were made, layer after layer."""
    with torch.no_grad():
        density = network(features, [FINAL])[FINAL].density
    finish(device)
    return density


def moved(features: Features, device: str) -> Features:
    """The same image and audio there."""
    return Features(*(getattr(features, name).to(device) for name in ("visual", "log_mel", "has_audio", "valid_mask")))


def rate_type(runtime: str) -> torch.dtype:
    """What a runtime multiplies."""
    ending = runtime.rpartition("-")[2]
    return {"bf16": torch.bfloat16, "half": torch.float16, "int8": torch.int8}.get(ending, torch.float32)


def measure(
    runtime: str, network: MultiExitNetwork, features: Features, costs: CostTable, rounds: int
) -> dict[str, Any]:
    """One runtime's figures; see above."""
    device = "cuda" if runtime.startswith("cuda") else "cpu"
    there = moved(features, device)
    textbook = deepcopy(network).to(device)
    chain = select_runtime(runtime).ready(deepcopy(network))
    whole = select_runtime(runtime).ready(without_exits(network))
    product = Multiplier(rate_type(runtime), device)
    works: dict[str, Callable[[], object]] = {
        PLAIN: partial(plain, textbook, there, device),
        ONE_PIECE: partial(run_exit, whole, features, [FINAL]),
        ALL: partial(run_exit, chain, features, chain.exit_names),
        MATRICES: product,
        **{name: partial(run_exit, chain, features, [name]) for name in chain.exit_names},
    }
    times = in_turn(works, rounds, LEAST_S if rounds > 1 else 0.0)
    expected = plain(textbook, there, device).cpu()
    given = dict(chain.stream(features, [FINAL]))[FINAL].density
    return {
        "seconds": {name: times.median(name) for name in works},
        "faster_than_plain": times.ratio(PLAIN, FINAL),
        "share_of_matrix_rate": costs.backbone_flops / product.flop * times.ratio(MATRICES, FINAL),
        "exits_cost": times.ratio(ALL, ONE_PIECE),
        "speedups": {e.exit: {"measured": times.ratio(FINAL, e.exit), "of_flops": e.speedup} for e in costs.exits},
        "off_plain": float((given - expected).norm() / expected.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet")
    parser.add_argument("--size", default="1024x576")
    parser.add_argument("--rounds", type=int, default=5, help="at least")
    parser.add_argument(
        "--runtimes",
        help="with commas between; default: all; of a GPU and in bfloat16 where there is one",
    )
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
    if args.runtimes:
        runtimes = args.runtimes.split(",")
    else:  # where a processor has no bfloat16, PyTorch takes minutes for such a forward
        here = (name for name in RUNTIMES if multiplies_bf16() or not name.endswith("bf16"))
        runtimes = [*here, *(ON_GPU if machine["gpu"] else ())]
    print(f"{args.model} at {args.size}, {costs.backbone_flops / 1e9:.0f} GFLOP; {in_a_line(machine)}")
    print(
        f"{'runtime':14} {'ms':>8} {'plain ÷':>8} {'of matrix rate':>15} {'exits cost':>11} {'off plain':>10}"
        "   speedup ÷ that of FLOPS"
    )
    results = {}
    with cache_of_its_own():
        for runtime in runtimes:
            try:
                entry = results[runtime] = measure(runtime, network, features, costs, args.rounds)
            except RuntimeUnavailable as error:
                print(f"{runtime:14} {error}")
                continue
            speedups = "  ".join(f"{name} {v['measured'] / v['of_flops']:.2f}" for name, v in entry["speedups"].items())
            print(
                f"{runtime:14} {1e3 * entry['seconds'][FINAL]:8.1f} {entry['faster_than_plain']:7.2f}× "
                f"{entry['share_of_matrix_rate']:14.0%} {entry['exits_cost']:10.3f}× {entry['off_plain']:10.1e}   "
                f"{speedups}",
                flush=True,
            )
    keep({"machine": machine, "model": args.model, "size": args.size, "runtimes": results}, args.json)


if __name__ == "__main__":
    main()
