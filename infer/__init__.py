"""Prompt + LoRAs -> pictures."""
