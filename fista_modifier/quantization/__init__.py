"""Quantisation that keeps what pruning decided."""
