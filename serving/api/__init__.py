"""OpenAI's fields, messages, errors and replies, as HTTP and batches share them."""
