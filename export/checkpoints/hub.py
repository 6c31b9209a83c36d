"""Checkpoints from the Hugging Face hub."""

from pathlib import Path

from starling.engine.errors import CheckpointError, HubError, one_line

WANTED = ("*.safetensors", "*.safetensors.index.json", "*.jinja")
WANTED_CONFIG = ("config.json", "generation_config.json", "adapter_config.json")
WANTED_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json")
# Second copies of the weights in other layouts, and the weights of adapters, which are refused by their configuration.
UNWANTED = ("consolidated*", "original/*", "onnx/*", "adapter_model*")
TIMEOUT_S = 10.0


def download(repository: str, revision: str | None = None) -> Path:
    """Fetch the files that an export needs into the hub's cache, or find them there; the folder they are in.

    Raises CheckpointError (no such repository, revision, or no access to it) and HubError (offline, unreachable).
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[*WANTED, *WANTED_CONFIG, *WANTED_TOKENIZER],
                ignore_patterns=list(UNWANTED),
                etag_timeout=TIMEOUT_S,
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository} is gated: accept its terms on its page, then log in with 'hf auth login'"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision!r}: leave it out for the newest") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no model {repository!r}, or it is private: check the name, or log in with 'hf auth login'"
        ) from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise HubError(
            f"{repository} is not in the hub's cache and {why}: go online, or give a folder, a .gguf file or 'demo'"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise HubError(f"{repository} could not be fetched from {constants.ENDPOINT}: {one_line(error)}") from error
