"""
Training of a pruned model after its pruning: zeros stay zeros, the dense model teaches.

``cli`` imports this folder, and the package's root imports ``zeros`` alone. It may
import everything but ``cli``, and transformers' ``Trainer``.
"""
