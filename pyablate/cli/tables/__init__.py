"""What the shell prints."""
