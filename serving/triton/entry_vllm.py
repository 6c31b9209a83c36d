"""What model.py of the vLLM entry imports."""

from starling.serving.triton.entry_model import EntryModel
from starling.serving.triton.vllm import VllmInterface


class TritonPythonModel(EntryModel):
    """The name that Triton's Python backend looks for."""

    interface = VllmInterface()
