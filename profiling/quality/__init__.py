"""What a bundle predicts on a text, alone or against a reference."""
