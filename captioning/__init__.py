"""Photos -> captions."""
