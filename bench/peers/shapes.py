# SPDX-License-Identifier: Apache-2.0
"""The work that every system is given. Without torch: the driver must stay small beside what it measures."""

from dataclasses import asdict, dataclass

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class LayerShape:
    """One layer of SwiGLU experts: forward and backward of `tokens` tokens."""

    experts: int
    top_k: int
    ffn: int
    hidden: int = 512
    tokens: int = 4096

    @property
    def name(self) -> str:
        return f"E={self.experts} K={self.top_k} F={self.ffn}"

    @property
    def flops(self) -> float:
        """Useful ones: three matrices, three products each, two operations."""
        return 18.0 * self.tokens * self.top_k * self.hidden * self.ffn


@dataclass(frozen=True)
class StepShape:
    """A training step of a decoder whose blocks all have experts; full attention, untied embeddings."""

    experts: int
    top_k: int
    ffn: int
    layers: int = 4
    hidden: int = 512
    heads: int = 8
    vocab: int = 8192
    sequences: int = 8
    length: int = 512

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def parameters(self) -> int:
        experts = 3 * self.experts * self.ffn * self.hidden
        block = experts + self.experts * self.hidden + 4 * self.hidden**2 + 2 * self.hidden
        return self.layers * block + 2 * self.vocab * self.hidden + self.hidden


LAYERS = {"coarse": LayerShape(8, 2, 896), "fine": LayerShape(64, 8, 128)}
STEPS = {
    "coarse": StepShape(8, 2, 896),
    "fine": StepShape(64, 8, 128),
    "large": StepShape(32, 4, 512, layers=6, hidden=1024, heads=16, vocab=16384, sequences=4),
}


def flags_of(shape: LayerShape | StepShape) -> list[str]:
    """--experts 8 --top-k 2 ...: our binary and the peers name the parts of a shape alike."""
    return [text for key, value in asdict(shape).items() for text in (f"--{key.replace('_', '-')}", str(value))]


def add_flags(parser, kind: type) -> None:
    """The other direction of flags_of()."""
    for key in kind.__dataclass_fields__:
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, required=True)


def shape_of(arguments, kind: type) -> LayerShape | StepShape:
    return kind(**{key: getattr(arguments, key) for key in kind.__dataclass_fields__})
