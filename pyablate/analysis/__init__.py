"""Statistics on a result: tests, targets, correlations, clusters."""
