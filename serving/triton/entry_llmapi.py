"""What model.py of the llmapi entry imports."""

from starling.serving.triton.entry_model import EntryModel
from starling.serving.triton.llmapi import LlmApiInterface


class TritonPythonModel(EntryModel):
    """The name that Triton's Python backend looks for."""

    interface = LlmApiInterface()
