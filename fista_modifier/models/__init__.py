"""
What is particular to models: which class a configuration stands for. It imports
transformers and nothing of this package; everything else may import it.
"""
