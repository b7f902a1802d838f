"""What a GPU makes of the default network: ``python -m benchmarks.bench_gpu --json gpu.json``.

In float32, bfloat16 and float16: how long one image takes to each exit, how many images a second come out of batches,
which share of the device's own rate of matrix products that is, and how far the counts are from float32's. Then what a
training step of the whole network takes. Everything with the shipped weights on one image, ten minutes at most on a
GPU; ``--device cpu --quick`` shows anywhere that it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_runtimes import rate_type, run_exit
from benchmarks.machine import Multiplier, describe, finish, in_a_line, in_turn, keep
from crowdexit.evaluation.cost import cost_of
from crowdexit.inference.models import open_model
from crowdexit.models import zoo
from crowdexit.models.network import FINAL, MultiExitNetwork
from crowdexit.models.stages import Features, inputs
from crowdexit.runtimes.arrays import RuntimeUnavailable
from crowdexit.runtimes.batch import make_batch
from crowdexit.runtimes.calibration import sample
from crowdexit.runtimes.openvino import multiplies_bf16
from crowdexit.training.losses import poisson_loss

RUNTIMES = {"cuda": ("cuda", "cuda-bf16", "cuda-half"), "cpu": ("eager", "eager-bf16")}
CROP = 384  # side in pixels of the crops of a training step


def repeated(features: Features, batch: int) -> Features:
    """One image as a batch of itself."""
    return features.select(torch.zeros(batch, dtype=torch.long))


def counting(name: str, runtime: str, features: Features, batches: list[int], rounds: int, matrix: int) -> Any:
    """Latency by exit, images a second by batch, share of the matrix rate, and the counts."""
    network, spec, picked = open_model(name, runtime)
    chain, costs = picked.ready(network), cost_of(spec, name)
    product = Multiplier(rate_type(runtime), "cuda" if runtime.startswith("cuda") else "cpu", side=matrix)
    counts = {exit: float(answer.value) for exit, answer in chain.stream(features)}
    works: dict[Any, Callable[[], object]] = {"matrices": product}
    works |= {exit: partial(run_exit, chain, features, [exit]) for exit in chain.exit_names}
    works |= {batch: partial(run_exit, chain, repeated(features, batch), [FINAL]) for batch in batches}
    times = in_turn(works, rounds)
    pixels = features.visual.shape[2] * features.visual.shape[3] / (network.config.size[0] * network.config.size[1])
    rates = {batch: batch / times.median(batch) for batch in batches}
    shares = {
        batch: pixels * costs.backbone_flops * batch / product.flop * times.ratio("matrices", batch)
        for batch in batches
    }
    return {
        "latency_ms": {exit: 1e3 * times.median(exit) for exit in chain.exit_names},
        "images_a_second": rates,
        "share_of_matrix_rate": shares,
        "matrix_tflops": product.flop / times.median("matrices") / 1e12,
        "counts": counts,
    }


def trainer(network: MultiExitNetwork, device: str, half: bool, batch: int, crop: int) -> Callable[[], None]:
    """A step of training: forward, the recipe's loss of every exit, backward, AdamW."""
    network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(network.parameters(), 1e-5)
    image = torch.randn(batch, 3, crop, crop, device=device).to(memory_format=torch.channels_last)
    heads: Tensor = (torch.rand(batch, 1, crop // 8, crop // 8, device=device) < 0.01).float()

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            answers = network(inputs(image))
        losses = [poisson_loss(a.density, heads) for a in answers.values() if a.density is not None]
        torch.stack(losses).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        finish(device)

    return step


def training(name: str, device: str, half: bool, batches: list[int], crop: int, rounds: int) -> dict[int, float]:
    """Seconds of a training step by batch; a batch that does not fit into memory ends it."""
    seconds = {}
    for batch in batches:
        network, _ = zoo.load(name)
        try:
            times = in_turn({"step": trainer(network, device, half, batch, crop)}, rounds)
        except torch.OutOfMemoryError:
            break
        seconds[batch] = times.median("step")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet-lite")
    parser.add_argument("--device", choices=list(RUNTIMES), default="cuda")
    parser.add_argument("--size", default="1024x768")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    width, height = (128, 96) if args.quick else map(int, args.size.split("x"))
    batches, rounds = ([1, 2], 2) if args.quick else (args.batches, args.rounds)
    crop, matrix = (64, 256) if args.quick else (CROP, 8192 if args.device == "cuda" else 2048)
    image = cv2.resize(sample()[0], (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)
    machine = describe()
    print(f"{args.model} at {width}×{height}; {in_a_line(machine)}")
    figures: dict[str, Any] = {"machine": machine, "model": args.model, "size": [width, height]}
    features = make_batch(image, None, zoo.load(args.model)[0].config)
    plain: dict[str, float] = {}
    for runtime in RUNTIMES[args.device]:
        if args.device == "cpu" and runtime.endswith("bf16") and not multiplies_bf16():
            print(f"{runtime}: this processor has no bfloat16")
            continue
        try:
            told = counting(args.model, runtime, features, batches, rounds, matrix)
        except RuntimeUnavailable as error:
            raise SystemExit(f"{runtime}: {error}") from None
        plain = plain or told["counts"]
        told["off_float32"] = {exit: abs(n - plain[exit]) / max(plain[exit], 1) for exit, n in told["counts"].items()}
        figures[runtime] = told
        print(f"{runtime}: matrix products {told['matrix_tflops']:.2f} TFLOP a second")
        for exit, ms in told["latency_ms"].items():
            print(f"  {exit:6} {ms:8.2f} ms   counts {told['off_float32'][exit]:.2%} off float32")
        for batch, rate in told["images_a_second"].items():
            share = told["share_of_matrix_rate"][batch]
            print(f"  batch {batch:3} {rate:9.1f} images a second, {share:.1%} of the matrix rate", flush=True)
    half = args.device == "cuda" or multiplies_bf16()
    steps = training(args.model, args.device, half, batches, crop, rounds)
    figures["training_step"] = {"bfloat16": half, "crop": crop, "seconds": steps}
    for batch, seconds in steps.items():
        print(f"training step, {batch:3} crops of {crop}×{crop}: {1e3 * seconds:.1f} ms")
    keep(figures, args.json)


if __name__ == "__main__":
    main()
