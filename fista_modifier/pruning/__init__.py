"""
A decoder layer from its recording to its result.

The folder says which layer is pruned when and by which process, prunes its operators
wave by wave, trains what was kept, and keeps finished layers on disk. ``results`` has
what became of everything and needs no toolkit. Everything above may import this folder.
It may import ``calibration``, ``models``, ``structured``, ``solver`` and the modules at
the root.
"""
