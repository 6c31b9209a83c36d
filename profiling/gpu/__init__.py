"""Measuring on a GPU machine that is there for minutes: what runs on the card, and what it is packed from."""
