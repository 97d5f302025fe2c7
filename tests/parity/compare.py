# SPDX-License-Identifier: Apache-2.0
"""`collegium eval` beside transformers: logits, loss, auxiliary loss and every gradient of one model folder."""

import contextlib
import json
import pathlib
import subprocess
import sys

import torch
import transformers
from safetensors.torch import load_file

FLOAT64_BOUND = 1e-9
COLLEGIUM = sys.argv[1] if len(sys.argv) > 1 else "build/bin/collegium"


@contextlib.contextmanager
def lifted_to_float64():
    """Inside, `torch.float32`, `torch.float` and `.float()` mean float64."""
    saved = torch.float32, torch.float, torch.Tensor.float, torch.get_default_dtype()
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved[:3]
        torch.set_default_dtype(saved[3])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    scale = b.double().norm().item()
    return (a.double() - b.double()).norm().item() / (scale if scale > 1e-12 else 1.0)


def collegium_eval(folder: pathlib.Path, dtype: str) -> tuple[dict, torch.Tensor, dict]:
    command = [
        COLLEGIUM,
        "eval",
        "--model",
        str(folder / "model"),
        "--input",
        str(folder / "ids.safetensors"),
    ]
    command += [
        "--dtype",
        dtype,
        "--json",
        "--logits",
        str(folder / "logits"),
        "--grads",
        str(folder / "grads"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"eval failed: {done.stderr}")
    return (
        json.loads(done.stdout),
        load_file(folder / "logits")["logits"],
        load_file(folder / "grads"),
    )


def disk_gradients(model, folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """transformers' gradients under on-disk names: saved as if they were weights."""
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    model.save_pretrained(folder / "reference_grads")
    gradients = {}
    for shard in sorted((folder / "reference_grads").glob("*.safetensors")):
        gradients.update(load_file(shard))
    return gradients


def reference(folder: pathlib.Path, dtype: torch.dtype, ids: torch.Tensor):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model.train()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    aux = getattr(out, "aux_loss", None)
    return (
        out.logits.detach().clone(),
        out.loss.item(),
        0.0 if aux is None else aux.item(),
        model,
    )


def check(name: str, folder: pathlib.Path, dtype_name: str, theirs: pathlib.Path | None = None) -> float:
    """FOLDER/model on FOLDER/ids.safetensors beside transformers with it, or with the same model in `theirs`."""
    dtype = getattr(torch, dtype_name)
    context = lifted_to_float64() if dtype_name == "float64" else contextlib.nullcontext()
    ids = load_file(folder / "ids.safetensors")["input_ids"]
    with context:
        logits, loss, aux, model = reference(theirs or folder / "model", dtype, ids)
        gradients = disk_gradients(model, folder)
    ours, our_logits, our_gradients = collegium_eval(folder, dtype_name)
    # float32: products of at most `longest` terms through `depth` chained operations.
    config = model.config
    longest = max(config.hidden_size, config.vocab_size, ids.numel())
    depth = 8 * config.num_hidden_layers
    bound = FLOAT64_BOUND if dtype_name == "float64" else torch.finfo(dtype).eps * longest * depth
    worst = relative(our_logits, logits)
    worst = max(worst, abs(ours["total_loss"] - loss) / abs(loss))
    if config.output_router_logits:
        worst = max(worst, abs(ours["aux_loss"] - aux) / max(abs(aux), 1e-12))
    assert set(gradients) == set(our_gradients), set(gradients) ^ set(our_gradients)
    for key, gradient in gradients.items():
        difference = relative(our_gradients[key], gradient)
        assert difference <= bound, f"{name} {dtype_name}: gradient of {key}: {difference:.3e} > {bound:.3e}"
        worst = max(worst, difference)
    assert worst <= bound, f"{name} {dtype_name}: {worst:.3e} > {bound:.3e} (logits, loss or aux loss)"
    return worst
