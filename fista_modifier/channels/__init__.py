"""
The channels of a layer that can leave or change places, found from runs of the layer.

The folder knows no names of operators: runs in which operators return chosen values
show which channels belong together. ``pruning`` and ``cli`` import its modules. It may
import ``calibration``, ``models`` and the modules at the root.
"""
