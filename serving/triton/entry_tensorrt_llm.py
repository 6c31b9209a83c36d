"""What model.py of the TensorRT-LLM entry imports."""

from starling.serving.triton.entry_model import EntryModel
from starling.serving.triton.tensorrt_llm import TensorRtLlmInterface


class TritonPythonModel(EntryModel):
    """The name that Triton's Python backend looks for."""

    interface = TensorRtLlmInterface()
