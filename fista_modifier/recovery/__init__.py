"""
The training of a pruned model towards the dense one, in which zeros stay zeros.

``cli`` imports this folder, and the package's root imports ``zeros`` and ``modifier``.
It may import everything but ``cli``, and transformers' ``Trainer``.
"""
