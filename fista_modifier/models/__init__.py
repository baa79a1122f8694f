"""
What is particular to models: classes, layers, operators, experts, limits, loading.

Special cases of model families belong here. ``docs/architecture.md`` lists them.
Everything above may import this folder. It may import ``solver`` and the modules at the
root, and transformers.
"""
