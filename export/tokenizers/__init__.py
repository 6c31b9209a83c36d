"""The tokenizer files of a bundle, from whatever the checkpoint has."""
