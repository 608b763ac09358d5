"""What each step from the paper's formulas to the inference form gains: `python -m benchmarks.steps --help`.

A transformer block and a perturbation block of each level of the published size, random weights, on random features of
an image of `--side` px. Each step has those above it. They take turns round by round in one process that keeps its
memory, and a ratio is the median over rounds of the published form's time over a step's. Errors are the largest
differences from the published form in float64, as a share of the largest result.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.engine import PROMPT, in_double
from benchmarks.record import add_csv_option, spread, write_csv
from models import bands, native, passes
from models.dfpir import ChannelLayerNorm, DFPIRConfig, PerturbationBlock, TransformerBlock
from models.inference import _Blocks, _merge_output, _Perturbation
from models.memory import keep_freed_memory
from models.precision import fastest_dtype
from models.prompts import orthogonal_bank

Run = Callable[[], Tensor]


class ProductBlock(nn.Module):
    """A transformer block on B x H x W x C, in which 1x1 convolutions are products; whole maps throughout."""

    def __init__(self, plain: TransformerBlock, *, late_norms: bool = False, merged: bool = False) -> None:
        """`late_norms`: norms divide the C x C matrix; `merged`: attention and projection are one C x C matrix."""
        super().__init__()
        self.plain, self.late_norms, self.merged = plain, late_norms, merged

    def forward(self, x: Tensor) -> Tensor:
        """As of the plain block, but for the layout."""
        x = self._attend(x)
        plain = self.plain.ffn
        gate, value = self._widen(x, self.plain.norm2, plain.project_in, plain.dwconv).chunk(2, dim=-1)
        return x + F.linear(F.gelu(gate) * value, plain.project_out.weight.flatten(1))

    @staticmethod
    def _widen(x: Tensor, norm: ChannelLayerNorm, project: nn.Conv2d, convolution: nn.Conv2d) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], norm.body.weight, norm.body.bias, passes.EPS)
        wide = F.linear(normed, project.weight.flatten(1)).permute(0, 3, 1, 2)
        return F.conv2d(wide, convolution.weight, padding=1, groups=wide.shape[1]).permute(0, 2, 3, 1)

    def _attend(self, x: Tensor) -> Tensor:
        plain, (batch, _, _, channels) = self.plain.attn, x.shape
        query, key, value = (
            part.reshape(batch, -1, plain.heads, channels // plain.heads).transpose(1, 2)
            for part in self._widen(x, self.plain.norm1, plain.qkv, plain.qkv_dwconv).chunk(3, dim=-1)
        )
        if self.late_norms:
            query_norm, key_norm = (part.square().sum(-2).sqrt() for part in (query, key))
            logits = query.transpose(-2, -1) @ key / query_norm[..., :, None] / key_norm[..., None, :]
        else:
            logits = F.normalize(query, dim=-2).transpose(-2, -1) @ F.normalize(key, dim=-2)
        attention = (logits * plain.temperature).softmax(dim=-1)
        project_out = plain.project_out.weight.flatten(1)
        if self.merged:
            values = value.transpose(1, 2).reshape(batch, -1, channels)
            merged = _merge_output(attention, project_out)
            return torch.baddbmm(x.flatten(1, 2), values, merged.transpose(1, 2)).view(x.shape)
        attended = (value @ attention.transpose(-2, -1)).transpose(1, 2).reshape(x.shape)
        return x + F.linear(attended, project_out)


def block_steps(block: TransformerBlock, x: Tensor) -> dict[str, Run]:
    """The steps of a transformer block, for features B x C x H x W."""
    last = x.permute(0, 2, 3, 1).contiguous()
    moved = copy.deepcopy(block).to(memory_format=torch.channels_last)
    moved_x = x.contiguous(memory_format=torch.channels_last)
    products = [ProductBlock(block), ProductBlock(block, late_norms=True)]
    merged = ProductBlock(block, late_norms=True, merged=True)

    def banded(dtype: torch.dtype) -> Run:
        blocks, features = _Blocks(nn.Sequential(block), dtype), last.to(dtype)
        return lambda: blocks(features.clone())

    return {
        "block, published": lambda: block(x),
        "channels last": lambda: moved(moved_x),
        "1x1 as products": lambda: products[0](last),
        "norms in C x C": lambda: products[1](last),
        "merged C x C": lambda: merged(last),
        **last_steps(banded),
    }


def perturbation_steps(block: PerturbationBlock, x: Tensor) -> dict[str, Run]:
    """The steps of a perturbation block, for features B x C x H x W."""
    last, prompts, embeddings = x.permute(0, 2, 3, 1).contiguous(), torch.tensor([PROMPT]), orthogonal_bank().embeddings
    orders, embedding = block.permutations(embeddings), embeddings[[PROMPT]]
    folded = _Perturbation(block, orders, torch.float32)
    matrix, bias = folded.matrices[PROMPT][..., None, None], folded.biases[PROMPT]

    def shuffled_by_matrix() -> Tensor:
        shuffled = F.conv2d(x, matrix, bias)
        attended = block.select_attn(block.norm1(shuffled), block.norm2(x))
        out: Tensor = attended + block.ffn(block.norm3(attended))
        return out

    def banded(dtype: torch.dtype) -> Run:
        perturbation, features = _Perturbation(block, orders, dtype), last.to(dtype)
        return lambda: perturbation(features, prompts)

    return {
        "perturbation, published": lambda: block(x, embedding),
        "shuffle as C x C": shuffled_by_matrix,
        **last_steps(banded),
    }


def last_steps(banded: Callable[[torch.dtype], Run]) -> dict[str, Run]:
    """The inference form over bands with torch's operators, then compiled passes and bfloat16 where these are."""
    exact = banded(torch.float32)

    def by_torch() -> Tensor:
        with patch.object(bands, "passes_for", lambda _: passes), patch.dict(bands.BAND_BYTES, cpu=2 << 20):
            return exact()

    steps = {"bands of rows": by_torch}
    if native.library is not None:
        steps["compiled passes"] = exact
    if fastest_dtype("cpu") is torch.bfloat16:
        steps["bfloat16"] = banded(torch.bfloat16)
    return steps


def measure(steps: dict[str, Run], expected: Tensor, rounds: int) -> list[dict[str, object]]:
    """A row for each step: ratios of neighbouring times to those of the first."""
    first = next(iter(steps))
    errors = {}
    for name, run in steps.items():
        found = run()
        found = found if found.shape == expected.shape else found.permute(0, 3, 1, 2)
        errors[name] = float((found - expected).abs().max() / expected.abs().max())
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return [
        {
            "step": name,
            "ms": round(1e3 * statistics.median(taken), 2),
            **spread([slow / fast for slow, fast in zip(seconds[first], taken, strict=True)]),
            "largest_error": errors[name],
        }
        for name, taken in seconds.items()
    ]


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="of the image, a multiple of 8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    add_csv_option(parser, "steps.csv")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = DFPIRConfig()
    rows: list[dict[str, object]] = []
    print(f"{'step':<26}{'channels':>9}{'side':>6}{'ms':>9}{'ratio':>7} {'(range)':<13}{'error':>8}")
    for level, heads in enumerate(config.heads):
        channels, side = config.dim * 2**level, arguments.side // 2**level
        x = torch.randn(1, channels, side, side)
        block = TransformerBlock(channels, heads, config.ffn_expansion_factor).eval()
        perturbation = PerturbationBlock(channels, heads, config).eval()
        embedding = orthogonal_bank().embeddings[[PROMPT]]
        for steps, expected in (
            (block_steps(block, x), in_double(block)(x.double())),
            (perturbation_steps(perturbation, x), in_double(perturbation)(x.double(), embedding)),
        ):
            for row in measure(steps, expected, arguments.rounds):
                ends = f"({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
                print(
                    f"{row['step']:<26}{channels:>9}{side:>6}{row['ms']:>9}{row['ratio']:>7.2f} {ends:<13}"
                    f"{row['largest_error']:>8.1e}",
                    flush=True,
                )
                rows.append({
                    "channels": channels, "height": side, "width": side, "threads": arguments.threads,
                    "rounds": arguments.rounds, **row,
                })  # fmt: skip
    write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
