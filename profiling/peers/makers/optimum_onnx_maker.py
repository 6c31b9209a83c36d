"""Models of optimum-onnx: its export, and its dynamic INT8 quantization where the option `int8` is set."""

import tempfile
from pathlib import Path
from typing import Any

from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer  # type: ignore[import-not-found]
from optimum.onnxruntime.configuration import AutoQuantizationConfig  # type: ignore[import-not-found]


def make(checkpoint: Path, out: Path, options: dict[str, Any]) -> None:
    model = ORTModelForCausalLM.from_pretrained(checkpoint, export=True, local_files_only=True)
    if not options.get("int8"):
        model.save_pretrained(out)
        return
    with tempfile.TemporaryDirectory(dir=out.parent) as exported:
        model.save_pretrained(exported)
        how = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
        ORTQuantizer.from_pretrained(exported).quantize(save_dir=out, quantization_config=how)
