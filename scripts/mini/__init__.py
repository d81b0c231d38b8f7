"""The recipe of the mini model: drawings -> VAE -> tokenizers -> text encoders with transformer -> guidance distillation."""
