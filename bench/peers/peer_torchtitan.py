#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""torchtitan: its MoE layer with the local token dispatcher."""

import argparse
from dataclasses import asdict

import torch
from layer_work import check_gradients, check_output, emit, make_tensors, summary, time_runs
from shapes import LayerShape, add_flags, shape_of
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher


def make_layer(shape: LayerShape) -> MoE:
    return MoE.Config(
        num_experts=shape.experts,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=shape.hidden, hidden_dim=shape.ffn, num_experts=shape.experts),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=shape.experts, top_k=shape.top_k),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=shape.experts,
            gate=Linear.Config(in_features=shape.hidden, out_features=shape.experts),
            top_k=shape.top_k,
            score_func="softmax",
            route_norm=True,
        ),
        load_balance_coeff=None,
    ).build()


def measure(shape: LayerShape, dtype: torch.dtype, seconds: float) -> dict:
    tensors = make_tensors(shape, dtype)
    layer = make_layer(shape).to(dtype).train()
    experts = layer.routed_experts.inner_experts
    with torch.no_grad():
        layer.router.gate.weight.copy_(tensors.gate_ED)
        gate_EFD, up_EFD = tensors.gate_up_EGD.chunk(2, dim=1)
        experts.w1_EFD.copy_(gate_EFD)
        experts.w3_EFD.copy_(up_EFD)
        experts.w2_EDF.copy_(tensors.down_EDF)
        _, ids_BTK, _ = layer.router(tensors.x_TD.unsqueeze(0))
    x_BTD = tensors.x_TD.unsqueeze(0).requires_grad_()
    grad_y_BTD = tensors.grad_y_TD.unsqueeze(0)

    def run() -> torch.Tensor:
        x_BTD.grad = None
        layer.zero_grad(set_to_none=True)
        y_BTD = layer(x_BTD)
        y_BTD.backward(grad_y_BTD)
        return y_BTD

    check = check_output(tensors, ids_BTK[0], run()[0], torch.ones(shape.tokens, dtype=torch.bool))
    check_gradients([("the input", x_BTD), *layer.named_parameters()])
    return {**summary(time_runs(run, seconds)), "dropped": 0.0, "check": asdict(check)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    layer = parser.add_subparsers(dest="work", required=True).add_parser("layer")
    add_flags(layer, LayerShape)
    layer.add_argument("--dtype", required=True)
    layer.add_argument("--seconds", type=float, default=3.0)
    layer.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    emit(measure(shape_of(arguments, LayerShape), getattr(torch, arguments.dtype), arguments.seconds))


if __name__ == "__main__":
    main()
