#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The verbs on text: a tokenizer and a model are trained, then asked; and what they say when they cannot."""

import json
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file
from small_run import checkpoint_of, collegium

BINARY = sys.argv[1]
CHECKS = 0

RUN_FILE = """run_folder = "{folder}/run"
[data]
path = "{folder}/data"
sequence_length = 32
[batch]
global_batch = 4
micro_sequences = 4
[train]
steps = 6
[model]
family = "mixtral"
hidden_size = 16
num_layers = 2
num_heads = 2
num_kv_heads = 1
max_positions = 64
[model.moe]
num_experts = 4
top_k = 2
ffn_size = 8
[logging]
sample_prompt = "def "
sample_tokens = 8
"""


def expect(code: int, text: str, *arguments: str, **options) -> str:
    global CHECKS
    done = subprocess.run([BINARY, *arguments], capture_output=True, text=True, check=False, **options)
    output = done.stdout if code == 0 else done.stderr
    assert done.returncode == code, f"{arguments}: exit code {done.returncode}, expected {code}: {done.stderr}"
    assert text in output, f"{arguments}: '{text}' is not in: {output}"
    CHECKS += 1
    return done.stdout


def write_corpus(folder: pathlib.Path, out: str, seed: int) -> None:
    texts = folder / f"texts-{out}"
    for domain, words in [("code", "def return if else x y self"), ("prose", "the a mouse hill went up down")]:
        (texts / domain).mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        choices = words.split()
        for number in range(6):
            picks = torch.randint(0, len(choices), (400,), generator=generator)
            (texts / domain / f"{number}.txt").write_text(" ".join(choices[i] for i in picks) + f" {number * seed}\n")
    domains = [f"--domain={name}={texts / name}" for name in ("code", "prose")]
    expect(
        0,
        "tokens of",
        "prepare",
        "--out",
        str(folder / out),
        *domains,
        "--vocab-size",
        "300",
        "--validation-fraction",
        "0.3",
    )


def check_text(model: str, folder: pathlib.Path) -> None:
    text = expect(0, "def ", "generate", "--model", model, "--prompt", "def ", "--max-tokens", "12")
    assert text.startswith("def "), text
    generate = ["generate", "--model", model, "--prompt", "the mouse", "--max-tokens", "5", "--temperature", "0"]
    generated = json.loads(expect(0, "text", *generate, "--json"))
    assert len(generated["ids"]) <= 5 and generated["text"].startswith("the mouse"), generated

    words = "def x if the mouse went up"
    inspected = json.loads(expect(0, "layers", "inspect", "--model", model, "--text", words, "--json"))
    assert len(inspected["layers"]) == 2 and len(inspected["pieces"]) == len(inspected["ids"])
    assert "".join(inspected["pieces"][1:]).replace("\u2581", " ").strip() == words
    file = folder / "words.txt"
    file.write_text(words)
    table = expect(0, "load per expert", "inspect", "--model", model, "--file", str(file))
    assert "layer 0" in table and "layer 1" in table

    by_text = json.loads(expect(0, "loss", "eval", "--model", model, "--text", words, "--json"))
    by_file = json.loads(expect(0, "loss", "eval", "--model", model, "--file", str(file), "--json"))
    save_file({"input_ids": torch.tensor([inspected["ids"]])}, folder / "ids.safetensors")
    by_ids = json.loads(
        expect(0, "loss", "eval", "--model", model, "--input", str(folder / "ids.safetensors"), "--json")
    )
    assert by_text == by_file == by_ids and by_text["num_targets"] == len(inspected["ids"]) - 1


def check_end_tokens(model: str, folder: pathlib.Path) -> None:
    """A new model's config.json has its tokenizer's; generation stops at those of the model's files."""
    config = json.loads((pathlib.Path(model) / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2), config
    greedy = ["--ids", "5,6,7", "--temperature", "0", "--max-tokens", "6", "--json"]

    def generated(folder: str) -> list[int]:
        return json.loads(expect(0, "ids", "generate", "--model", folder, *greedy))["ids"]

    ids = generated(model)
    unseen = next(token for token in range(300) if token not in ids)
    ending = shutil.copytree(model, folder / "ending")
    (ending / "config.json").write_text(json.dumps({**config, "eos_token_id": [unseen, ids[0]]}))
    assert generated(str(ending)) == ids[:1]
    (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": unseen}))
    assert generated(str(ending))[: len(ids)] == ids
    (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": "end"}))
    expect(2, 'generation_config.json: eos_token_id = "end": expected', "generate", "--model", str(ending), *greedy)


def check_refused_before_weights(model: str, folder: pathlib.Path) -> None:
    """What a model cannot do its config.json says: there are no weights beside it."""

    def described(name: str, **options: dict) -> str:
        moe = {"num_experts": 4, "top_k": 2, "ffn_size": 8, **options}
        sizes = {"vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "moe": moe}
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"model_type": "collegium_moe", "collegium": sizes}))
        return str(folder / name)

    by_experts = {"selection": "expert_choice", "allow_non_causal": True, "renormalize": "never"}
    chosen = described("chosen", router=by_experts)
    message = 'generate: model.moe.router.selection = "expert_choice": text cannot be generated'
    expect(2, message, "generate", "--model", chosen, "--ids", "1")
    grouped = described(
        "grouped", capacity={"drop_policy": "position", "drop_in_evaluation": True, "group_sequences": 4}
    )
    rule = "takes one sequence, but with model.moe.capacity.drop_in_evaluation = true groups of"
    expect(2, f"generate: {rule}", "generate", "--model", grouped, "--ids", "1")
    expect(2, f"inspect: {rule}", "inspect", "--model", grouped, "--text", "x")
    ids = folder / "one.safetensors"
    save_file({"input_ids": torch.zeros(1, 8, dtype=torch.int64)}, ids)
    expect(2, f"{ids}: 1 sequences, must be a multiple of", "eval", "--model", grouped, "--input", str(ids))
    shutil.copy(pathlib.Path(model) / "tokenizer.model", grouped)
    one = "--text: 1 sequences, must be a multiple of model.moe.capacity.group_sequences = 4"
    expect(2, one, "eval", "--model", grouped, "--text", "def x")


def check_messages(model: str, folder: pathlib.Path, run_file: pathlib.Path) -> None:
    expect(2, "no verb 'evall'; did you mean 'eval'?", "evall", "--model", model)
    expect(2, "--ids: is empty", "generate", "--model", model, "--ids", "")
    expect(2, '--ids "1,x": must be token ids', "generate", "--model", model, "--ids", "1,x")
    expect(2, "give either --input or --data, or a text", "eval", "--model", model, "--text", "a", "--file", "b")
    expect(2, "cannot read nowhere", "eval", "--model", model, "--file", "nowhere")
    expect(2, "more than the model's max_positions = 64", "eval", "--model", model, "--text", "x y " * 100)
    data = str(folder / "data")
    expect(2, "max_positions = 64", "eval", "--model", model, "--data", data, "--sequence-length", "65")
    long = folder / "long.safetensors"
    save_file({"input_ids": torch.zeros(1, 65, dtype=torch.int64)}, long)
    expect(2, "max_positions = 64", "eval", "--model", model, "--input", str(long))

    # Weights that are finite and whose products are not.
    huge = shutil.copytree(model, folder / "huge")
    weights = load_file(huge / "model.safetensors")
    for name in ("model.norm.weight", "lm_head.weight"):
        weights[name] = torch.full_like(weights[name], 3e38)
    save_file(weights, huge / "model.safetensors", {"format": "pt"})
    prompt = ["--prompt", "def x", "--max-tokens", "2"]
    shown = expect(1, "generation: the logits of token", "generate", "--model", str(huge), *prompt)
    assert shown == "", shown
    edited = "huge/model.safetensors is not the file that training wrote: it was edited, or is damaged"
    expect(1, edited, "generate", "--model", str(huge), *prompt)
    logits = folder / "logits.safetensors"
    written = ["--logits", str(logits), "--grads", str(folder / "grads.safetensors")]
    expect(1, "eval: the loss is", "eval", "--model", str(huge), "--text", "def x", "--json", *written)
    assert not logits.exists() and not (folder / "grads.safetensors").exists(), "a refused loss has left files"
    missing = str(folder / "missing/logits.safetensors")
    for option in ("--logits", "--grads"):
        nowhere = f"{option} {missing}: there is no folder {folder}/missing"
        expect(2, nowhere, "eval", "--model", model, "--text", "def x", option, missing)

    # A copy without tokenizer.model.
    other = shutil.copytree(model, folder / "other")
    (other / "tokenizer.model").unlink()
    expect(2, "no tokenizer.model here", "eval", "--model", str(other), "--text", "def x")
    huge_size = ["--set", "model.hidden_size=2000000000"]
    expect(2, "no machine could hold this model", "train", str(run_file), *huge_size, "--dry-run")
    expect(2, "for activations of the rank on this machine, which has", "train", str(run_file), *huge_size)
    widest = ["--set", f"model.moe.ffn_size={2**31 - 1}", "--set", f"model.hidden_size={2**31 - 4}"]
    expect(2, "no machine could hold this model", "train", str(run_file), *widest, "--dry-run")
    train = ["train", str(run_file), "--fresh"]
    record = str(folder / "routing")
    expect(0, "checkpoint", *train, "--record-routing", record)
    expect(2, "is the file that --replay-routing reads", *train, "--record-routing", record, "--replay-routing", record)
    expect(0, "checkpoint", *train, "--replay-routing", record)
    if pathlib.Path("/dev/full").exists():
        full = "cannot write /dev/full: No space left on device"
        expect(1, full, *train, "--record-routing", "/dev/full")
        expect(1, full, "eval", "--model", model, "--text", "def x", "--logits", "/dev/full")
        with open("/dev/full", "w") as nowhere:
            done = subprocess.run(
                [BINARY, "plan", "--list"], stdout=nowhere, stderr=subprocess.PIPE, text=True, check=False
            )
        assert done.returncode == 1 and "cannot write to standard output: No space left" in done.stderr, done
    expect(0, "loss", "eval", "--model", model, "--text", "def x", "--logits", "/dev/null")
    assert pathlib.Path("/dev/null").is_char_device()


def check_full_disk(folder: pathlib.Path, run_file: pathlib.Path) -> None:
    """No file may grow beyond a few kilobytes, as if the disk were full: nothing half-written stays."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the first byte too many ends the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

    target = folder / "full"
    expect(1, "File too large", "train", str(run_file), "--set", f"run_folder={target}", preexec_fn=limit)
    assert not [path for path in target.iterdir() if path.name.startswith("step-")], "a part of a checkpoint is left"


def check_tokenizers(model: str, folder: pathlib.Path, run_file: pathlib.Path) -> None:
    write_corpus(folder, "data2", 8)
    data2 = str(folder / "data2")
    tune = folder / "tune.toml"
    tune.write_text(
        f'run_folder = "{folder}/tuned"\n[data]\npath = "{data2}"\nsequence_length = 32\n[train]\nsteps = 2\n'
        f'[model]\ninit = "{model}"\n'
    )
    message = "did not make the tokens of"
    expect(2, message, "train", str(tune))
    expect(0, "checkpoint", "train", str(tune), "--set", "data.any_tokenizer=true")
    other_data = ["--set", f"data.path={data2}", "--set", f"run_folder={folder}/other-data"]
    expect(2, message, "train", str(run_file), *other_data, "--weights-only", model)
    evaluate = ["eval", "--model", model, "--sequence-length", "32", "--data"]
    expect(2, message, *evaluate, data2)
    expect(0, "loss", *evaluate, data2, "--any-tokenizer")
    expect(0, "loss", *evaluate, str(folder / "data"))


def check_refused_before_training(folder: pathlib.Path, run_file: pathlib.Path) -> None:
    """What cannot be done at the end is refused at the start, before the run folder changes."""
    run = folder / "kept"
    train = ["train", str(run_file), "--set", f"run_folder={run}"]
    checkpoint = checkpoint_of(collegium(BINARY, *train, "--json"))
    expect(2, "there is no folder /no/such", *train, "--fresh", "--record-routing", "/no/such/file")
    expect(1, "cannot write /proc/routing", *train, "--fresh", "--record-routing", "/proc/routing")
    expect(2, "leave --weights-only out to continue", *train, "--weights-only", str(checkpoint))
    sample = "logging.sample_tokens = 60: with the "
    expect(2, sample, *train, "--fresh", "--set", "logging.sample_tokens=60")
    group = ["--set", "model.moe.capacity.drop_policy=position", "--set", "model.moe.capacity.group_sequences=4"]
    group += ["--set", "model.moe.capacity.drop_in_evaluation=true"]
    few = "sequences of 32 tokens are evaluated, fewer than one group of"
    expect(2, few, *train, "--fresh", "--set", "validation.sequences=2", *group)
    alone = "logging.sample_prompt: takes one sequence, but with model.moe.capacity.drop_in_evaluation = true groups of"
    expect(2, alone, *train, "--fresh", "--set", "validation.sequences=4", *group)
    metrics = run / "metrics.jsonl"
    metrics.rename(run / "kept.jsonl")
    metrics.mkdir()
    expect(2, "metrics.jsonl: not a regular file", *train, "--fresh")
    metrics.rmdir()
    (run / "kept.jsonl").rename(metrics)
    assert checkpoint.is_dir(), "a refused run has removed checkpoints"
    assert len((run / "metrics.jsonl").read_text().splitlines()) > 6, "a refused run has changed the metrics"


def check_evaluation_equals_validation(folder: pathlib.Path, run_file: pathlib.Path) -> None:
    run = folder / "masked"
    train = ["train", str(run_file), "--set", f"run_folder={run}", "--set", "data.mask_documents=true", "--json"]
    validation = json.loads(expect(0, "checkpoint", *train))["validation_loss"]
    # The run folder stands for its newest checkpoint.
    evaluate = ["eval", "--model", str(run), "--data", str(folder / "data"), "--sequence-length", "32", "--json"]
    losses = [
        json.loads(expect(0, "loss", *evaluate, "--dtype", "bfloat16", *mask))["loss"]
        for mask in (["--mask-documents"], [])
    ]
    assert losses[0] == validation != losses[1], (validation, losses)


def check_time_limit(folder: pathlib.Path, run_file: pathlib.Path) -> None:
    limited = [str(run_file), "--set", f"run_folder={folder}/limited", "--set", "train.max_minutes=0.0000001"]
    text = expect(0, "the time of train.max_minutes = 1e-07 is up after step 1 of 6", "train", *limited)
    assert "validation loss" in text and "Sample" in text and "Which experts took which domain" in text, text
    summary = json.loads(expect(0, "checkpoint", "train", *limited, "--json"))
    assert summary["stopped_by"] == "max_minutes" and summary["steps"] == 2, summary
    assert summary["domains"] == ["code", "prose"] and set(summary["domain_loss"]) == {"code", "prose"}, summary


def check_damaged_run(folder: pathlib.Path, run_file: pathlib.Path) -> None:
    run = folder / "damaged"
    train = ["train", str(run_file), "--set", f"run_folder={run}"]
    checkpoint = checkpoint_of(collegium(BINARY, *train, "--json"))
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "step", "step": "seven"}\n')
    (run / "step-99999999999999999999999").mkdir()
    expect(0, "checkpoint", *train)
    state = checkpoint / "training/state.json"
    whole = state.read_text()
    state.write_text(whole.replace('"train": {', '"train": 5, "x": {', 1))
    expect(2, "training/state.json has", *train)
    state.write_text(whole.replace("bfloat16", "bfloat61", 1))
    expect(2, "training/state.json is damaged or was changed", *train)
    manifest = checkpoint / "training/manifest.json"
    manifest.write_text(json.dumps({"version": 1, "files": {"training/state.json": 5}}))
    expect(2, "training/manifest.json has no size and checksum of training/state.json", *train)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_corpus(folder, "data", 1)
        run_file = folder / "run.toml"
        run_file.write_text(RUN_FILE.format(folder=folder))
        summary = json.loads(expect(0, "checkpoint", "train", str(run_file), "--json"))
        assert summary["sample"].startswith("def "), summary
        assert summary["domains"] == ["code", "prose"] and len(summary["domain_loss"]) == 2, summary
        model = str(shutil.copytree(summary["checkpoint"], folder / "model"))
        check_text(model, folder)
        check_end_tokens(model, folder)
        check_refused_before_weights(model, folder)
        check_messages(model, folder, run_file)
        check_full_disk(folder, run_file)
        check_tokenizers(model, folder, run_file)
        check_refused_before_training(folder, run_file)
        check_evaluation_equals_validation(folder, run_file)
        check_time_limit(folder, run_file)
        check_damaged_run(folder, run_file)
    print(f"{CHECKS} passed, 0 failed")


if __name__ == "__main__":
    main()
