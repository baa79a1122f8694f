"""
The modifiers that recipes name: their fields and their part in the toolkit's lifecycle.

The mathematics of pruning is not here. ``forecast`` says before a run what a recipe
will do. ``pipeline``, ``evaluation`` and ``cli`` import this folder, and
``fista_modifier`` itself makes its classes known to the toolkit. It may import:
``checkpoint``, ``cost``, ``pruning``, ``calibration``, ``models``, ``solver`` and the
modules at the root.
"""
