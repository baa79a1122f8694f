"""
A checkpoint on disk: its files and formats, its model card and its verification.

``packing`` needs no toolkit, because the plugin for vLLM imports it. The folder may
import ``pruning`` (for the report), ``models``, ``solver``, ``data`` and the modules at
the root.
"""
