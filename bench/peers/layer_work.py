# SPDX-License-Identifier: Apache-2.0
"""What the peers' processes share: the layer's tensors, the oracle its output is held against, and the clock.

Shapes: T tokens, D hidden, E experts, K experts per token, F width of an expert, G = 2 F (gate rows, then up rows).
"""

import json
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from shapes import LayerShape

SINGLE_EPSILON = 2.0**-24  # products are accumulated in fp32
SILU_SLOPE = 1.0999  # the largest of |d silu(x) / d x|, rounded up


@dataclass(frozen=True)
class LayerTensors:
    x_TD: torch.Tensor
    grad_y_TD: torch.Tensor
    gate_ED: torch.Tensor
    gate_up_EGD: torch.Tensor
    down_EDF: torch.Tensor


@dataclass(frozen=True)
class Check:
    """How far an output is from the oracle's."""

    worst_of_bound: float  # largest |error| / bound of all elements
    relative_rms: float  # root mean square of the errors, relative to the output's
    relative_rms_bound: float
    tokens: int  # that were compared


def make_tensors(shape: LayerShape, dtype: torch.dtype) -> LayerTensors:
    """Inputs ~ N(0, 1), weights ~ N(0, 0.02^2), as `collegium bench layer` draws them."""
    generator = torch.Generator().manual_seed(1)

    def random(*sizes: int, scale: float = 0.02) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).mul_(scale).to(dtype)

    return LayerTensors(
        x_TD=random(shape.tokens, shape.hidden, scale=1.0),
        grad_y_TD=random(shape.tokens, shape.hidden, scale=1.0),
        gate_ED=random(shape.experts, shape.hidden),
        gate_up_EGD=random(shape.experts, 2 * shape.ffn, shape.hidden),
        down_EDF=random(shape.experts, shape.hidden, shape.ffn),
    )


def linear_with_bound(
    x: torch.Tensor, bound_x: torch.Tensor | float, weight: torch.Tensor, unit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T, and how far it may be off: what x is off, the order of the sum in fp32, one rounding to the dtype."""
    product = x @ weight.T
    accumulated = x.size(-1) * SINGLE_EPSILON * x.abs() + bound_x
    return product, accumulated @ weight.abs().T + unit * product.abs()


def oracle(tensors: LayerTensors, ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y_TD in float64 for these experts, and the largest error that arithmetic in the tensors' dtype explains.

    y = sum over k of softmax over the chosen (logits)_k * W_down (silu(W_gate x) * W_up x), expert by expert.
    Raises ValueError where an expert that was not chosen has a logit above a chosen one's, beyond rounding.
    """
    unit = torch.finfo(tensors.x_TD.dtype).eps / 2
    x_TD, gate_ED = tensors.x_TD.double(), tensors.gate_ED.double()
    logits_TE, bound_TE = linear_with_bound(x_TD, 0.0, gate_ED, unit)
    chosen_TK = logits_TE.gather(1, ids_TK)
    # Systems that choose by probabilities in the tensors' dtype round once more: relative there, absolute here.
    slack_TE = bound_TE + 2.0 * unit
    others_TE = (logits_TE - slack_TE).scatter(1, ids_TK, float("-inf"))
    if (chosen_TK + slack_TE.gather(1, ids_TK)).amin(1).lt(others_TE.amax(1)).any():
        raise ValueError("a token was not given the experts with the largest logits")
    weights_TK = chosen_TK.softmax(1)
    # The weights are e^l over a sum of such: two logits' errors, then exponential, sum, quotient and rounding.
    off_T1 = 2.0 * bound_TE.gather(1, ids_TK).amax(1, keepdim=True) + 4.0 * unit

    y_TD, bound_TD = torch.zeros_like(x_TD), torch.zeros_like(x_TD)
    for expert in range(tensors.gate_ED.size(0)):
        token_R, choice_R = torch.where(ids_TK == expert)
        gate_up_RG, bound_RG = linear_with_bound(x_TD[token_R], 0.0, tensors.gate_up_EGD[expert].double(), unit)
        (gate, up), (bound_gate, bound_up) = gate_up_RG.chunk(2, 1), bound_RG.chunk(2, 1)
        act = torch.nn.functional.silu(gate)
        bound_act = SILU_SLOPE * bound_gate + unit * act.abs()
        h_RF = act * up
        bound_RF = bound_act * (up.abs() + bound_up) + act.abs() * bound_up + unit * h_RF.abs()
        out_RD, bound_RD = linear_with_bound(h_RF, bound_RF, tensors.down_EDF[expert].double(), unit)
        weight_R1 = weights_TK[token_R, choice_R].unsqueeze(1)
        y_TD.index_add_(0, token_R, weight_R1 * out_RD)
        # The product with the weight and each of the K sums rounds once more.
        roundings = off_T1[token_R] + (1 + ids_TK.size(1)) * unit
        bound_TD.index_add_(0, token_R, weight_R1 * (bound_RD * (1.0 + off_T1[token_R]) + roundings * out_RD.abs()))
    return y_TD, bound_TD


def check_output(tensors: LayerTensors, ids_TK: torch.Tensor, y_TD: torch.Tensor, whole_T: torch.Tensor) -> Check:
    """Compares the tokens of `whole_T`, those that lost no expert. Raises ValueError unless it is the same work.

    No element may be off by more than its bound, which supposes the worst of every rounding. Independent roundings add
    up as roots of squares, so that all elements together must be much closer: within 4 roundings to the dtype and to
    fp32 sums of D and of F terms.
    """
    want_TD, bound_TD = oracle(tensors, ids_TK)
    error_TD = (y_TD.detach().double() - want_TD)[whole_T]
    unit = torch.finfo(y_TD.dtype).eps / 2
    terms = tensors.x_TD.size(1) + tensors.down_EDF.size(2)
    check = Check(
        worst_of_bound=(error_TD.abs() / bound_TD[whole_T]).max().item(),
        relative_rms=(error_TD.norm() / want_TD[whole_T].norm()).item(),
        relative_rms_bound=4.0 * (unit + terms**0.5 * SINGLE_EPSILON),
        tokens=int(whole_T.sum()),
    )
    if not (check.worst_of_bound <= 1.0 and check.relative_rms <= check.relative_rms_bound):
        raise ValueError(f"the output differs from the oracle's by more than rounding can: {check}")
    return check


def check_gradients(named: list[tuple[str, torch.Tensor]]) -> None:
    """Raises ValueError unless the backward pass reached every input and weight."""
    for name, tensor in named:
        if tensor.grad is None or not tensor.grad.isfinite().all() or not tensor.grad.any():
            raise ValueError(f"{name} got no gradient, or one that is not finite")


def time_runs(
    run: Callable[[], None],
    seconds: float,
    *,
    warm_ups: int = 3,
    least: int = 5,
    barrier: Callable[[], None] = lambda: None,
    agree: Callable[[int], int] = lambda count: count,
) -> list[float]:
    """Times `run` for about `seconds` after warming up. `agree` makes all ranks run equally often."""
    for _ in range(warm_ups):
        barrier()
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
    times = []
    for _ in range(agree(max(least, round(seconds / once)))):
        barrier()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> dict:
    return {"runs": len(times), "seconds_min": min(times), "seconds_median": statistics.median(times)}


def peak_rss_bytes() -> int:
    """Of this program alone: getrusage() would start from what the process that started it had."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def emit(result: dict) -> None:
    """The last line of stdout is the result: libraries print there, too."""
    print("\n" + json.dumps(result), flush=True)
