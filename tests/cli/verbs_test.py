#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The verbs as a user runs them: exit codes, messages, JSON, and that transformers loads what was trained here."""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file
from small_run import collegium, prepare

BINARY = sys.argv[1]
CHECKS = 0


def expect(code: int, text: str, *arguments: str) -> str:
    """Runs a command; its exit code and a part of its one-line message must be these."""
    global CHECKS
    done = collegium(BINARY, *arguments)
    output = done.stdout if code == 0 else done.stderr
    assert done.returncode == code, f"{arguments}: exit code {done.returncode}, expected {code}: {done.stderr}"
    assert text in output, f"{arguments}: '{text}' is not in: {output}"
    assert code == 0 or len(done.stderr.strip().splitlines()) <= 2, f"{arguments}: more than one message: {done.stderr}"
    CHECKS += 1
    return done.stdout


def edit_config(folder: pathlib.Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def check_bad_models(model: pathlib.Path, ids: str, scratch: pathlib.Path) -> None:
    def broken(name: str) -> pathlib.Path:
        folder = scratch / name
        shutil.copytree(model, folder)
        return folder

    for key, value, message in [
        ("model_type", "llama", 'model_type = "llama": must be one of'),
        ("hidden_act", "gelu", 'hidden_act = "gelu": only "silu"'),
        ("num_experts_per_tok", 9, "collegium.top_k = 2: the family's own keys say 9"),
        ("num_attention_heads", 3, "num_kv_heads = 2: must divide num_heads = 3"),
        ("head_dim", 7, "head_dim = 7: the rotary embedding needs an even number"),
        ("hidden_size", "wide", 'hidden_size = "wide": expected a whole number'),
        ("rope_parameters", {"rope_type": "yarn"}, 'rope_type = "yarn"'),
        ("attention_bias", True, "attention_bias = true"),
        ("vocab_size", 29, "has shape [23, 16], the configuration needs [29, 16]"),
    ]:
        folder = broken(f"config-{key}")
        changes = {key: value, "num_key_value_heads": 2} if key == "num_attention_heads" else {key: value}
        edit_config(folder, **changes)
        expect(2, message, "eval", "--model", str(folder), "--input", ids)

    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    for kind, message in [
        ("missing", f"tensor '{name}' is missing"),
        ("extra", "'model.extra' is not part of the model"),
        ("nan", f"'{name}': not finite at [2, 3]"),
    ]:
        folder = broken(kind)
        changed = {key: value.clone() for key, value in weights.items()}
        if kind == "missing":
            del changed[name]
        elif kind == "extra":
            changed["model.extra"] = torch.zeros(1)
        else:
            changed[name][2, 3] = float("nan")
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        expect(2, message, "eval", "--model", str(folder), "--input", ids)
    folder = broken("truncated")
    content = (model / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])
    expect(2, "truncated file?", "eval", "--model", str(folder), "--input", ids)
    (folder / "model.safetensors").write_bytes(content[:5])
    expect(2, "too few for a safetensors file", "eval", "--model", str(folder), "--input", ids)
    (folder / "model.safetensors").unlink()
    expect(2, "holds neither model.safetensors nor", "eval", "--model", str(folder), "--input", ids)


def check_transformers_loads(checkpoint: pathlib.Path, ids: str) -> None:
    out = json.loads(expect(0, "loss", "eval", "--model", str(checkpoint), "--input", ids, "--json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = load_file(ids)["input_ids"]
    with torch.no_grad():
        reference = model(input_ids=tokens, labels=tokens).loss.item()
    bound = torch.finfo(torch.float32).eps * 64 * 16  # epsilon, width of the sums, chained operations
    assert abs(out["loss"] - reference) <= bound * abs(reference), (out["loss"], reference)


def check_unwritable(run_file: pathlib.Path) -> None:
    file = run_file.parent / "file"
    file.write_text("")
    expect(1, "cannot create", "train", str(run_file), "--set", f"run_folder={file}/run")


def check_dry_run(run_file: pathlib.Path) -> None:
    """It refuses what a run refuses, and says what it did not check."""
    dry = ["train", str(run_file), "--dry-run"]
    expect(0, "parameters", *dry)
    for wrong, message in [
        ("model.vocab_size=3", "vocab_size = 3"),
        ("logging.sample_prompt=x", "has token ids and no tokenizer"),
        ("data.sequence_length=100000", "sequence_length"),
    ]:
        for way in (dry, dry[:-1]):
            expect(2, message, *way, "--set", wrong)
    for config in sorted((pathlib.Path(__file__).resolve().parents[2] / "configs").glob("*.toml")):
        made_up = ["--set", "data.path=nowhere", "--set", "model.vocab_size=4096"]
        expect(0, "parameters", "train", str(config), "--dry-run", "--ranks", "4", *made_up)
    absent = ["--set", "data.path=nowhere"]
    expect(0, "parameters", *dry, *absent, "--set", "model.vocab_size=64")
    expect(2, "nowhere: no prepared data here", *dry, *absent, "--set", "model.vocab_size=0")
    # No tensor of the million experts is listed.
    many = ["--set", "model.num_layers=10000", "--set", "model.moe.num_experts=1048576"]
    expect(0, "parameters", *dry, *many)
    for option in (["--fresh"], ["--weights-only", "x"], ["--replay-routing", "x"], ["--record-routing", "x"]):
        expect(2, "--dry-run", *dry, *option)


def check_command_lines(run_file: pathlib.Path, checkpoint: pathlib.Path, ids: str) -> None:
    """An empty value is that of a variable that is not set; an option takes one value."""
    train = ["train", "--set", "train.steps=1", str(run_file)]
    expect(2, "--weights-only: is empty", *train, "--weights-only", "")
    expect(2, "--logits: is empty", "eval", "--model", str(checkpoint), "--input", "x", "--logits", "")
    expect(0, "parameters", *train, "--dry-run")
    folder = run_file.parent
    expect(2, "there is no folder", *train, "--record-routing", str(folder / "none" / "routing"))
    expect(2, "--weights-only nowhere: there is no such folder", *train, "--fresh", "--weights-only", "nowhere")
    with pathlib.Path("/dev/full").open("w") as full:
        for ranks in ([], ["--ranks", "2"]):
            command = [BINARY, "eval", "--model", str(checkpoint), "--input", ids, "--json", *ranks]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
            assert done.returncode == 1 and "cannot write to standard output" in done.stderr, (ranks, done)
        done = subprocess.run([BINARY, "plan", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 1 and "cannot write to standard output" in done.stderr, done


def check_manifest(checkpoint: pathlib.Path, ids: str, scratch: pathlib.Path) -> None:
    folder = pathlib.Path(shutil.copytree(checkpoint, scratch / "manifest"))
    manifest = folder / "training" / "manifest.json"
    content = json.loads(manifest.read_text())
    for change, message in [
        ({"files": {"model.safetensors": 3}}, "has no size and checksum of model.safetensors"),
        ({"version": 99}, "version = 99: this program reads version 1"),
        ({"files": []}, "lists no files"),
    ]:
        manifest.write_text(json.dumps(content | change))
        expect(2, message, "eval", "--model", str(folder), "--input", ids)


def main() -> None:
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        run_file = prepare(BINARY, folder, 6)
        for verb in ("prepare", "train", "eval", "generate", "inspect", "doctor"):
            expect(0, "Example", verb, "--help")
        expect(2, "", "train", "--no-such-option")
        expect(2, "", "no-such-verb")
        expect(2, "cannot read nowhere.toml", "train", "nowhere.toml")
        check_dry_run(run_file)
        summary = json.loads(expect(0, "checkpoint", "train", str(run_file), "--json"))
        checkpoint = pathlib.Path(summary["checkpoint"])
        expect(
            2,
            "was made with optimizer.learning_rate = 0.01, not 0.5; continue with the same",
            "train",
            str(run_file),
            "--set",
            "optimizer.learning_rate=0.5",
        )
        expect(2, "was made with train.seed = 3, not 4;", "train", str(run_file), "--set", "train.seed=4")
        # The same tokens at another place are the same data.
        shutil.copytree(folder / "data", folder / "moved")
        expect(0, "checkpoint", "train", str(run_file), "--set", f"data.path={folder}/moved")
        expect(
            0,
            "checkpoint",
            "train",
            str(run_file),
            "--fresh",
            "--weights-only",
            str(shutil.copytree(checkpoint, folder / "start")),
        )
        check_unwritable(run_file)
        prepared = ["prepare", "--out", str(folder / "again"), "--domain", f"text={run_file}"]
        both = ["--tokenizer", str(run_file), "--vocab-size", "300"]
        expect(2, "--tokenizer excludes --vocab-size", *prepared, *both)
        expect(2, "File name too long", "prepare", "--out", str(folder / "again"), "--domain", "text=" + "x" * 300)
        expect(2, "File name too long", "eval", "--model", "x" * 300, "--text", "def x")
        expect(2, "File name too long", "train", str(run_file), "--set", "data.path=" + "x" * 300)

        no_tokenizer = ["--set", "logging.sample_prompt=x", "--set", f"run_folder={folder}/sampled"]
        expect(2, "has token ids and no tokenizer", "train", str(run_file), *no_tokenizer)
        assert not (folder / "sampled").exists()
        to_both = ["--input", "ids", "--logits", "same.safetensors", "--grads", "./same.safetensors"]
        expect(2, "./same.safetensors are the same file", "eval", "--model", str(checkpoint), *to_both)
        expect(2, "--seed", "generate", "--model", str(checkpoint), "--ids", "1", "--seed", "-1")
        expect(2, "--global-batch = 0: ", "plan", "--model", "mixtral-8x7b", "--gpus", "8", "--global-batch", "0")

        ids = str(folder / "ids.safetensors")
        save_file({"input_ids": torch.arange(22).view(2, 11) % 23}, ids)
        check_transformers_loads(checkpoint, ids)
        check_command_lines(run_file, checkpoint, ids)
        check_manifest(checkpoint, ids, folder)
        expect(
            0,
            "nats/token",
            "eval",
            "--model",
            str(checkpoint),
            "--data",
            str(folder / "data"),
            "--sequence-length",
            "16",
        )
        expect(2, "give either --input or --data", "eval", "--model", str(checkpoint))
        save_file({"input_ids": torch.tensor([[1, 2, 99]])}, folder / "outside.safetensors")
        expect(
            2,
            "input_ids[0, 2] = 99: must lie in [0, vocab_size = 23)",
            "eval",
            "--model",
            str(checkpoint),
            "--input",
            str(folder / "outside.safetensors"),
        )
        save_file({"input_ids": torch.zeros(2, 3)}, folder / "float.safetensors")
        expect(
            2,
            "input_ids must be int64",
            "eval",
            "--model",
            str(checkpoint),
            "--input",
            str(folder / "float.safetensors"),
        )
        expect(
            2,
            "must be float64, float32 or bfloat16",
            "eval",
            "--model",
            str(checkpoint),
            "--input",
            ids,
            "--dtype",
            "int8",
        )

        greedy = [
            "generate",
            "--model",
            str(checkpoint),
            "--ids",
            "1,2,3",
            "--temperature",
            "0",
            "--max-tokens",
            "5",
            "--json",
        ]
        assert len(json.loads(expect(0, "ids", *greedy))["ids"]) == 5
        expect(2, "no tokenizer.model here", "generate", "--model", str(checkpoint), "--prompt", "text")
        expect(2, "--top-p 0: must lie in (0, 1]", "generate", "--model", str(checkpoint), "--ids", "1", "--top-p", "0")
        expect(
            2,
            "more than the model's max_positions = 64",
            "generate",
            "--model",
            str(checkpoint),
            "--ids",
            "1",
            "--max-tokens",
            "64",
        )
        row = str(folder / "row.safetensors")
        save_file({"input_ids": (torch.arange(22) % 23).view(1, 22)}, row)
        routed = json.loads(expect(0, "layers", "inspect", "--model", str(checkpoint), "--input", row, "--json"))
        assert len(routed["layers"]) == 2 and len(routed["layers"][0]["experts"]) == 22
        expect(0, "load per expert", "inspect", "--model", str(checkpoint), "--input", row)
        check_bad_models(checkpoint, ids, folder / "bad")
    print(f"{CHECKS} passed, 0 failed")


if __name__ == "__main__":
    main()
