"""What an export can be asked for, by name, and which of it goes together. Imports nothing heavy."""

from starling.engine.errors import CheckpointError, UserError

#: Each dialect's quantization schemes.
SCHEMES_OF: dict[str, tuple[str, ...]] = {
    "ort": ("int8", "int4"),
    "canonical": (),
    "tensorrt": ("int8", "int4", "w8a8", "fp8"),
}
DIALECTS = tuple(SCHEMES_OF)
SCHEMES = SCHEMES_OF["tensorrt"]
DTYPES = ("fp32", "fp16", "bf16")
RANDOM_PREFIX = "random:"
#: Built-in configurations: what differs between them; attention heads, vocabulary and window do not.
RANDOM_MODELS: dict[str, dict[str, int | float]] = {
    "starling-7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "initializer_range": 0.02,
    },
    "starling-tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.06},
}


def check_scheme(scheme: str, dialect: str) -> None:
    """Raise UserError where the dialect has no operators for this quantization."""
    known = SCHEMES_OF[dialect]
    if not known:
        raise UserError(f"dialect {dialect} is full precision only; use --dialect ort or tensorrt with --quant")
    if scheme not in known:
        raise UserError(f"--quant {scheme} is for --dialect tensorrt; dialect {dialect} has {', '.join(known)}")


def check_random(name: str) -> None:
    """Raise CheckpointError where there is no built-in configuration `name`."""
    if name not in RANDOM_MODELS:
        known = ", ".join(f"{RANDOM_PREFIX}{each}" for each in RANDOM_MODELS)
        raise CheckpointError(f"'{RANDOM_PREFIX}{name}' is not built in: use one of {known}")
