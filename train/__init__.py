"""Photos and captions -> caches -> LoRA."""
