"""Plain PyTorch versions: the native operations' oracle, and what runs without the extension."""
