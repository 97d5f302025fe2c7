# SPDX-License-Identifier: Apache-2.0
"""Every way in which a piece of work is run: the peers' and ours, each a command that prints a JSON object last."""

import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

from environment import PEERS_PYTHON, PYTHON
from shapes import LayerShape, StepShape, flags_of

HERE = pathlib.Path(__file__).resolve().parent


@dataclass(frozen=True)
class Setting:
    """What the commands need to know beside the shape."""

    dtype: str
    seconds: float
    threads: int
    binary: pathlib.Path


@dataclass(frozen=True)
class System:
    key: str  # peer, then the way it is run
    title: str
    command: Callable[[LayerShape | StepShape, Setting], list[str]]
    dtypes: tuple[str, ...] = ("bfloat16", "float32")

    @property
    def peer(self) -> str:
        return self.key.split("/")[0]


def peer(python: pathlib.Path, script: str, work: str, *options: str) -> Callable:
    def command(shape: LayerShape | StepShape, setting: Setting) -> list[str]:
        common = ["--dtype", setting.dtype, "--seconds", str(setting.seconds), "--threads", str(setting.threads)]
        return [str(python), str(HERE / script), work, *flags_of(shape), *common, *options]

    return command


def ours(work: str, *options: str, ranks: int = 1) -> Callable:
    def command(shape: LayerShape | StepShape, setting: Setting) -> list[str]:
        layout = ["--ranks", str(ranks), "--threads", str(max(1, setting.threads // ranks))]
        common = ["--dtype", setting.dtype, "--seconds", str(setting.seconds), "--json"]
        return [str(setting.binary), "bench", work, *flags_of(shape), *layout, *common, *options]

    return command


def transformers(work: str) -> list[System]:
    return [
        System(
            f"transformers/{name}",
            f"transformers, {name}",
            peer(PYTHON, "peer_transformers.py", work, "--implementation", name),
        )
        for name in ("eager", "grouped_mm")
    ]


def deepspeed() -> list[System]:
    """At the capacity factor that its layer has by default, 1, and at 1.25, which drops less and pads more."""
    return [
        System(
            f"deepspeed/{ranks}/{capacity}",
            f"DeepSpeed-MoE, {'one process' if ranks == 1 else f'EP={ranks} over Gloo'}, capacity {capacity}",
            peer(PEERS_PYTHON, "peer_deepspeed.py", "layer", "--ranks", str(ranks), "--capacity", str(capacity)),
        )
        for ranks in (1, 2)
        for capacity in (1.0, 1.25)
    ]


# Every row; a token to a rank once; nothing. The default takes the first for coarse experts, the second for fine ones.
EP_DISPATCHERS = ("uneven", "two_level", "shared_memory")
LAYER_SYSTEMS = [
    *transformers("layer"),
    *deepspeed(),
    System(
        "torchtitan",
        "torchtitan",
        peer(PEERS_PYTHON, "peer_torchtitan.py", "layer"),
        # Its experts compute in bfloat16 whatever the dtype of the model is.
        dtypes=("bfloat16",),
    ),
    System("collegium", "collegium", ours("layer", "--routing", "learned")),
    System("collegium/W0", "collegium, forced balance", ours("layer", "--skew", "W0")),
    System("collegium/W1", "collegium, one expert takes half of all tokens", ours("layer", "--skew", "W1")),
    *(
        System(
            f"collegium/EP/{dispatcher}",
            f"collegium, forced balance, EP=2 over MPI, {dispatcher}",
            ours("layer", "--backend", "mpi", "--dispatcher", dispatcher, ranks=2),
        )
        for dispatcher in EP_DISPATCHERS
    ),
]
STEP_SYSTEMS = [*transformers("step"), System("collegium", "collegium", ours("step"))]
PEERS = list(dict.fromkeys(system.peer for system in LAYER_SYSTEMS))


def environment_of(system: System, threads: int) -> dict[str, str]:
    """Peers' threads are bound by OpenMP, one to a core; ours bind themselves."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    if system.peer == "collegium":
        return environment
    bound = {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
    return environment | bound | {"HF_HUB_OFFLINE": "1"}
