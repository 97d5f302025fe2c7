#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""transformers: the Mixtral block and the Mixtral model, with its experts eager or by grouped_mm."""

import argparse
from dataclasses import asdict

import torch
import transformers
from layer_work import check_gradients, check_output, emit, make_tensors, peak_rss_bytes, summary, time_runs
from shapes import LayerShape, StepShape, add_flags, shape_of
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock


def config_of(shape: LayerShape | StepShape, implementation: str, **more) -> transformers.MixtralConfig:
    config = transformers.MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        **more,
    )
    config._experts_implementation = implementation
    return config


def measure_layer(shape: LayerShape, implementation: str, dtype: torch.dtype, seconds: float) -> dict:
    tensors = make_tensors(shape, dtype)
    block = MixtralSparseMoeBlock(config_of(shape, implementation)).to(dtype).train()
    with torch.no_grad():
        block.gate.weight.copy_(tensors.gate_ED)
        block.experts.gate_up_proj.copy_(tensors.gate_up_EGD)
        block.experts.down_proj.copy_(tensors.down_EDF)
        _, _, ids_TK = block.gate(tensors.x_TD)
    x_BTD = tensors.x_TD.unsqueeze(0).requires_grad_()
    grad_y_BTD = tensors.grad_y_TD.unsqueeze(0)

    def run() -> torch.Tensor:
        x_BTD.grad = None
        block.zero_grad(set_to_none=True)
        y_BTD = block(x_BTD)
        y_BTD.backward(grad_y_BTD)
        return y_BTD

    y_BTD = run()
    check = check_output(tensors, ids_TK, y_BTD[0], torch.ones(shape.tokens, dtype=torch.bool))
    check_gradients([("the input", x_BTD), *block.named_parameters()])
    return {**summary(time_runs(run, seconds)), "dropped": 0.0, "check": asdict(check)}


def measure_step(shape: StepShape, implementation: str, dtype: torch.dtype, seconds: float) -> dict:
    imports_rss_bytes = peak_rss_bytes()
    config = config_of(
        shape,
        implementation,
        vocab_size=shape.vocab,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.length,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        use_cache=False,
        dtype=dtype,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if model.config._experts_implementation != implementation:
        raise ValueError(f"the model runs {model.config._experts_implementation} experts instead of {implementation}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    generator = torch.Generator().manual_seed(1)

    def run() -> None:
        ids = torch.randint(0, shape.vocab, (shape.sequences, shape.length), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = time_runs(run, seconds, warm_ups=2, least=3)
    return {
        **summary(times),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_rss_bytes": peak_rss_bytes(),
        "imports_rss_bytes": imports_rss_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    works = parser.add_subparsers(dest="work", required=True)
    for name, kind in (("layer", LayerShape), ("step", StepShape)):
        work = works.add_parser(name)
        add_flags(work, kind)
        work.add_argument("--implementation", choices=("eager", "grouped_mm"), required=True)
        work.add_argument("--dtype", required=True)
        work.add_argument("--seconds", type=float, default=3.0)
        work.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    transformers.logging.set_verbosity_error()
    measure, kind = {"layer": (measure_layer, LayerShape), "step": (measure_step, StepShape)}[arguments.work]
    dtype = getattr(torch, arguments.dtype)
    emit(measure(shape_of(arguments, kind), arguments.implementation, dtype, arguments.seconds))


if __name__ == "__main__":
    main()
