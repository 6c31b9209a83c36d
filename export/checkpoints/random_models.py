"""Built-in configurations that get random weights, by name. Imports nothing heavy."""

from starling.engine.errors import CheckpointError

RANDOM_PREFIX = "random:"
#: Built-in configurations: what differs between them; attention heads, vocabulary and window do not. Those with "score"
#: have a head for a score, as Starling-RM-7B-alpha on its Llama 2, and the vocabulary of the others.
RANDOM_MODELS: dict[str, dict[str, int | float]] = {
    "starling-7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "initializer_range": 0.02,
    },
    "starling-rm-7b": {
        "score": 1,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "initializer_range": 0.02,
    },
    "starling-rm-tiny": {
        "score": 1,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "initializer_range": 0.06,
    },
    "starling-tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.06},
}


def check_random(name: str) -> None:
    """Raise CheckpointError where there is no built-in configuration `name`."""
    if name not in RANDOM_MODELS:
        known = ", ".join(f"{RANDOM_PREFIX}{each}" for each in RANDOM_MODELS)
        raise CheckpointError(f"'{RANDOM_PREFIX}{name}' is not built in: use one of {known}")
