#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed-MoE: its MoE layer around a SwiGLU expert, in one process or in several over Gloo.

It takes the same top K as the others (no sampling of the second expert). What overflows an expert's capacity is
dropped; only what was kept counts as work.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict

from shapes import LayerShape, add_flags, shape_of

RANK = int(os.environ.get("RANK", "-1"))  # -1: the parent of the ranks
if RANK >= 0:
    # Before torch starts its threads: each rank has its own share of the cores.
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // int(os.environ["WORLD_SIZE"]))
    os.sched_setaffinity(0, cores[RANK * share : (RANK + 1) * share] or cores)
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.moe.layer import MoE
    from layer_work import LayerTensors, check_gradients, check_output, emit, make_tensors, summary, time_runs

    class SwiGlu(torch.nn.Module):
        def __init__(self, hidden: int, ffn: int):
            super().__init__()
            self.gate_up = torch.nn.Linear(hidden, 2 * ffn, bias=False)
            self.down = torch.nn.Linear(ffn, hidden, bias=False)

        def forward(self, x):
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(torch.nn.functional.silu(gate) * up)


def make_layer(shape: LayerShape, capacity: float, tensors: "LayerTensors") -> "MoE":
    ranks = dist.get_world_size()
    layer = MoE(
        shape.hidden,
        SwiGlu(shape.hidden, shape.ffn),
        num_experts=shape.experts,
        ep_size=ranks,
        k=shape.top_k,
        capacity_factor=capacity,
        top2_2nd_expert_sampling=False,
    )
    layer.set_deepspeed_parallelism()
    layer = layer.to(tensors.x_TD.dtype).train()
    local = shape.experts // ranks
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(tensors.gate_ED)
        for i, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert.gate_up.weight.copy_(tensors.gate_up_EGD[RANK * local + i])
            expert.down.weight.copy_(tensors.down_EDF[RANK * local + i])
    return layer


def own_tokens(tensors: "LayerTensors") -> "LayerTensors":
    ranks = dist.get_world_size()
    x_TD, grad_y_TD = tensors.x_TD.chunk(ranks)[RANK].clone(), tensors.grad_y_TD.chunk(ranks)[RANK].clone()
    return LayerTensors(x_TD, grad_y_TD, tensors.gate_ED, tensors.gate_up_EGD, tensors.down_EDF)


def agree(count: int) -> int:
    agreed = torch.tensor(count)
    dist.broadcast(agreed, 0)
    return int(agreed)


def measure(shape: LayerShape, capacity: float, dtype: "torch.dtype", seconds: float) -> dict:
    tensors = own_tokens(make_tensors(shape, dtype))
    layer = make_layer(shape, capacity, tensors)
    x_BTD = tensors.x_TD.unsqueeze(0).requires_grad_()

    def run():
        x_BTD.grad = None
        layer.zero_grad(set_to_none=True)
        y_BTD, _, _ = layer(x_BTD)
        y_BTD.backward(tensors.grad_y_TD.unsqueeze(0))
        return y_BTD

    # Which slots the capacity keeps is the gate's own word; which experts the tokens want is the oracle's to judge.
    with torch.no_grad():
        _, _, _, kept_ids_KT, *_ = layer.deepspeed_moe.gate(tensors.x_TD, None, sparse_routes=True)
        logits_TE = tensors.x_TD.float() @ tensors.gate_ED.float().T
    kept_KT = kept_ids_KT >= 0
    check = check_output(tensors, logits_TE.topk(shape.top_k).indices, run()[0], kept_KT.all(0))
    check_gradients([("the input", x_BTD), *layer.named_parameters()])
    times = torch.tensor(time_runs(run, seconds, barrier=dist.barrier, agree=agree), dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    dropped = 1.0 - kept_KT.double().mean()
    dist.all_reduce(dropped)
    return {
        **summary(times.tolist()),
        "dropped": dropped.item() / dist.get_world_size(),
        "capacity": capacity,
        "check": asdict(check),
    }


def start_ranks(ranks: int, threads: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    processes = []
    for rank in range(ranks):
        environment = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment["OMP_NUM_THREADS"] = str(max(1, threads // ranks))
        # The places of all cores would put every rank's first thread on the first one.
        if ranks > 1:
            environment.pop("OMP_PLACES", None)
        processes.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
        time.sleep(0.1)
    for process in processes:
        if process.poll() is None:
            process.terminate()  # it would wait for the one that failed
    sys.exit(max(abs(process.wait()) for process in processes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    layer = parser.add_subparsers(dest="work", required=True).add_parser("layer")
    add_flags(layer, LayerShape)
    layer.add_argument("--ranks", type=int, default=1)
    layer.add_argument("--capacity", type=float, required=True)
    layer.add_argument("--dtype", required=True)
    layer.add_argument("--seconds", type=float, default=3.0)
    layer.add_argument("--threads", type=int, required=True, help="of all ranks together")
    arguments = parser.parse_args()
    if RANK < 0:
        start_ranks(arguments.ranks, arguments.threads)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    torch.set_num_threads(max(1, arguments.threads // arguments.ranks))
    torch.manual_seed(1)
    dtype = getattr(torch, arguments.dtype)
    result = measure(shape_of(arguments, LayerShape), arguments.capacity, dtype, arguments.seconds)
    if RANK == 0:
        emit(result)
    # A rank that ends while another still talks to it would abort that one.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
