"""Speed and memory of the inference form against the plain network: `python -m benchmarks.engine --help`.

The baseline is the plain module in float32, eager, one image at a time, as the published test scripts run it. Each
variant has a process of its own, the inference form with memory kept as workers keep it. Variants take turns round by
round, and a ratio is the median over rounds of two neighbouring times: a busy machine slows both. Peak memory is
measured in another process each, beyond what it holds before the image; on a CPU that needs Linux. Errors are the
largest differences from the plain network in float64, on a photograph in [0, 1]. Where the hardware has no bfloat16
and would imitate it, those variants are left out: an image of 1 megapixel took over a quarter of an hour.
"""

import argparse
import copy
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor, nn

from benchmarks.process_memory import peak_bytes
from benchmarks.record import add_csv_option, spread, write_csv
from models import graphs
from models.dfpir import DFPIR, DFPIRConfig, PerturbationBlock
from models.graphs import Forward, Recorded
from models.inference import InferenceDFPIR
from models.memory import keep_freed_memory
from models.padding import padded_size
from models.precision import fastest_dtype
from models.prompts import PromptBank, orthogonal_bank
from models.registry import resolve
from models.transfer import upload

M = TypeVar("M", bound=nn.Module)
Run = Callable[[Tensor], Tensor]
BASELINE = "plain float32"
VARIANTS = {
    "cpu": (BASELINE, "plain float32, memory kept", "inference float32", "inference bfloat16"),
    "cuda": (
        BASELINE,
        "plain float32, TF32",
        "plain bfloat16, compiled",
        "inference float32",
        "inference bfloat16",
        "inference bfloat16, recorded",
    ),
}
"""By the device's type; float32 is without TF32 where that is not said, and bfloat16 of the plain form is autocast."""
PROMPT = 1
RUNS_BEFORE = {"cpu": 1, "cuda": graphs.RUNS_BEFORE + 3}
"""Until everything is compiled and recorded."""


@dataclass(frozen=True)
class Shape:
    """Batch, height and width of an input."""

    batch: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From `481x321` or `8x256x256`."""
        sizes = [int(side) for side in text.split("x")]
        return cls(*([1, *sizes] if len(sizes) == 2 else sizes))

    def __str__(self) -> str:
        return f"{self.batch}x{self.height}x{self.width}"

    @property
    def megapixels(self) -> float:
        """Of the whole batch."""
        return self.batch * self.height * self.width / 1e6


def network_and_bank(name: str) -> tuple[DFPIR, PromptBank]:
    """The published configuration with random weights (`full`), or a shipped model or weights file."""
    if name == "full":
        torch.manual_seed(0)
        return DFPIR(DFPIRConfig()).eval(), orthogonal_bank()
    checkpoint = resolve(name).load()
    return checkpoint.network.eval(), checkpoint.prompts


def photograph(shape: Shape, multiple: int, device: str) -> Tensor:
    """A photograph resized to a shape, each side rounded up to the network's multiple: B x 3 x H x W float32."""
    image = torch.from_numpy(np.asarray(data.astronaut(), dtype=np.float32) / 255).permute(2, 0, 1)[None]
    size = padded_size(shape.height, shape.width, multiple)
    return F.interpolate(image, size, mode="bilinear", antialias=True).repeat(shape.batch, 1, 1, 1).to(device)


def padded_tensor(pixels: np.ndarray[Any, Any], multiple: int) -> Tensor:
    """H x W x 3 uint8 as 1 x 3 x H x W float32 in [0, 1], each side padded to a multiple."""
    size = padded_size(pixels.shape[0], pixels.shape[1], multiple)
    return upload([pixels], *size, torch.device("cpu")).permute(0, 3, 1, 2).contiguous() / 255


def build(variant: str, network: DFPIR, bank: PromptBank, device: str) -> Run:
    """The function of an image batch that a variant stands for; sets up this process for it."""
    form, dtype, *how = variant.replace(",", "").split()
    if variant != BASELINE:
        keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = "TF32" in how
    if form == "plain":
        plain, embedding = network.to(device), bank.embeddings[[PROMPT]].to(device)
        call = torch.compile(plain) if "compiled" in how else plain

        def one_by_one(image: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                return torch.cat([call(one[None], embedding) for one in image])

        return one_by_one
    inference: Forward = InferenceDFPIR(network, bank, dtype=getattr(torch, dtype), device=device)
    forward = Recorded(inference) if "recorded" in how else inference
    return lambda image: forward(image, torch.full((len(image),), PROMPT, device=device))


def in_double(module: M) -> M:
    """A plain network, or a part of one, in float64, with the channel orders that are computed in float32."""
    precise = copy.deepcopy(module).double()
    for block in precise.modules():
        if isinstance(block, PerturbationBlock):
            block.linear_layer1.float()
            block.linear_layer3.float()
    return precise


def exact(network: DFPIR, bank: PromptBank, image: Tensor) -> Tensor:
    """What the plain network gives in float64."""
    precise = in_double(network).to(image.device)
    embedding = bank.embeddings[[PROMPT]].to(image.device)
    return torch.cat([precise(one[None].double(), embedding) for one in image])


def timed(run: Run, image: Tensor, clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    begun = clock()
    run(image)
    if image.is_cuda:
        torch.cuda.synchronize()
    return clock() - begun


def peak_bytes_per_pixel(variant: str, arguments: argparse.Namespace) -> float | None:
    """What a call takes at its peak, measured in a new process."""
    if arguments.memory is None:
        return None
    command = [sys.executable, "-m", "benchmarks.engine", "--peak-of", variant, "--model", arguments.model]
    command += ["--device", arguments.device, "--threads", str(arguments.threads), "--memory", arguments.memory]
    peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return round(peak / Shape.parse(arguments.memory).megapixels / 1e6, 1)


@torch.inference_mode()
def print_peak(arguments: argparse.Namespace) -> None:
    """The other side of `peak_bytes_per_pixel`."""
    network, bank = network_and_bank(arguments.model)
    run = build(arguments.peak_of, network, bank, arguments.device)
    multiple = network.config.size_multiple
    run(photograph(Shape(1, 2 * multiple, 2 * multiple), multiple, arguments.device))
    image = photograph(Shape.parse(arguments.memory), multiple, arguments.device)
    if image.is_cuda:
        # What the allocator holds, since a recording keeps its working memory between runs.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        for _ in range(RUNS_BEFORE["cuda"]):
            run(image)
        print(torch.cuda.max_memory_reserved() - before)
    else:
        print(peak_bytes(lambda: run(image)))


@torch.inference_mode()
def print_profile(arguments: argparse.Namespace) -> None:
    """Time by operator, and on a GPU by kernel, of one call at the first shape."""
    network, bank = network_and_bank(arguments.model)
    image = photograph(Shape.parse(arguments.shapes[0]), network.config.size_multiple, arguments.device)
    run = build(arguments.profile, network, bank, arguments.device)
    for _ in range(RUNS_BEFORE[image.device.type]):
        run(image)
    with torch.profiler.profile() as profile:
        timed(run, image, time.perf_counter)
    where = f"self_{image.device.type}_time_total"
    print(profile.key_averages().table(sort_by=where, row_limit=25, max_name_column_width=60))


class Contender:
    """A variant in a process of its own."""

    def __init__(self, variant: str, arguments: argparse.Namespace, shape: Shape) -> None:
        """Starts the process; `wait` has to be called before it is timed."""
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=contend, args=(theirs, variant, arguments, shape), daemon=True)
        self.process.start()
        theirs.close()

    def wait(self) -> None:
        """Returns once it is ready to be timed; its first output is `output` then."""
        self.output = torch.from_numpy(self.connection.recv())

    def seconds(self) -> float:
        """Of one more run."""
        self.connection.send(None)
        return float(self.connection.recv())


@torch.inference_mode()
def contend(connection: Connection, variant: str, arguments: argparse.Namespace, shape: Shape) -> None:
    """The other side of a `Contender`: the first output, then seconds whenever something is sent."""
    torch.set_num_threads(arguments.threads)
    network, bank = network_and_bank(arguments.model)
    run = build(variant, network, bank, arguments.device)
    image = photograph(shape, network.config.size_multiple, arguments.device)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    for _ in range(RUNS_BEFORE[image.device.type]):
        output = run(image)
    connection.send(output.float().cpu().numpy())
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(timed(run, image, clock))


def variants_on(device: str) -> list[str]:
    """The variants to measure on a device: those in bfloat16 only where it has that."""
    return [
        variant
        for variant in VARIANTS[torch.device(device).type]
        if "bfloat16" not in variant or fastest_dtype(device) is torch.bfloat16
    ]


@torch.inference_mode()
def measure(
    arguments: argparse.Namespace, shape: Shape, contenders: dict[str, Contender], peaks: dict[str, float | None]
) -> list[dict[str, object]]:
    """A row for each variant."""
    seconds: dict[str, list[float]] = {variant: [] for variant in contenders}
    for _ in range(arguments.rounds):
        for variant, contender in contenders.items():
            seconds[variant].append(contender.seconds())
    network, bank = network_and_bank(arguments.model)
    image = photograph(shape, network.config.size_multiple, arguments.device)
    expected = exact(network, bank, image).cpu()
    rows: list[dict[str, object]] = []
    for variant, contender in contenders.items():
        contender.connection.close()
        ratios = [slow / fast for slow, fast in zip(seconds[BASELINE], seconds[variant], strict=True)]
        rows.append({
            "model": arguments.model, "variant": variant, "shape": str(shape), "threads": arguments.threads,
            "clock": "cpu" if arguments.cpu_time else "wall", "rounds": arguments.rounds,
            "megapixels_per_s": round(shape.megapixels / statistics.median(seconds[variant]), 5),
            **spread(ratios),
            "largest_error": float((contender.output - expected).abs().max()),
            "peak_bytes_per_pixel": peaks[variant],
        })  # fmt: skip
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="full", help="full, a shipped model's name, or a weights file")
    parser.add_argument("--shapes", nargs="+", default=["256x256", "481x321"], help="[BATCHx]HEIGHTxWIDTH")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of the wall clock's")
    parser.add_argument("--memory", metavar="SHAPE", help="measure peak memory too, at this shape")
    add_csv_option(parser, "engine.csv")
    parser.add_argument(
        "--profile", metavar="VARIANT", help="only print where a variant's time in torch's operators goes"
    )
    parser.add_argument("--peak-of", metavar="VARIANT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        return print_peak(arguments)
    if arguments.profile:
        return print_profile(arguments)
    variants = variants_on(arguments.device)
    if len(variants) < len(VARIANTS[torch.device(arguments.device).type]):
        print("bfloat16 is left out: this hardware would only imitate it")
    print(f"{'variant':<28}{'shape':>11}{'MP/s':>8}{'ratio':>6} {'(range)':<11}{'error':>8}{'B/px':>7}", flush=True)
    peaks = {variant: peak_bytes_per_pixel(variant, arguments) for variant in variants}
    shapes = [Shape.parse(text) for text in arguments.shapes]
    # All at once, since compiling for a shape takes minutes on a GPU; so there has to be memory for all.
    contenders = [{variant: Contender(variant, arguments, shape) for variant in variants} for shape in shapes]
    for ready in contenders:
        for contender in ready.values():
            contender.wait()
    rows = []
    for shape, ready in zip(shapes, contenders, strict=True):
        for row in measure(arguments, shape, ready, peaks):
            ends = f"({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
            print(
                f"{row['variant']:<28}{row['shape']:>11}{row['megapixels_per_s']:>8.4f}{row['ratio']:>6.2f} "
                f"{ends:<11}{row['largest_error']:>8.1e}{row['peak_bytes_per_pixel'] or '-':>7}",
                flush=True,
            )
            rows.append(row)
    write_csv(arguments.csv, rows, device=arguments.device)
    return None


if __name__ == "__main__":
    main()
