"""Objectives: pure functions from log-probs of the scored tokens to a loss and its metrics."""
