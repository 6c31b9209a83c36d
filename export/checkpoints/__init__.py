"""What is exported: Hugging Face folders, the hub, GGUF files, random weights, the demonstration model."""
