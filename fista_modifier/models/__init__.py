"""
What is particular to models: classes, layers, operators, experts, limits, loading.

Special cases of model families belong here. ``docs/special-cases.md`` lists them.
Whatever comes after this folder in the table of ``docs/architecture.md`` may import it.
It may import ``solver`` and the modules at the root, and transformers.
"""
