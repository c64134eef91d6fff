"""Training runs on MI250X with published layout and speed, used to validate the planner's time model.

Numbers are per GCD. A row has the values stated by its source; `assumed` lists added assumptions, `caution` states why
the number may mean something else. Rows that cannot be replayed are in `EXCLUDED`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.layout import LlamaShape
from megatron.planner.cost.parallel_layout import ParallelLayout

Metric = Literal["neox", "megatron", "tokens"]


@dataclass(frozen=True)
class PublishedRun:
    """A run and its `published` speed, in TFLOP/s by GPT-NeoX's or Megatron's formula or in tokens/s (`metric`)."""

    name: str
    machine: Literal["frontier", "lumi"]
    shape: LlamaShape
    layout: ParallelLayout
    seq_length: int
    metric: Metric
    published: float
    source: str
    year: int
    assumed: str = ""
    caution: str = ""
    calibrates: bool = True
    sharded: bool = False  # FSDP: weights gathered for every layer, overlapped with computation
    half_recompute: bool = False  # torchtitan's selective mode: every second matrix product recomputed
    keeps_gathered: bool = False  # sequence parallelism that stores gathered inputs instead of gathering them twice
    # of a recurrent model: layers passed forward and backward in addition to those stored
    more_forward_layers: int = 0
    more_backward_layers: int = 0
    speed: float = 1.0  # of GCD and software, relative to an MI250X GCD under ROCm 6.2 or later


# "Moving to torch/ROCm 6.2: another 22 %" (eminorhan/frontier-accelerate): runs of 2023 and early 2024 were slower.
EARLY_SOFTWARE = 1 / 1.22
# An MI250 has 104 compute units to an MI250X's 110.
MI250 = 104 / 110


def gpt(layers: int, hidden: int, heads: int, vocab: int = 51_200) -> LlamaShape:
    """A GPT with multi-head attention and a 4h MLP, as the SwiGLU MLP of the same weights and FLOPs."""
    return LlamaShape(layers, hidden, heads, heads, round(8 * hidden / 3), vocab, vocab, tied=True)


LLAMA_8B = LlamaShape(32, 4096, 32, 8, 14_336, 128_256, 128_256, tied=False)
LLAMA_70B = LlamaShape(80, 8192, 64, 8, 28_672, 128_256, 128_256, tied=False)

RUNS = (
    PublishedRun(
        "AstroSage-70B",
        "frontier",
        LLAMA_70B,
        ParallelLayout(8, 8, 32, 1, 16),
        8192,
        "neox",
        50.0,
        "arXiv 2505.17592",
        2025,
        assumed="512 sequences a step in micro-batches of 1; the formula is GPT-NeoX's own print",
    ),
    PublishedRun(
        "Dash et al. 22B",
        "frontier",
        gpt(48, 6144, 48),
        ParallelLayout(1, 8, 2, 1, 320),
        2048,
        "neox",
        73.5,
        "arXiv 2312.12705, abstract; layout from the authors' scripts, sajal-vt/Megatron-DeepSpeed-ORNL",
        2023,
        speed=EARLY_SOFTWARE,
        assumed="that the scripts' layout gave the abstract's number, recomputation counted",
    ),
    PublishedRun(
        "Dash et al. 175B",
        "frontier",
        gpt(96, 12_288, 96),
        ParallelLayout(4, 16, 2, 1, 320),
        4096,
        "neox",
        69.2,
        "as above",
        2023,
        speed=EARLY_SOFTWARE,
        assumed="as above",
    ),
    PublishedRun(
        "Dash et al. 1T",
        "frontier",
        gpt(128, 25_600, 200),
        ParallelLayout(4, 128, 2, 1, 512),
        2048,
        "neox",
        61.2,
        "as above",
        2023,
        speed=EARLY_SOFTWARE,
        assumed="as above",
    ),
    PublishedRun(
        "175B raw log",
        "frontier",
        gpt(96, 12_288, 96),
        ParallelLayout(4, 16, 2, 1, 160),
        2048,
        "neox",
        37.4,
        "sajal-vt/Megatron-DeepSpeed-ORNL, log 405287, corrected for the samples really run",
        2023,
        speed=EARLY_SOFTWARE,
        calibrates=False,
        caution="an early log from the test system, with steps that differ by 40 %; the same authors' published run of "
        "this layout is 1.85 times faster; not calibrated on",
    ),
    PublishedRun(
        "Huginn, one node",
        "frontier",
        LlamaShape(8, 5280, 55, 55, 17_920, 65_536, 65_536, tied=True),
        ParallelLayout(1, 1, 8, 1, 1, recompute="none"),
        4096,
        "megatron",
        108.75,
        "arXiv 2502.05171",
        2025,
        more_forward_layers=124,
        more_backward_layers=28,
        assumed="32 recurrences of 4 layers, the last 8 with gradients",
    ),
    PublishedRun(
        "Llama-3.1-8B FSDP",
        "frontier",
        LLAMA_8B,
        ParallelLayout(1, 1, 64, 1, 1, recompute="none"),
        8192,
        "tokens",
        1333.0,
        "eminorhan/frontier-torchtitan, llama3_8b_n8_benchmark.toml",
        2024,
        sharded=True,
        half_recompute=True,
    ),
    PublishedRun(
        "Llama-3.1-8B FSDP + TP8",
        "frontier",
        LLAMA_8B,
        ParallelLayout(8, 1, 640, 21, 1, sequence_parallel=True),
        8192,
        "tokens",
        600.0,
        "eminorhan/frontier-torchtitan, llama3_8b.toml",
        2024,
        sharded=True,
        keeps_gathered=True,
        assumed="inputs stored as gathered, ten half-collectives a layer less two",
        caution='derived from "0.6 minutes a step"; an earlier version of the source says one minute',
    ),
    PublishedRun(
        "1.7B FineWeb replication",
        "lumi",
        LlamaShape(24, 2048, 32, 32, 8192, 50_304, 50_304, tied=True),
        ParallelLayout(1, 1, 64, 4, 4, recompute="none"),
        2048,
        "megatron",
        80.0,
        "spyysalo/lumi-fineweb-replication",
        2025,
    ),
    PublishedRun(
        "TildeOpen 30B",
        "lumi",
        LlamaShape(60, 6144, 48, 8, 21_504, 131_072, 131_072, tied=False),
        ParallelLayout(8, 1, 192, 3, 1),
        8192,
        "tokens",
        192.0,
        "tilde-nlp/llm-gpt-neox",
        2025,
        assumed="a vocabulary of 131,072",
        caution='derived from "450 steps in about 2 hours"; the same configuration\'s "1,750 steps in about 9 hours" '
        "gives 166",
    ),
    PublishedRun(
        "MPT-7B FSDP",
        "frontier",
        gpt(32, 4096, 32, 50_368),
        ParallelLayout(1, 1, 8, 4, 32),
        2048,
        "tokens",
        1602.0,
        "mosaicml/llm-foundry issue 1153",
        2024,
        sharded=True,
        speed=EARLY_SOFTWARE * MI250,
        assumed="recomputation and 1,024 sequences a step, as in llm-foundry's configuration files",
    ),
    PublishedRun(
        "MPT-13B FSDP",
        "frontier",
        gpt(40, 5120, 40, 50_368),
        ParallelLayout(1, 1, 8, 4, 32),
        2048,
        "tokens",
        753.0,
        "as above",
        2024,
        sharded=True,
        speed=EARLY_SOFTWARE * MI250,
        assumed="as above",
    ),
)

EXCLUDED = {
    "Huginn, 4,096 GCDs (52-64 TFLOP/s)": "its slowdown against one node is where `hop_seconds` comes from",
    "AxoNN, 8,192 and 32,768 GCDs (69.5 and 42.1 TFLOP/s)": "the four-dimensional layout is not stated",
    "OLMo-7B, 64 GCDs (1,200 tokens/s)": "micro-batch and recomputation are not stated",
    "X-MoE 10B": "a mixture of experts",
    "E97 4B": "not a transformer",
    "Poro-34B, Poro-2 8B and 70B, Europa 71B": "layouts without a published speed",
}
