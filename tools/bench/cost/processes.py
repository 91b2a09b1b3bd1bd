"""What dividing calibration among processes costs: a plan and a compilation with 1, 2 and 4 processes.

    python tools/bench/cost/processes.py --net resnet20 llama --samples 512 --processes 1 2 4

The networks are ResNet-20, whose data is that of the folder GRAPHZIP_DATA (default: ../shared/data beside the
repository), and a Llama of two layers with random weights on random tokens.

One process has two threads, several have one each. For each number: wall seconds, processor seconds of all processes,
from the first call of graphzip to the last, without what starts and imports them; the ratio of the wall time to that of
one process; whether the plan is the same, and the largest difference of a weight relative to the largest weight of its
tensor.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

import graphzip as gz

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NETS = "resnet20", "llama"


def llama(samples: int) -> Any:
    """A decoder of two layers, and sequences of 32 tokens."""
    import transformers
    from planning import BATCH, Subject

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
        initializer_range=0.2,
        use_cache=False,
    )
    return Subject(transformers.LlamaForCausalLM(config).eval(), list(torch.randint(512, (samples, 32)).split(BATCH)))


def subject_of(net: str, samples: int, folder: Path) -> Any:
    """A network and its data."""
    from planning import cifar_resnet

    return llama(samples) if net == "llama" else cifar_resnet(net, samples, 1, folder)


def work(rank: int, count: int, net: str, samples: int, macs: float, folder: str) -> None:
    """What one of the processes does; it saves what it ends with."""
    torch.set_num_threads(2 if count == 1 else 1)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{count}", rank=rank, world_size=count)
        dist.barrier()
    subject = subject_of(net, samples, Path(folder))
    share = subject.batches[rank::count]
    if count > 1:
        dist.barrier()
    begin, used = time.perf_counter(), time.process_time()
    plan = gz.plan_for(subject.model, subject.example, macs=macs, calibration=share)
    planned = time.perf_counter()
    compiled = gz.compile(subject.model, plan, subject.example, calibration=share)
    end = time.perf_counter()
    found = {
        "plan": plan.to_dict(),
        "weights": compiled.module.state_dict(),
        "wall": end - begin,
        "planning": planned - begin,
        "processor": time.process_time() - used,
    }
    torch.save(found, f"{folder}/{count}.{rank}.pt")
    if count > 1:
        dist.destroy_process_group()


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight, relative to the largest one of its tensor."""
    if any(one[name].shape != other[name].shape for name in one):
        return float("inf")
    pairs = [(one[name].double(), other[name].double()) for name in one if one[name].numel()]
    return max(float((left - right).abs().max() / left.abs().max().clamp(min=1e-30)) for left, right in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", choices=NETS, default=NETS)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--macs", type=float, default=0.5, help="share of the multiply-accumulates to plan for")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for net in options.net:
        Console().print(measured(net, options))


def measured(net: str, options: argparse.Namespace) -> Table:
    """A row for each number of processes."""
    table = Table("processes", "wall s", "planning s", "processor s", "ratio", "same plan", "weights apart", title=net)
    with tempfile.TemporaryDirectory() as folder:
        first: dict[str, Any] = {}
        for count in options.processes:
            mp.spawn(work, (count, net, options.samples, options.macs, folder), count)
            parts = [torch.load(f"{folder}/{count}.{rank}.pt", weights_only=False) for rank in range(count)]
            first = first or parts[0]
            wall = max(part["wall"] for part in parts)
            table.add_row(
                str(count),
                f"{wall:.1f}",
                f"{max(part['planning'] for part in parts):.1f}",
                f"{sum(part['processor'] for part in parts):.1f}",
                f"{wall / first['wall']:.2f}",
                str(all(part["plan"] == first["plan"] for part in parts)).lower(),
                f"{max(apart(first['weights'], part['weights']) for part in parts):.1e}",
            )
    return table


if __name__ == "__main__":
    main()
