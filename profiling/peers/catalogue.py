"""The peers: what each is installed from, the models it gets, and the settings it runs them with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Device = Literal["cpu", "cuda"]

#: The transformers that onnxruntime-genai's builder was run with, and that is measured itself.
TRANSFORMERS = "transformers==5.24.0"
TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True)
class Recipe:
    """One contender: how its model is made, and how it is run.

    `precision` is that of the weights: it is compared with our bundle of the same. `options` are for the peer's maker
    (None: it runs the checkpoint itself), `settings` for its worker. `model` is the folder's name where two recipes
    share one.
    """

    name: str
    precision: str
    options: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None

    @property
    def folder(self) -> str:
        """The name of the model's folder."""
        return self.model or self.name.replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Peer:
    """A runtime by a short name, with the modules of its worker and of its maker.

    `build` are environment variables of its installation. `needs_gguf`: its models are made from a GGUF file, so that a
    checkpoint of another kind leaves it out.
    """

    name: str
    worker: str
    maker: str | None
    requirements: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    build: Mapping[str, str] = field(default_factory=dict)
    needs_gguf: bool = False


#: Gate and up projection in one product, and the logits of the last position only: off by default, faster.
_TUNED = {"fuse_mlp_gate_up": "true", "prune_lm_head": "true"}


def _genai(provider: str, precision: str, name: str | None = None, **extra: str) -> Recipe:
    options = {"precision": precision, "provider": provider, "extra_options": extra}
    return Recipe(name or precision, precision, options)


def _openvino(weights: str, *arguments: str) -> Recipe:
    return Recipe(weights, weights, {"weight_format": weights, "arguments": list(arguments)})


def _transformers(precision: str, dtype: str, name: str | None = None, **settings: Any) -> Recipe:
    return Recipe(name or precision, precision, settings={"library": "transformers", "dtype": dtype, **settings})


#: llama-server with the bindings, from the same source. It needs neither its web page, which would be fetched, nor TLS.
_LLAMA_CPP = (
    "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON -DLLAMA_TOOLS_INSTALL=ON -DLLAMA_BUILD_UI=OFF "
    "-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DCMAKE_INSTALL_RPATH=$ORIGIN/../lib"
)
_AS_STORED = {"use_extra_bufts": False}
_OPTIMUM_ONNX = {"library": "optimum-onnx"}
#: OpenVINO computes an fp32 model in bfloat16 where the processor can, by default.
_OPENVINO_FP32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}

CPU_PEERS = (
    Peer(
        "genai",
        "genai_worker",
        "genai_maker",
        ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", TORCH, TRANSFORMERS, "onnx==1.23.2", "onnx-ir==1.1.0"),
        (
            _genai("cpu", "fp32"),
            _genai("cpu", "fp32", "fp32 tuned", **_TUNED),
            _genai("cpu", "int8"),
            _genai("cpu", "int8", "int8 tuned", **_TUNED),
            _genai("cpu", "int4"),
            _genai("cpu", "int4", "int4 tuned", **_TUNED),
        ),
    ),
    Peer(
        "llama.cpp",
        "llama_cpp_worker",
        "llama_cpp_maker",
        ("llama-cpp-python==0.3.36", "numpy==2.4.6"),
        (
            Recipe("F32", "fp32", {"type": "ALL_F32"}),
            Recipe("F16", "fp16", {"type": "MOSTLY_F16"}),
            Recipe("BF16", "bf16", {"type": "MOSTLY_BF16"}),
            Recipe("Q8_0", "int8", {"type": "MOSTLY_Q8_0"}),
            Recipe("Q4_0", "int4", {"type": "MOSTLY_Q4_0"}),
            Recipe("Q4_K_M", "int4", {"type": "MOSTLY_Q4_K_M"}),
            # Not repacked for the processor: this version crashes on repacked ones where there is AMX, of 8 bits with
            # Gemma 3 270M, of 4 with SmolLM2.
            Recipe("Q8_0 as stored", "int8", {"type": "MOSTLY_Q8_0"}, _AS_STORED, model="Q8_0"),
            Recipe("Q4_0 as stored", "int4", {"type": "MOSTLY_Q4_0"}, _AS_STORED, model="Q4_0"),
            Recipe("Q4_K_M as stored", "int4", {"type": "MOSTLY_Q4_K_M"}, _AS_STORED, model="Q4_K_M"),
        ),
        build={"CMAKE_ARGS": _LLAMA_CPP},
        needs_gguf=True,
    ),
    Peer(
        "openvino",
        "openvino_worker",
        "openvino_maker",
        ("openvino-genai==2026.4.1.0", "optimum-intel==2.1.0", "nncf==3.4.0", TORCH),
        (
            Recipe("fp32", "fp32", {"weight_format": "fp32"}, _OPENVINO_FP32),
            Recipe("fp32 default", "fp32", {"weight_format": "fp32"}, model="fp32"),
            Recipe("fp16", "fp16", {"weight_format": "fp16"}, {"INFERENCE_PRECISION_HINT": "f16"}),
            Recipe("bf16", "bf16", {"weight_format": "fp32"}, {"INFERENCE_PRECISION_HINT": "bf16"}, model="fp32"),
            _openvino("int8"),
            _openvino("int4", "--group-size", "32"),
        ),
    ),
    Peer(
        "optimum-onnx",
        "hf_worker",
        "optimum_onnx_maker",
        ("optimum-onnx==0.1.0", "optimum~=2.1.0", "onnxruntime==1.32.0", TORCH),
        (
            Recipe("fp32", "fp32", {}, _OPTIMUM_ONNX),
            Recipe("int8", "int8", {"int8": True}, _OPTIMUM_ONNX),
        ),
    ),
    Peer(
        "transformers",
        "hf_worker",
        None,
        (TRANSFORMERS, TORCH),
        (_transformers("fp32", "float32"),),
    ),
)

#: The reference of quality is transformers at fp32 here too; the others are compared with bundles of their precision.
CUDA_PEERS = (
    Peer(
        "transformers",
        "hf_worker",
        None,
        (TRANSFORMERS, TORCH),
        (
            _transformers("fp32", "float32"),
            _transformers("fp16", "float16", "fp16 eager"),
            _transformers("fp16", "float16", "fp16 compiled", compiled=True),
        ),
    ),
    Peer(
        "genai-cuda",
        "genai_worker",
        "genai_maker",
        ("onnxruntime-genai-cuda==0.18.0", TORCH, TRANSFORMERS, "onnx==1.23.2", "onnx-ir==1.1.0"),
        (
            _genai("cuda", "fp16"),
            _genai("cuda", "fp16", "fp16 tuned", **_TUNED),
            _genai("cuda", "int8"),
            _genai("cuda", "int4"),
        ),
    ),
)

PEERS: Mapping[Device, tuple[Peer, ...]] = {"cpu": CPU_PEERS, "cuda": CUDA_PEERS}
