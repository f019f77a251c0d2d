"""What the random tests share."""
