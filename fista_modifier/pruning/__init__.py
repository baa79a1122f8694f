"""
The pruning of a decoder layer, from its recording to its result.

The folder says which layer is pruned when and by which process, prunes its operators
wave by wave, trains what was kept, and keeps finished layers on disk. ``results`` holds
what became of everything and needs no toolkit (llm-compressor). Whatever comes after
this folder in the table of ``docs/architecture.md`` may import it. It may import
``channels``, ``calibration``, ``models``, ``structured``, ``solver`` and the modules at
the root.
"""
