"""
The way from calibration batches to the sums that a solver needs.

The folder records what each decoder layer is called with, runs layers and their blocks
again, finds the stages of a layer, and adds up the Gram matrices of X and X*. The
folders ``pruning``, ``cost`` and ``modifiers`` import its modules. It may import
``models``, ``solver`` and the modules at the root.
"""
