"""Models of llama.cpp, by its own `llama_model_quantize`, out of the GGUF file beside the checkpoint.

Option: `type`, the name of a LLAMA_FTYPE. llama.cpp dequantizes what the file has to float32 before it writes the type.
"""

from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]  # in the peer's environment only

SOURCE = "source.gguf"


def make(checkpoint: Path, out: Path, options: dict[str, Any]) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{options['type']}")
    params.allow_requantize = True
    target = out / "model.gguf"
    status = llama_cpp.llama_model_quantize(str(checkpoint / SOURCE).encode(), str(target).encode(), params)
    if status != 0:
        raise RuntimeError(f"llama_model_quantize to {options['type']} gave {status}")
